"""DeltaZip: a fine-tune as its base and their difference, pruned and rounded together by SparseGPT.

DeltaZip: Multi-Tenant Language Model Serving via Delta Compression (arXiv 2312.05215). Δ = W_fine - W_base goes through `sparsegpt`
with the second moment of the fine-tune's inputs; a matrix is then base + Δ', so that later matrices see it (true-sequential). It
publishes 2 and 4 bits with 2 of 4 weights kept on symmetric grids per row: schemes w2syms2of4 and w4syms2of4.
Where we differ from the authors' code (eth-easl/deltazip): no lossless step follows, which their sizes include; both models are
loaded in one dtype, where theirs reads the base in float16 and the fine-tune in bfloat16 before it subtracts; norms are those of
the fine-tune, where its differences drop them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from harness.core.cell import WeightScheme
from harness.quantization.methods.deltas import (
    RoundedDifference,
    change_of,
    on_base,
    require_settings,
)
from harness.quantization.numerics.weights import QuantizedWeight


class Rounding(RoundedDifference):
    """Pruning and rounding of the difference with second-order information."""

    inner = "sparsegpt"
    version = 1  # raised with the version of `sparsegpt`, whose numbers these are
    needs = ("base_weight", "hessian")
    stochastic = False
    activation_aware = False
    prunes = True
    no_adapter = "the difference is of full rank"

    @dataclass(frozen=True)
    class Settings:
        """All of them as in `sparsegpt`."""

        damping_fraction: float = 0.01
        block_size: int = 128
        sequential: bool = True
        mask: str = "sparsegpt"
        grid_on: str = "dense"
        grid: str = "gptq"
        scale_search: str = "none"

        def __post_init__(self) -> None:
            require_settings("sparsegpt", self)

    def round_unseen(
        self, name: str, weight: Tensor, scheme: WeightScheme, rng: Generator, base: Tensor
    ) -> QuantizedWeight:
        """The difference of an expert that no token reached, as `sparsegpt` prunes such a matrix."""
        return on_base(self._inner.round_unseen(name, change_of(weight, base), scheme, rng), base)
