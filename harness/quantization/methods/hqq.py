"""HQQ: min-max scales, and zero points optimized so that the weight error is small in a norm that forgives outliers.

Half-Quadratic Quantization of Large Machine Learning Models (Badri and Shaji, 2023, project report; no arXiv paper).
Objective: min over z of ||W - s (q - z)||_p^p with p = 0.7, by half-quadratic splitting. With S = 1 / s, β = 10 growing by κ:

    q = clamp(round(W S + z), 0, 2^bits - 1)        E = shrink(W - (q - z) / S), shrink(e) = sign(e) max(|e| - |e|^(p-1) / β, 0)
    z = mean over the group of q - (W - E) S

at most `iterations` times, until the mean absolute error over the whole matrix no longer falls. Data-free.

As in the authors' code (dropbox/hqq, "legacy" solver, its default): at 4 bits the initial zero is rounded; the last zero, not the
best, is used; codes come from the float scale and zero, which are rounded to scale_dtype only for storage; axis 0 takes groups
across output rows. Where we differ: iterations run in float32 on every device (theirs in float16 on a GPU); 3-bit codes are stored
in 3 bits (theirs 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import check_uniform, refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.grids import as_stored
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

LARGEST_INVERSE_SCALE = 2e4
SMALLEST_RANGE = 1e-4


@dataclass(frozen=True)
class AcrossRowsWeight(QuantizedWeight):
    """Groups of g weights that lie out · in / g apart in the row-major matrix (axis 0): a uniform matrix with one row per group."""

    kind = "uniform_across_rows"
    grouped: UniformWeight  # [out · in / g, g]
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        groups, size = self.grouped.shape
        return self.rows, groups * size // self.rows

    def dequantize(self) -> Tensor:
        return self.grouped.dequantize().T.reshape(self.shape)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = self.grouped.pack()
        return tensors, {"rows": self.rows, "grouped": meta}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        return cls(UniformWeight.unpack(tensors, meta["grouped"]), meta["rows"])


class Rounding:
    """Min-max scales with optimized zero points."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        axis           1: groups of consecutive inputs; 0: groups across output rows
        iterations     at most; 0: the initial zero points stay
        early_stop     end when the error no longer falls; False runs all iterations (the slow variant: iterations=100)
        norm           p of the error norm, in (0, 1]
        beta, kappa    β of the first iteration and its growth
        round_initial  round the initial zero points; None: at 4 bits only
        """

        axis: int = 1
        iterations: int = 20
        early_stop: bool = True
        norm: float = 0.7
        beta: float = 10.0
        kappa: float = 1.01
        round_initial: bool | None = None

        def __post_init__(self) -> None:
            if self.axis not in (0, 1):
                raise ValueError(f"axis is {self.axis}; it must be 0 or 1")
            if not 0 < self.norm <= 1:
                raise ValueError(f"norm is {self.norm}; it must be in (0, 1]")
            if self.iterations < 0 or not self.beta > 0 or not self.kappa > 0:
                raise ValueError(
                    f"iterations={self.iterations}, beta={self.beta}, kappa={self.kappa}: all must be positive"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Asymmetric integers of 2 to 8 bits in groups that divide the axis."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if self.settings.axis == 0 and weight.group_size == -1:
                yield "HQQ with axis=0 needs a group_size"
            elif self.settings.axis == 0 and linear.out_features % weight.group_size:
                yield f"group_size {weight.group_size} does not divide the output rows, across which axis=0 groups"

        return check_uniform(
            scheme, shapes, never_symmetric="HQQ optimizes zero points"
        ) + refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: six copies of weight."""
        require_finite(weight)
        rows, columns = weight.shape
        size = columns if scheme.group_size == -1 else scheme.group_size
        across = self.settings.axis == 0
        values = weight.reshape(size, -1).T if across else weight.reshape(-1, size)
        bits = int(scheme.bits)
        inverse_scale, zero = self._fit(values, bits)
        codes = (torch.round(values * inverse_scale + zero)).clamp_(0, 2**bits - 1).to(torch.uint8)
        scale = as_stored(1 / inverse_scale, scheme.scale_dtype)
        zero = as_stored(zero, scheme.scale_dtype)
        if across:
            return AcrossRowsWeight(
                UniformWeight(codes, scale, zero, bits, scheme.scale_dtype), rows
            )
        scale, zero = scale.reshape(rows, -1), zero.reshape(rows, -1)
        return UniformWeight(codes.reshape(rows, columns), scale, zero, bits, scheme.scale_dtype)

    def _fit(self, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Inverse scale and zero point [groups, 1] of values [groups, g]."""
        settings, top = self.settings, 2**bits - 1
        lo, hi = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        spread = hi - lo
        inverse_scale = torch.where(spread > SMALLEST_RANGE, top / spread, 1.0).clamp(
            max=LARGEST_INVERSE_SCALE
        )
        zero = -lo * inverse_scale
        if bits == 4 if settings.round_initial is None else settings.round_initial:
            zero = torch.round(zero)
        beta, lowest = settings.beta, float("inf")
        for _ in range(settings.iterations):
            codes = torch.round(values * inverse_scale + zero).clamp_(0, top)
            error = values - (codes - zero) / inverse_scale
            size = error.abs()
            kept = error.sign() * (size - size.pow(settings.norm - 1) / beta).clamp_(min=0)
            zero = (codes - (values - kept) * inverse_scale).mean(1, keepdim=True)
            mean_error = float(size.mean())  # error with the zero points before this update
            if settings.early_stop and not mean_error < lowest:
                break
            lowest = min(lowest, mean_error)
            beta *= settings.kappa
        return inverse_scale, zero
