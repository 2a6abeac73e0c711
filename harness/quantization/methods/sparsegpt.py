"""SparseGPT: GPTQ's loop over columns in which a pruned weight is one that is rounded to zero; with bits, both at once.

SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (arXiv 2301.00774), algorithm 1. With Uᵀ U = (H + λI)⁻¹ as
in GPTQ, for each block of `block_size` columns:

    share s   the floor(s · out · columns) weights of the block with the least w² / U_jj² (eq. 4, 5) are pruned, all rows together
    n:m       before every m-th column the m - n least of w² / U_jj² among the next m, as they are by then, in every row

    q_j = 0 where pruned, else w_j, or its nearest grid value (§3.5)        e_j = (w_j - q_j) / U_jj        w_k -= e_j U_jk, k > j

As in the authors' code (IST-DASLab/sparsegpt): one grid per channel is fitted on the dense weights before dead columns are set to
0, and columns keep their order. Where we differ: counts are exact (theirs prunes one more per block, and all ties); grids of
groups are fitted on the weights as they are at the start of their block, as our GPTQ does; scales are rounded to their stored type
first.
grid_on: updated (ours): a first run prunes and does not round, grids are fitted on its survivors, and a second run prunes and
rounds to these; updates push survivors out of a grid that was fitted before them.
mask: magnitude or wanda (the paper's ablation): the mask is chosen on the original weights (of a matrix; of a row), and the loop
only updates. Wanda's norms are the Hessian's own diagonal.
An expert that too few tokens reached is pruned by magnitude, row by row, and rounded to nearest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.core.sparsity import Sparsity, read_sparsity
from harness.quantization.methods.checks import check_pruned, require_columns, require_finite
from harness.quantization.methods.evidence import shared_factor
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.error_feedback import (
    Columns,
    GridColumns,
    PrunedColumns,
    prune_columns,
)
from harness.quantization.numerics.grids import Fitting, Grid
from harness.quantization.numerics.hessians import Factor
from harness.quantization.numerics.pruned_weights import SparseWeight
from harness.quantization.numerics.pruning import (
    dense_survivors,
    lowest,
    pattern_of,
    pruned_by_score,
    round_survivors,
)
from harness.quantization.numerics.weights import on_grid


class Rounding:
    """Pruning and rounding with second-order information."""

    version = 1
    needs = ("hessian",)
    stochastic = False
    activation_aware = False
    prunes = True

    @dataclass(frozen=True)
    class Settings:
        """
        damping_fraction  of the mean diagonal, added to the diagonal of H; above 0
        block_size        columns whose pruned weights are chosen together, and between two updates of all later columns
        sequential        prunes a block's linears in four steps, each seeing the pruned ones before it
        mask              sparsegpt: chosen in the loop; magnitude or wanda: on the original weights
        grid_on           dense: grids of the weights before pruning; updated: of what a first run without rounding leaves
        grid              gptq, awq, omniquant or compressed
        scale_search      choose among scales beside each group's own: none, range, neighbours, neighbours_mae or both, as in RTN
        """

        damping_fraction: float = 0.01
        block_size: int = 128
        sequential: bool = False
        mask: Literal["sparsegpt", "magnitude", "wanda"] = "sparsegpt"
        grid_on: Literal["dense", "updated"] = "dense"
        grid: str = "gptq"
        scale_search: str = "none"

        def __post_init__(self) -> None:
            require_columns(
                self.grid,
                self.scale_search,
                self.block_size,
                damping_fraction=self.damping_fraction,
            )
            if self.mask not in ("sparsegpt", "magnitude", "wanda"):
                raise ValueError(f'mask is "{self.mask}"; it must be sparsegpt, magnitude or wanda')
            if self.grid_on not in ("dense", "updated"):
                raise ValueError(f'grid_on is "{self.grid_on}"; it must be dense or updated')

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Every scheme that states a sparsity, dense or with a grid, whose groups and pattern divide every layer."""
        return check_pruned(
            scheme,
            shapes,
            convention=self.settings.grid,
            search=self.settings.scale_search,
            block_size=self.settings.block_size,
        )

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> SparseWeight:
        """Prune and round weight [out, in] float32. Peak memory: six copies of weight, or four [in, in] while H is factored."""
        factor = shared_factor(weight, evidence, self.settings.damping_fraction)
        chosen = None
        if self.settings.mask != "sparsegpt":
            scores, by_wanda = weight.abs(), self.settings.mask == "wanda"
            if by_wanda:
                assert evidence is not None, "shared_factor has read it"
                scores = scores * evidence["hessian"].diagonal().sqrt()
            chosen = pruned_by_score(scores, read_sparsity(scheme.sparsity), per_row=by_wanda)
        return self._rounded(weight, factor, scheme, chosen)

    def round_unseen(
        self, name: str, weight: Tensor, scheme: WeightScheme, rng: Generator
    ) -> SparseWeight:
        """An expert without enough calibration tokens: pruned by magnitude, row by row, and rounded to nearest."""
        require_finite(weight)
        pruned = pruned_by_score(weight.abs(), read_sparsity(scheme.sparsity), per_row=True)
        return round_survivors(
            weight, pruned, scheme, self.settings.grid, self.settings.scale_search
        )

    def _rounded(
        self, weight: Tensor, factor: Factor, scheme: WeightScheme, chosen: Tensor | None
    ) -> SparseWeight:
        """chosen: the mask [out, in] of what is pruned, where it does not depend on the loop."""
        left, pruned = self._pruned(weight, factor, scheme, chosen)
        if scheme.format == "dense":
            return dense_survivors(left, pruned, scheme)
        fitted_on = left if self.settings.grid_on == "updated" else weight
        return self._on_grids(weight, factor, scheme, chosen, fitted_on)

    def _pruned(
        self, weight: Tensor, factor: Factor, scheme: WeightScheme, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The pruned matrix with updated survivors, and what is pruned, both [out, in]; nothing where no step needs them."""
        if scheme.format != "dense" and self.settings.grid_on != "updated":
            return weight, torch.zeros_like(weight, dtype=torch.bool)
        columns = _columns(weight, scheme, chosen)
        columns.values = torch.empty(weight.shape[::-1], dtype=weight.dtype, device=weight.device)
        self._run(weight, factor, columns, read_sparsity(scheme.sparsity), chosen)
        return columns.values.T.contiguous(), columns.pruned.T.contiguous()

    def _on_grids(
        self,
        weight: Tensor,
        factor: Factor,
        scheme: WeightScheme,
        chosen: Tensor | None,
        fitted_on: Tensor,
    ) -> SparseWeight:
        """The joint loop, to grids of fitted_on [out, in]: the dense weights, or what an earlier run left."""
        rows, width = weight.shape
        size = width if scheme.group_size == -1 else scheme.group_size
        groups = width // size
        fitting = Fitting.of(fitted_on, scheme, self.settings.grid, self.settings.scale_search)
        form = fitting.fit(fitted_on[:, :size])
        scale = torch.empty(groups, rows, dtype=torch.float32, device=weight.device)
        zero = torch.empty_like(scale)

        def fit(values: Tensor, first: int, last: int) -> None:
            grid = fitting.fit(values[:, first * size : last * size].reshape(rows, -1, size))
            scale[first:last], zero[first:last] = grid.scale[..., 0].T, grid.zero[..., 0].T

        dynamic = scheme.group_size != -1 and self.settings.grid_on == "dense"
        if not dynamic:
            fit(fitted_on, 0, groups)
        columns = _columns(weight, scheme, chosen)
        codes = torch.empty(width, rows, dtype=torch.uint8, device=weight.device)
        group_of = [column // size for column in range(width)]
        columns.grids = GridColumns(form, scale, zero, group_of, codes)

        def fit_groups(matrix: Columns) -> None:
            """Fit all groups that begin in this block."""
            end = matrix.start + matrix.block.shape[1]
            first, last = -(-matrix.start // size), -(-end // size)
            if first < last:
                fit(matrix.weight, first, last)

        sparsity = read_sparsity(scheme.sparsity)
        self._run(weight, factor, columns, sparsity, chosen, fit_groups if dynamic else None)
        grid: Grid = dataclasses.replace(form, scale=scale.T.contiguous(), zero=zero.T.contiguous())
        rounded = on_grid(codes.T.contiguous(), grid, scheme)
        return SparseWeight(~columns.pruned.T.contiguous(), rounded, pattern_of(scheme))

    def _run(
        self,
        weight: Tensor,
        factor: Factor,
        columns: PrunedColumns,
        sparsity: Sparsity,
        chosen: Tensor | None,
        fit_groups: Callable[[Columns], None] | None = None,
    ) -> None:
        """Run the loop over the columns of weight [out, in] with dead columns at 0."""
        squared = factor.upper.diagonal().square()

        def begin(matrix: Columns) -> None:
            if fit_groups is not None:
                fit_groups(matrix)
            if chosen is None and not sparsity.of:
                block = matrix.block
                here = slice(matrix.start, matrix.start + block.shape[1])
                scores = (block * block / squared[here]).contiguous()
                columns.pruned[here] = lowest(scores, sparsity.pruned_of(scores.numel())).T

        columns.begin = begin
        dense = weight.masked_fill(factor.dead, 0)
        prune_columns(dense, factor.upper, columns, block_size=self.settings.block_size)


def _columns(weight: Tensor, scheme: WeightScheme, chosen: Tensor | None) -> PrunedColumns:
    """The columns of weight [out, in] before the loop: pruned as chosen, or by the scheme's pattern, or block by block."""
    sparsity = read_sparsity(scheme.sparsity)
    if chosen is not None:
        return PrunedColumns(chosen.T.contiguous())
    nothing = torch.zeros(weight.shape[::-1], dtype=torch.bool, device=weight.device)
    return PrunedColumns(nothing, (sparsity.kept, sparsity.of) if sparsity.of else None)
