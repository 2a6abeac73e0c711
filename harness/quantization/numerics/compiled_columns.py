"""The loop over the columns of one block, compiled by Numba for the CPU: what `error_feedback` does in torch, to the same bits.

Rows are independent of each other once the factor is known, so each thread takes a range of rows, and a tile of `TILE` rows stays
in the fast cache while the columns of the block pass over it. Every weight sees the same operations in the same order as in the
torch loop: divisions are divisions, products and sums are rounded one by one (no fused step, no reassociation), and updates of
earlier columns are subtracted first to last. Tests hold the two loops against each other.

Machine code is compiled on first use, in seconds, and kept on disk: beside this file, or in the user's cache folder where that
cannot be written, or in NUMBA_CACHE_DIR.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from harness.quantization.numerics.block_maxima import SMALLEST
from harness.quantization.numerics.grids import Grid, tables

TILE = 64  # rows of a tile; with 128 columns its weights and errors take 64 KiB
ROWS_PER_THREAD = 256  # fewer rows than this are not worth a second thread

# How a column is rounded: the kinds of `grids.Grid`.
STEPS, FLOAT_ZERO, ELEMENT, ELEMENT_BY_INVERSE = 0, 1, 2, 3
AS_IT_IS = 4  # not rounded


def _compiled(function: Callable[..., Any]) -> Any:
    """A function that only other compiled functions call."""
    # "numpy": a division by zero gives infinity or NaN, as in torch, and raises nothing.
    return numba.njit(nogil=True, error_model="numpy")(function)


def _kept_on_disk(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no folder can be written: compiled once in each process
        return _compiled(function)


def kind_of(form: Grid) -> int:
    """How columns on grids of this form are rounded."""
    if form.element is not None:
        return ELEMENT_BY_INVERSE if form.by_inverse else ELEMENT
    return FLOAT_ZERO if form.float_zero else STEPS


def round_block(
    block: Tensor,
    factor: Tensor,
    errors: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_of: Tensor,
    form: Grid,
    binary: tuple[Tensor, Tensor, Tensor] | None = None,
    correction: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Round every column of a block to its grid and feed its error to the later columns of the block.

    block     [columns, out] float32, not written to
    factor    [columns, columns] float32, of the block
    errors    [columns, out] float32, written: (weight - rounded) / diagonal of the factor
    codes     [columns, out] uint8, written
    scale     [groups, out] float32, zero [groups, out] float32
    group_of  [columns] int64, the group of each column
    form      bits and kind of the grids
    binary    of entries that are one bit: their mask [columns, out] bool, scale and mean [groups, out] float32
    correction  [columns, columns] float32, what each column adds to later ones (`error_feedback.Correction`), and room for the
              columns as they were rounded, [columns, out] float32, written

    All are contiguous but for the factor and the correction, and on the CPU.
    """
    empty = torch.empty(0)
    of_element = (empty, empty, torch.empty(0, dtype=torch.uint8))
    if form.element is not None:
        of_element = tables(form.element, block.device)
    if binary is None:
        binary = (torch.empty(0, 0, dtype=torch.bool), torch.empty(0, 0), torch.empty(0, 0))
    matrix, carried = correction if correction is not None else (torch.empty(0, 0), errors[:0])
    inputs = (block, factor.contiguous(), errors, codes, scale, zero, group_of)
    added = (matrix.contiguous(), carried)
    arrays = [tensor.numpy() for tensor in (*inputs, *of_element, *binary, *added)]
    kind, top = kind_of(form), np.float32(form.top)
    rows = block.shape[1]

    def work(first: int, end: int) -> None:
        _round_block(*arrays, kind, top, first, end)

    _over_rows(work, rows)


def prune_block(
    block: Tensor,
    factor: Tensor,
    errors: Tensor,
    pruned: Tensor,
    pattern: tuple[int, int] | None,
    values: Tensor | None,
    grids: tuple[Tensor, Tensor, Tensor, Tensor, Grid] | None,
) -> None:
    """Prune, and round, the columns of a block, and feed their errors to the later columns of the block.

    block, factor, errors  as in `round_block`
    pruned   [columns, out] bool: given; written where pattern is (kept, of), which chooses as `error_feedback` says
    values   [columns, out] float32, written: what stays of the block; None: not wanted
    grids    codes, scale, zero, group_of and form as in `round_block`; None: entries that stay are not rounded
    """
    empty = torch.empty(0, 0)
    codes, scale, zero = torch.empty(0, 0, dtype=torch.uint8), empty, empty
    group_of = torch.zeros(block.shape[0], dtype=torch.int64)
    of_element = (torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.uint8))
    kind, top = AS_IT_IS, np.float32(0)
    if grids is not None:
        codes, scale, zero, group_of, form = grids
        kind, top = kind_of(form), np.float32(form.top)
        of_element = tables(form.element, block.device) if form.element is not None else of_element
    kept, of = pattern or (0, 0)
    stays = empty if values is None else values
    tensors = (block, factor.contiguous(), errors, pruned, stays, codes, scale, zero, group_of)
    arrays = [tensor.numpy() for tensor in (*tensors, *of_element)]

    def work(first: int, end: int) -> None:
        _prune_block(*arrays, kept, of, kind, top, first, end)

    _over_rows(work, block.shape[1])


