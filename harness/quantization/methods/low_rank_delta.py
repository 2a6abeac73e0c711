"""A fine-tune as its base and the truncated singular value decomposition of their difference.

The control of Delta-CoMe (arXiv 2406.08903) and BitDelta (arXiv 2402.10193) at equal bits, no paper of its own:

    Δ = U S Vᵀ        left = U_r √S_r        right = √S_r V_rᵀ        r = bits · mn / (16 (m + n)), rounded down

Singular vectors have canonical signs (`numerics.deltas.singular_vectors`). BitDelta's own low-rank class takes a randomized
decomposition without a seed; here the exact one is the default and the randomized one always uses the same sketch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import refusals
from harness.quantization.methods.deltas import (
    base_in,
    bits_for,
    budget,
    budget_reasons,
    on_base,
    shared_singular_vectors,
)
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.deltas import LowRankPart, LowRankWeight
from harness.quantization.numerics.grids import SCALE_DTYPES
from harness.quantization.numerics.weights import DenseWeight, QuantizedWeight

SVDS = ("exact", "randomized")
TOLERANCE = 0.01  # of the bits of a fixed rank against those of the scheme


class Rounding:
    """The largest singular values of the difference, with their vectors in 16 bits."""

    version = 1
    needs = ("base_weight",)
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        factor_dtype  in which both factors are stored: bfloat16, float16 or float32 (half the rank for the same bits)
        rank          of every matrix; 0: from the scheme's bits
        svd           exact, or randomized (faster for large matrices; the smallest vectors are then approximate)
        """

        factor_dtype: str = "bfloat16"
        rank: int = 0
        svd: str = "exact"

        def __post_init__(self) -> None:
            if self.factor_dtype not in SCALE_DTYPES:
                raise ValueError(
                    f'no factor_dtype "{self.factor_dtype}"; known: {", ".join(SCALE_DTYPES)}'
                )
            if self.svd not in SVDS:
                raise ValueError(f'no svd "{self.svd}"; known: {", ".join(SVDS)}')
            if self.rank < 0:
                raise ValueError(f"rank is {self.rank}; it must not be negative")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def _width(self) -> int:
        """Bits of one stored number."""
        return 8 * SCALE_DTYPES[self.settings.factor_dtype].itemsize

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """A budget (format "delta") that pays for at least one pair of vectors of every matrix."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            wrong = list(budget_reasons(weight))
            yield from wrong
            rank = self.settings.rank
            if not wrong and not rank and budget(weight.bits, linear) < self._width:
                least = bits_for(self._width, linear)
                yield f"{weight.bits:g} bits pay for no pair of vectors; use scheme.weight.bits={least:.3g} or more"
            if rank > min(linear.out_features, linear.in_features):
                yield f"rank {rank} is more than the matrix has"

        found = refusals(scheme, shapes, reasons)
        if not found and self.settings.rank:
            spent = sum(
                self._width * self.settings.rank * (each.out_features + each.in_features)
                for each in shapes.linears
            )
            stored = spent / sum(each.out_features * each.in_features for each in shapes.linears)
            if abs(stored / scheme.weight.bits - 1) > TOLERANCE:
                found.append(
                    f"rank {self.settings.rank} stores {stored:.4g} bits per weight and the scheme states "
                    f"{scheme.weight.bits:g}; set scheme.weight.bits={stored:.4g}"
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
        """The base and r pairs of vectors. Peak memory: five copies of weight [out, in]."""
        base = base_in(evidence)
        assert evidence is not None
        rows, columns = weight.shape
        shape = LinearShape(name, rows, columns, "")
        rank = self.settings.rank or max(1, int(budget(scheme.bits, shape) / self._width))
        left, sizes, right = shared_singular_vectors(
            name, weight, evidence, rank, randomized=self.settings.svd == "randomized"
        )
        dtype, roots = SCALE_DTYPES[self.settings.factor_dtype], sizes.sqrt()
        part = LowRankPart(
            DenseWeight((left * roots).to(dtype)),
            torch.ones_like(sizes),
            DenseWeight((right * roots).T.to(dtype)),
        )
        change = LowRankWeight(
            (part,),
            (rows, columns),
            self.settings.factor_dtype,
            unit_sizes=True,
            device=weight.device,
        )
        return on_base(change, base)
