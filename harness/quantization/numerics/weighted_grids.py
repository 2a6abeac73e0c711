"""Grids of least weighted squared error, sum_j u_j (w_j - w'_j)²: candidates for the scale of each group, refitted to its codes.

Values and their importance u are [..., g], one group in each row. Symmetric grids are signed (`grids.from_range`): m is the entry
of largest magnitude with its sign, B = 2^(bits-1), and the plain scale is -m / B. The candidates and the least squares are those of
llama.cpp (MIT), `make_qx_quants` and `make_qkx2_quants`; the candidates without refit are those of auto-round (Apache-2.0).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from harness.quantization.numerics.grids import Grid

STEPS_REFITTED, STEPS_PLAIN, STEPS_PLAIN_2_BITS, STEPS_ASYMMETRIC = 9, 100, 90, 20


def refitted_signed(
    values: Tensor, importance: Tensor, bits: int, steps: int = STEPS_REFITTED
) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 2^bits - 1 [..., g] float32 and scales [..., 1] of signed grids, both from the best of 2 steps + 1 candidates.

    Candidate i has codes q from the inverse scale -(B + i/10) / m and the scale of least squares, sum u w q / sum u q²; the largest
    (sum u w q)² / sum u q² is the least error. The plain one, i = 0, is tried first and wins ties. Groups of zeros have scale 1.
    """
    middle = 2 ** (bits - 1)
    end, empty = _signed_largest(values)
    best_codes, best_scale = torch.zeros_like(values), torch.ones_like(end)
    best = torch.full_like(end, -1.0)
    for i in (0, *(i for i in range(-steps, steps + 1) if i)):
        codes = torch.round(-(middle + 0.1 * i) / end * values).clamp_(-middle, middle - 1)
        weighted = importance * codes
        along, square = (weighted * values).sum(-1, keepdim=True), (weighted * codes).sum(-1, True)
        score = torch.where(square > 0, along.square() / square, 0.0)
        better = score > best
        best = torch.where(better, score, best)
        best_codes = torch.where(better, codes, best_codes)
        best_scale = torch.where(better, along / square, best_scale)
    usable = ~empty & (best > 0) & torch.isfinite(best_scale)
    return (
        torch.where(usable, best_codes, 0.0) + middle,
        torch.where(usable, best_scale, torch.where(empty, 1.0, -end / middle)),
    )


def signed_candidates(values: Tensor, bits: int, steps: int | None = None) -> Iterator[Tensor]:
    """Scales [..., 1] of signed grids to choose from, the plain one first: auto-round's, from a quarter to seven quarters of it."""
    middle = 2 ** (bits - 1)
    end, empty = _signed_largest(values)
    if steps is None:
        steps = STEPS_PLAIN_2_BITS if bits == 2 else STEPS_PLAIN
    for i in (0, *(i for i in range(-steps, steps + 1) if i)):
        inverse = middle - 0.01 * i if bits == 2 else middle * (1 - 0.0075 * i)
        yield torch.where(empty, 1.0, -end / inverse)


def refitted_asymmetric(
    values: Tensor,
    importance: Tensor,
    bits: int,
    stored: Callable[[Tensor, Tensor], Grid],
    steps: int = STEPS_ASYMMETRIC,
) -> Iterator[Grid]:
    """Grids with zero points to choose from: scale and minimum of least squares for the codes of each candidate.

    Candidate i takes codes from the inverse scale (Q - 1 + i/10) / (hi - lo), lo at most 0 and hi at least 0, Q = 2^bits - 1. A
    minimum above 0 becomes 0. stored(scale, minimum), both [..., 1], is the grid as it is read back.
    """
    top = 2**bits - 1
    lo, hi = (
        values.amin(-1, keepdim=True).clamp(max=0),
        values.amax(-1, keepdim=True).clamp(min=0),
    )
    width = torch.where(hi > lo, hi - lo, 1.0)
    total, first = importance.sum(-1, keepdim=True), (importance * values).sum(-1, keepdim=True)
    for i in range(steps + 1):
        codes = torch.round((top - 1 + 0.1 * i) / width * (values - lo)).clamp_(0, top)
        weighted = importance * codes
        sums, squares = weighted.sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
        along = (weighted * values).sum(-1, keepdim=True)
        determinant = total * squares - sums.square()
        scale = (total * along - first * sums) / determinant
        minimum = (squares * first - sums * along) / determinant
        through_zero = minimum > 0
        scale = torch.where(through_zero, along / squares, scale)
        minimum = torch.where(through_zero, 0.0, minimum)
        usable = (determinant > 0) & torch.isfinite(scale) & torch.isfinite(minimum) & (scale > 0)
        yield stored(torch.where(usable, scale, width / top), torch.where(usable, minimum, lo))


def best_of(values: Tensor, importance: Tensor, grids: Iterator[Grid]) -> Grid:
    """Group by group the grid with the least sum of importance · (nearest - w)²; the first of equals. grids: at least one."""
    best = next(grids)
    lowest = _loss(values, importance, best)
    for trial in grids:
        error = _loss(values, importance, trial)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best = dataclasses.replace(
            best,
            scale=torch.where(better, trial.scale, best.scale),
            zero=torch.where(better, trial.zero, best.zero),
        )
    return best


def _loss(values: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    return ((grid.nearest(values) - values).square_() * importance).sum(-1, keepdim=True)


def _signed_largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """m of each group [..., 1], 1 where it is 0, and where that is; of equal magnitudes the positive one."""
    lo, hi = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    end = torch.where(lo.abs() > hi, lo, hi)
    return torch.where(end == 0, 1.0, end), end == 0
