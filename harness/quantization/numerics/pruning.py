"""Which weights of a matrix are pruned, given a score for each, and the survivors in the layout of their scheme.

Counts are exact: of N weights that are compared with each other floor(N · share) are pruned, those with the smallest scores, and
of equal scores the first. Thresholds of several implementations prune every weight up to a score instead, one or more too many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.cell import WeightScheme
from harness.core.errors import MethodError
from harness.core.sparsity import Sparsity, read_sparsity
from harness.quantization.numerics.grids import SCALE_DTYPES, Fitting
from harness.quantization.numerics.pruned_weights import SparseWeight
from harness.quantization.numerics.weights import DenseWeight, on_grid


def lowest(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` smallest scores of a whole matrix; of equal ones those with the lowest row-major index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    border = flat.kthvalue(count).values
    mask = flat < border
    ties = (flat == border).nonzero()[:, 0]
    mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` smallest scores of every row; of equal ones those of the lowest columns."""
    order = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def pruned_by_score(scores: Tensor, sparsity: Sparsity, *, per_row: bool) -> Tensor:
    """What is pruned of a matrix [out, in] by its scores, [out, in] bool: a share of it or of each row, or a pattern's."""
    if sparsity.of:
        groups = scores.reshape(scores.shape[0], -1, sparsity.of)
        return lowest_per_row(groups, sparsity.of - sparsity.kept).reshape(scores.shape)
    if per_row:
        return lowest_per_row(scores, sparsity.pruned_of(scores.shape[1]))
    return lowest(scores, sparsity.pruned_of(scores.numel()))


def round_survivors(
    weight: Tensor, pruned: Tensor, scheme: WeightScheme, convention: str, search: str
) -> SparseWeight:
    """The survivors of a matrix [out, in], each rounded to the nearest value of a grid that is fitted with zeros at pruned places.

    A dense scheme rounds nothing but to its type. Raises MethodError where that type cannot hold a survivor.
    """
    left = weight.masked_fill(pruned, 0)
    if scheme.format == "dense":
        return dense_survivors(left, pruned, scheme)
    size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    grouped = left.reshape(weight.shape[0], -1, size)
    grid = Fitting.of(left, scheme, convention, search).fit(grouped)
    return SparseWeight(~pruned, on_grid(grid.quantize(grouped), grid, scheme), pattern_of(scheme))


def dense_survivors(left: Tensor, pruned: Tensor, scheme: WeightScheme) -> SparseWeight:
    """Survivors that are not rounded, in the type of dense weights (scale_dtype). left [out, in]: zeros at pruned places.

    Raises MethodError where that type cannot hold one of them.
    """
    values = left.to(SCALE_DTYPES[scheme.scale_dtype])
    if not bool(torch.isfinite(values).all()):
        raise MethodError(
            f"weights that {scheme.scale_dtype} cannot hold; use scheme.weight.scale_dtype=bfloat16 or float32"
        )
    return SparseWeight(~pruned, DenseWeight(values), pattern_of(scheme))


def pattern_of(scheme: WeightScheme) -> str:
    """The pattern that a scheme promises, "2:4"; "" where it states a share."""
    return scheme.sparsity if read_sparsity(scheme.sparsity).of else ""