def _over_rows(work: Callable[[int, int], None], rows: int) -> None:
    """work(first, end) for ranges of whole tiles that cover all rows, one range per thread."""
    threads = max(1, min(torch.get_num_threads(), rows // ROWS_PER_THREAD))
    if threads == 1:
        work(0, rows)
        return
    tiles = -(-rows // TILE)
    borders = [min(rows, TILE * (tiles * number // threads)) for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, *pair) for pair in itertools.pairwise(borders)]:
            done.result()


@_compiled
def _subtract(tile: Any, factor: Any, column: int, before: int, until: int, size: int) -> None:
    """Subtract the errors of the columns before … until - 1 from `column`, first to last, each by its entry of the factor."""
    target = tile[column]
    while before + 8 <= until:
        f0, f1 = factor[before, column], factor[before + 1, column]
        f2, f3 = factor[before + 2, column], factor[before + 3, column]
        f4, f5 = factor[before + 4, column], factor[before + 5, column]
        f6, f7 = factor[before + 6, column], factor[before + 7, column]
        e = tile[before : before + 8]
        for row in range(size):
            w = target[row]
            w -= f0 * e[0, row]
            w -= f1 * e[1, row]
            w -= f2 * e[2, row]
            w -= f3 * e[3, row]
            w -= f4 * e[4, row]
            w -= f5 * e[5, row]
            w -= f6 * e[6, row]
            w -= f7 * e[7, row]
            target[row] = w
        before += 8
    while before < until:
        f, last = factor[before, column], tile[before]
        for row in range(size):
            target[row] -= f * last[row]
        before += 1


@_compiled
def _subtract_and_add(
    tile: Any, factor: Any, kept: Any, correction: Any, column: int, size: int
) -> None:
    """`_subtract`, and after each error the column that made it, by its entry of the correction."""
    target = tile[column]
    for before in range(column):
        f, p = factor[before, column], correction[before, column]
        error, value = tile[before], kept[before]
        for row in range(size):
            target[row] -= f * error[row]
            target[row] += p * value[row]


# Each of these turns the weights of one column into what rounding leaves of them, and writes the codes.


@_compiled
def _round_steps(w: Any, codes: Any, scale: Any, zero: Any, top: Any) -> None:
    for row in range(w.shape[0]):
        code = np.rint(w[row] / scale[row]) + zero[row]
        code = np.float32(0) if code < 0 else code
        code = top if code > top else code
        codes[row] = _to_code(code)
        w[row] = w[row] - scale[row] * (code - zero[row])


@_compiled
def _round_float_zero(w: Any, codes: Any, scale: Any, zero: Any, top: Any) -> None:
    for row in range(w.shape[0]):
        code = np.rint(w[row] / scale[row] + zero[row])
        code = np.float32(0) if code < 0 else code
        code = top if code > top else code
        codes[row] = _to_code(code)
        w[row] = w[row] - scale[row] * (code - zero[row])


@_compiled
def _round_element(
    w: Any, codes: Any, scale: Any, values: Any, borders: Any, ordered: Any, by_inverse: bool
) -> None:
    smallest = np.float32(SMALLEST)
    for row in range(w.shape[0]):
        s = scale[row]
        if by_inverse:
            x = w[row] * (np.float32(1) / (smallest if s < smallest else s))
        else:
            x = w[row] / s
        low, high = 0, borders.shape[0]
        while low < high:  # the first border that is not below x; NaN is behind all of them
            middle = (low + high) >> 1
            if borders[middle] >= x:
                high = middle
            else:
                low = middle + 1
        codes[row] = ordered[low]
        w[row] = w[row] - s * values[ordered[low]]


@_compiled
def _round_binary(w: Any, left: Any, codes: Any, mask: Any, scale: Any, mean: Any) -> None:
    """Overwrite codes, and what rounding left of the weights w, where the mask is set."""
    for row in range(w.shape[0]):
        if mask[row]:
            plus = w[row] >= mean[row]
            codes[row] = np.uint8(1) if plus else np.uint8(0)
            left[row] = w[row] - (mean[row] + (scale[row] if plus else -scale[row]))


@_compiled
def _to_code(code: Any) -> Any:
    return np.uint8(np.int32(code)) if code == code else np.uint8(0)


@_kept_on_disk
def _round_block(
    block: Any,
    factor: Any,
    errors: Any,
    codes: Any,
    scale: Any,
    zero: Any,
    group_of: Any,
    values: Any,
    borders: Any,
    ordered: Any,
    mask: Any,
    binary_scale: Any,
    mean: Any,
    correction: Any,
    carried: Any,
    kind: int,
    top: Any,
    first: int,
    end: int,
) -> None:
    columns = block.shape[0]
    partly_binary = mask.shape[0] > 0
    corrected = correction.shape[0] > 0
    tile, before = np.empty((columns, TILE), np.float32), np.empty(TILE, np.float32)
    kept = np.empty((columns if corrected else 0, TILE), np.float32)
    for start in range(first, end, TILE):
        size = min(TILE, end - start)
        for column in range(columns):
            w, error = block[column, start : start + size], tile[column, :size]
            for row in range(size):
                error[row] = w[row]
            if corrected:
                _subtract_and_add(tile, factor, kept, correction, column, size)
                for row in range(size):
                    kept[column, row] = error[row]
                    carried[column, start + row] = error[row]
            else:
                _subtract(tile, factor, column, 0, column, size)
            group = group_of[column]
            s, z = scale[group, start : start + size], zero[group, start : start + size]
            if partly_binary:
                for row in range(size):
                    before[row] = error[row]
            code = codes[column, start : start + size]
            if kind == STEPS:
                _round_steps(error, code, s, z, top)
            elif kind == FLOAT_ZERO:
                _round_float_zero(error, code, s, z, top)
            else:
                _round_element(error, code, s, values, borders, ordered, kind == ELEMENT_BY_INVERSE)
            if partly_binary:
                _round_binary(
                    before[:size],
                    error,
                    code,
                    mask[column, start : start + size],
                    binary_scale[group, start : start + size],
                    mean[group, start : start + size],
                )
            diagonal, out = factor[column, column], errors[column, start : start + size]
            for row in range(size):
                error[row] = error[row] / diagonal
                out[row] = error[row]


@_compiled
def _choose(tile: Any, diagonal: Any, pruned: Any, scores: Any, column: int, kept: int) -> None:
    """Of the columns from `column` on, as many as scores has rows, mark all entries but the `kept` with the largest w² / d²."""
    of, size = scores.shape
    for k in range(of):
        d = diagonal[k]
        for row in range(size):
            w = tile[column + k, row]
            scores[k, row] = w * w / (d * d)
            pruned[column + k, row] = False
    for row in range(size):
        for _ in range(of - kept):
            lowest = -1
            for k in range(of):
                if not pruned[column + k, row] and (
                    lowest < 0 or scores[k, row] < scores[lowest, row]
                ):
                    lowest = k
            pruned[column + lowest, row] = True


@_kept_on_disk
def _prune_block(
    block: Any,
    factor: Any,
    errors: Any,
    pruned: Any,
    stays: Any,
    codes: Any,
    scale: Any,
    zero: Any,
    group_of: Any,
    values: Any,
    borders: Any,
    ordered: Any,
    kept: int,
    of: int,
    kind: int,
    top: Any,
    first: int,
    end: int,
) -> None:
    columns = block.shape[0]
    tile, before = np.empty((columns, TILE), np.float32), np.empty(TILE, np.float32)
    scores, diagonal = np.empty((max(of, 1), TILE), np.float32), np.empty(max(of, 1), np.float32)
    for start in range(first, end, TILE):
        size = min(TILE, end - start)
        for column in range(columns):
            error = tile[column, :size]
            if of == 0:
                for row in range(size):
                    error[row] = block[column, start + row]
                _subtract(tile, factor, column, 0, column, size)
            elif column % of == 0:  # all columns of the group as they are now
                for k in range(of):
                    for row in range(size):
                        tile[column + k, row] = block[column + k, start + row]
                    _subtract(tile, factor, column + k, 0, column, size)
                    diagonal[k] = factor[column + k, column + k]
                place = pruned[:, start : start + size]
                _choose(tile, diagonal, place, scores[:, :size], column, kept)
            else:  # what the group's earlier columns left
                _subtract(tile, factor, column, column - column % of, column, size)
            for row in range(size):
                before[row] = error[row]
            if kind == AS_IT_IS:
                for row in range(size):
                    error[row] = np.float32(0)
            else:
                group = group_of[column]
                s, z = scale[group, start : start + size], zero[group, start : start + size]
                code = codes[column, start : start + size]
                if kind == STEPS:
                    _round_steps(error, code, s, z, top)
                elif kind == FLOAT_ZERO:
                    _round_float_zero(error, code, s, z, top)
                else:
                    by_inverse = kind == ELEMENT_BY_INVERSE
                    _round_element(error, code, s, values, borders, ordered, by_inverse)
            for row in range(size):
                if pruned[column, start + row]:
                    error[row] = before[row]
                    if kind != AS_IT_IS:
                        codes[column, start + row] = np.uint8(0)
            if stays.shape[0] > 0:
                for row in range(size):
                    stays[column, start + row] = before[row] - error[row]
            of_column, out = factor[column, column], errors[column, start : start + size]
            for row in range(size):
                error[row] = error[row] / of_column
                out[row] = error[row]
