"""Magnitude pruning: the smallest weights become zero, with no calibration; the baseline of every pruning paper.

No paper of its own; in the form that SparseGPT (arXiv 2301.00774) and Wanda (2306.11695) compare with: |w| over a whole matrix,
or within every m neighbouring inputs for a pattern n:m. Survivors stay as they are, or go to the nearest value of a grid that is
fitted with zeros at pruned places.

Where we differ from both repositories: exactly floor(N · share) weights are pruned, and ties go by position; their thresholds prune
one more, and all ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.core.sparsity import read_sparsity
from harness.quantization.methods.checks import check_pruned, require_finite, require_search
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.grids import CONVENTIONS
from harness.quantization.numerics.pruned_weights import SparseWeight
from harness.quantization.numerics.pruning import pruned_by_score, round_survivors


class Rounding:
    """The smallest weights become zero."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    prunes = True
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        compare       weights that are ranked together: matrix, or row (an output's); says nothing for patterns n:m
        grid          gptq, awq, omniquant or compressed; of survivors that are rounded
        scale_search  choose among scales beside each group's own: none, range, neighbours, neighbours_mae or both, as in RTN
        """

        compare: Literal["matrix", "row"] = "matrix"
        grid: str = "gptq"
        scale_search: str = "none"

        def __post_init__(self) -> None:
            if self.grid not in CONVENTIONS:
                raise ValueError(f'no grid "{self.grid}"; known: {", ".join(CONVENTIONS)}')
            require_search(self.scale_search)
            if self.compare not in ("matrix", "row"):
                raise ValueError(f'compare is "{self.compare}"; it must be matrix or row')

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Every scheme that states a sparsity, dense or with a grid, whose groups and pattern divide every layer."""
        return check_pruned(
            scheme, shapes, convention=self.settings.grid, search=self.settings.scale_search
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
        require_finite(weight)
        settings = self.settings
        pruned = pruned_by_score(
            weight.abs(), read_sparsity(scheme.sparsity), per_row=settings.compare == "row"
        )
        return round_survivors(weight, pruned, scheme, settings.grid, settings.scale_search)
