"""Roundings with a low-rank part in 16 bits beside the matrix that another rounding makes: W' = Ŵ + B A, A [r, in], B [out, r].

Shared by the methods that choose A and B in closed form: their settings, their check, and what is stored of them
(`adapters.AdaptedWeight`: factors are not merged and their 16 r (out + in) / (out · in) bits per weight are counted).
Under an activation scheme the low-rank part reads its input before it is rounded, as the kernels of SVDQuant's authors do. A fused
matrix holds the sum of both and would multiply rounded inputs, so that combination is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from harness.core.cell import BASE_WEIGHT, Cell, Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.quantization.methods.protocols import Evidence, build_rounding
from harness.quantization.numerics.adapters import (
    AdaptedWeight,
    check_dtype,
    is_named,
    unknown_linears,
)
from harness.quantization.numerics.grids import as_stored
from harness.quantization.numerics.weights import QuantizedWeight

BITS = {"bfloat16": 16, "float16": 16, "float32": 32}  # of adapter_dtype


@dataclass(frozen=True)
class CorrectionSettings:
    """
    base           the rounding inside
    base_settings  of it, where they differ from conf/rounding/<base>.yaml
    rank           r: rows of A, columns of B; 0: the base alone
    adapter_dtype  in which A and B are stored: bfloat16, float16 or float32
    linears        short names of the linears with a low-rank part ("q_proj"); empty: all
    """

    base: str = "gptq"
    base_settings: dict[str, Any] = field(default_factory=dict)
    rank: int = 32
    adapter_dtype: str = "bfloat16"
    linears: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; it must be 0 or more")
        if not all(isinstance(name, str) for name in self.linears):
            raise ValueError(f"linears is {list(self.linears)}; names of linears are expected")
        check_dtype("adapter_dtype", self.adapter_dtype)


class LowRankCorrection(ABC):
    """The base of roundings with a low-rank part; a method defines how it finds the part (`corrected`)."""

    def __init__(self, settings: CorrectionSettings) -> None:
        self.settings = settings
        self.base = build_rounding(settings.base, dict(settings.base_settings))

    @property
    def sequential(self) -> bool:
        """As the base."""
        return bool(getattr(self.base, "sequential", False))

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """What the base refuses; bases of whole blocks, of differences, of several widths; fused matrices with rounded inputs."""
        settings = self.settings
        if not hasattr(self.base, "round_layer"):
            return [
                f"base {settings.base} works on whole blocks; use one that rounds matrix by matrix, such as gptq or rtn"
            ]
        if BASE_WEIGHT in self.base.needs:
            return [
                f"base {settings.base} rounds the difference from another model, and the low-rank part corrects a whole matrix; "
                "use another base"
            ]
        several = getattr(self.base, "holds_all_widths", "")
        if several and getattr(self.base.settings, several):
            return [
                f"base {settings.base} makes one matrix of all widths, and the low-rank part corrects that of one width; "
                f"set rounding.base_settings.{several}=0"
            ]
        reasons = [f"base {settings.base}: {each}" for each in self.base.check(scheme, shapes)]
        reasons += unknown_linears(settings.linears, [linear.name for linear in shapes.linears])
        merged = [
            linear.name
            for linear in shapes.linears
            if (linear.fused or linear.expert)
            and self._has_part(linear.name)
            and any(scheme.activation_for(block, linear.name) for block in range(shapes.blocks))
        ]
        if merged:
            reasons.append(
                f"the low-rank part reads inputs before they are rounded, and {', '.join(merged)} are parts of fused layers, which "
                "hold the sum of both; use a scheme without activations"
            )
        return reasons

    def warnings(self, cell: Cell, shapes: Shapes) -> list[str]:
        """Ranks with which the low-rank part is as large as a matrix; also what the base warns of."""
        rank = self.settings.rank
        whole = [
            each
            for each in shapes.linears
            if self._has_part(each.name) and rank >= min(each.out_features, each.in_features)
        ]
        found = (
            [f"base: {each}" for each in self.base.warnings(cell, shapes)]
            if hasattr(self.base, "warnings")
            else []
        )
        if whole:
            dearest = max(
                BITS[self.settings.adapter_dtype]
                * (1 / each.out_features + 1 / each.in_features)
                * min(each.out_features, each.in_features)
                for each in whole
            )
            found.append(
                f"rank {rank} spans {', '.join(each.name for each in whole)}: the low-rank part is as good as the matrix and "
                f"takes up to {dearest:.0f} bits per weight besides the base's"
            )
        return found

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32 and add its low-rank part."""

        def by_base(matrix: Tensor) -> QuantizedWeight:
            rounded: QuantizedWeight = self.base.round_layer(name, matrix, evidence, scheme, rng)
            return rounded

        if not self._has_part(name):
            return by_base(weight)
        return self.corrected(weight, evidence, by_base)

    @abstractmethod
    def corrected(
        self,
        weight: Tensor,
        evidence: Evidence | None,
        by_base: Callable[[Tensor], QuantizedWeight],
    ) -> AdaptedWeight:
        """The rounded weight [out, in] with its low-rank part. by_base: rounds a matrix of the same shape."""

    def stored(self, factor: Tensor) -> Tensor:
        """A or B as it is read back: rounded to adapter_dtype, in float32."""
        return as_stored(factor.float(), self.settings.adapter_dtype).contiguous()

    def adapted(self, base: QuantizedWeight, down: Tensor, up: Tensor) -> AdaptedWeight:
        """What is stored: the base, and stored factors A = down [r, in] and B = up [out, r]."""
        return AdaptedWeight(base, down, up, 1.0, self.settings.adapter_dtype)

    def _has_part(self, name: str) -> bool:
        return self.settings.rank > 0 and is_named(name, self.settings.linears)
