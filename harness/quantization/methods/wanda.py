"""Wanda: of every output, the weights with the least |w| times the norm of their input become zero; nothing else changes.

A Simple and Effective Pruning Approach for Large Language Models (arXiv 2306.11695). Score of a weight (eq. 1):

    S_ij = |W_ij| · ||X_j||₂        ||X_j||₂ = √(Σ over tokens of x_j²)

compared within each output row, or within every m neighbouring inputs of it for a pattern n:m. Blocks are pruned in order on inputs
that went through the pruned blocks before. variant: as much of each row's score is pruned as a share α of its sum says, with one α
per matrix, found by bisection between 0 and 0.8, that gives the sparsity to 0.001.

Where we differ from the authors' code (locuslab/wanda): the norm is √(mean over tokens of x_j²), a constant factor off, on which no
choice depends; ties of n:m go to the lowest column; survivors may be rounded, to a grid that is fitted with zeros at pruned
places. An expert that too few tokens reached is pruned by magnitude, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.core.sparsity import read_sparsity
from harness.quantization.methods.checks import check_pruned, require_finite, require_search
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.grids import CONVENTIONS
from harness.quantization.numerics.pruned_weights import SparseWeight
from harness.quantization.numerics.pruning import pruned_by_score, round_survivors

FIRST_SHARE, LARGEST_SHARE, TOLERANCE = 0.4, 0.8, 0.001  # of the variant's bisection


class Rounding:
    """Weights with small products of magnitude and input norm become zero."""

    version = 1
    needs = ("square_mean",)
    stochastic = False
    activation_aware = False
    prunes = True
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        variant       prune a share of each row's summed score instead of a share of its weights; no patterns n:m
        grid          gptq, awq, omniquant or compressed; of survivors that are rounded
        scale_search  choose among scales beside each group's own: none, range, neighbours, neighbours_mae or both, as in RTN
        """

        variant: bool = False
        grid: str = "gptq"
        scale_search: str = "none"

        def __post_init__(self) -> None:
            if self.grid not in CONVENTIONS:
                raise ValueError(f'no grid "{self.grid}"; known: {", ".join(CONVENTIONS)}')
            require_search(self.scale_search)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Every scheme that states a sparsity, dense or with a grid, whose groups and pattern divide every layer."""
        return check_pruned(
            scheme,
            shapes,
            convention=self.settings.grid,
            search=self.settings.scale_search,
            patterns=not self.settings.variant,
        )

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> SparseWeight:
        """Prune weight [out, in] float32, and round what is left. Peak memory: four copies of weight."""
        assert evidence is not None, "a method that needs statistics is given evidence"
        require_finite(weight)
        square_mean, sparsity = evidence["square_mean"], read_sparsity(scheme.sparsity)
        if not bool(torch.isfinite(square_mean).all()):
            raise MethodError(
                "the squares of the calibration inputs of this layer hold NaN or infinity; load the model in a wider dtype "
                "(model.dtype=float32) or use other calibration text"
            )
        scores = weight.abs() * square_mean.sqrt()
        if self.settings.variant:
            pruned = by_share_of_sum(scores, float(sparsity.share))
        else:
            pruned = pruned_by_score(scores, sparsity, per_row=True)
        return self._rounded(weight, pruned, scheme)

    def round_unseen(
        self, name: str, weight: Tensor, scheme: WeightScheme, rng: Generator
    ) -> SparseWeight:
        """An expert without calibration tokens: pruned by magnitude, row by row."""
        require_finite(weight)
        sparsity = read_sparsity(scheme.sparsity)
        return self._rounded(weight, pruned_by_score(weight.abs(), sparsity, per_row=True), scheme)

    def _rounded(self, weight: Tensor, pruned: Tensor, scheme: WeightScheme) -> SparseWeight:
        return round_survivors(
            weight, pruned, scheme, self.settings.grid, self.settings.scale_search
        )


def by_share_of_sum(scores: Tensor, wanted: float) -> Tensor:
    """What Wanda's variant prunes of scores [out, in], about a share `wanted` of them: [out, in] bool.

    In every row the scores are pruned, smallest first, whose running sum is at most α times the row's sum, with all that equal
    the last of them; α is bisected from 0.4 until the share is within 0.001 or the bracket smaller than that.
    """
    ordered = scores.sort(dim=1).values
    sums = ordered.cumsum(1)
    low, high, share = 0.0, LARGEST_SHARE, FIRST_SHARE
    while True:
        counts = (sums <= share * sums[:, -1:]).sum(1, keepdim=True)
        border = ordered.gather(1, (counts - 1).clamp(min=0))
        pruned = (scores <= border) & (counts > 0)
        reached = float(pruned.float().mean())
        if abs(reached - wanted) <= TOLERANCE or high - low < TOLERANCE:
            return pruned
        low, high = (low, share) if reached > wanted else (share, high)
        share = (low + high) / 2
