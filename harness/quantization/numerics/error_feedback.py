"""Rounding of one column after the other; later columns compensate the error of each column.

Both forms minimise tr((W - Q) H (W - Q)ᵀ) greedily and are the same rule (QuIP, arXiv 2307.13304, theorem 6):

    feed_forward    GPTQ (arXiv 2210.17323): first column to last, through the factor U of H⁻¹ = Uᵀ U; errors change later columns
    ldlq            QuIP: last column to first, through H = (L + I) D (L + I)ᵀ; each column collects the errors made after it

GPTAQ (arXiv 2504.02692) feeds forward more than errors: a `Correction`.

The caller rounds the columns: on one grid, a grid per group, a codebook, or with exact outliers. Blocks of columns keep the updates
inside the cache; the rest of the matrix is updated by one product per block.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from harness.quantization.numerics.grids import Grid


@dataclass
class Columns:
    """The matrix while its columns are rounded; for reading only.

    weight  [out, in]: errors of finished blocks are in it, those of the current block are not (GPTQ fits its groups on this)
    block   [out, columns of the block]: up to date, errors of all earlier columns are in it
    start   the first column of the block
    """

    weight: Tensor
    block: Tensor
    start: int

    def __getitem__(self, column: int) -> Tensor:
        """Column `column` of the matrix, [out], up to date; it must lie in the current block."""
        return self.block[:, column - self.start]

    def group(self, start: int, size: int) -> Tensor:
        """Columns start .. start + size, up to date as far as the block reaches: [out, size]."""
        inside = self.block[:, start - self.start : start - self.start + size]
        missing = size - inside.shape[1]
        return (
            inside
            if missing <= 0
            else torch.cat((inside, self.weight[:, start + size - missing : start + size]), dim=1)
        )


@dataclass(frozen=True)
class Correction:
    """What a column adds to later columns besides its error: column k of the matrix gains w_i · matrix[i, k] (GPTAQ).

    matrix          [in, in] float32, strictly upper triangular
    rounded_behind  columns behind the current block gain q_i · matrix[i, k], with the rounded column, as in the authors' code
    """

    matrix: Tensor
    rounded_behind: bool = True


def feed_forward(
    weight: Tensor,
    factor: Tensor,
    round_column: Callable[[int, Columns], Tensor],
    *,
    block_size: int = 128,
    update_block: bool = True,
    correction: Correction | None = None,
) -> Tensor:
    """The rounded matrix [out, in].

    weight        [out, in], not written to
    factor        upper triangular U [in, in] with Uᵀ U = H⁻¹ (`hessians.inverse_factor`)
    round_column  of (column number, Columns) -> the column's rounded values [out]; called once per column, in order
    update_block  False: errors reach later blocks only (BiLLM), so a block can be rounded as a whole
    correction    fed forward beside the errors, where there is one

    Time: out · in² multiply-adds. Peak memory: three copies of weight.
    """
    weight = weight.clone()
    rounded = torch.empty_like(weight)
    for view, local, errors, carried in _blocks(weight, factor, block_size, correction):
        block, start = view.block.T, view.start
        for i in range(block.shape[0]):
            values = round_column(start + i, view)
            rounded[:, start + i] = values
            errors[i] = (block[i] - values) / local[i, i]
            if update_block:
                # A product and a subtraction, not one fused step: the rounding of each update in the authors' code of GPTQ.
                block[i + 1 :] -= local[i, i + 1 :, None] * errors[i]
            if correction is not None:
                own = correction.matrix[start + i, start + i + 1 : start + block.shape[0], None]
                block[i + 1 :] += own * block[i]
                carried[i] = values if correction.rounded_behind else block[i]
    return rounded


def _blocks(
    weight: Tensor, factor: Tensor, block_size: int, correction: Correction | None = None
) -> Iterator[tuple[Columns, Tensor, Tensor, Tensor]]:
    """Each block of columns, its part of the factor, and room for its errors and for the columns that a correction multiplies, both
    [columns of the block, out]; without a correction no room for these.

    What the caller has written when it asks for the next block is fed to all columns behind this one, in weight.
    """
    columns = weight.shape[1]
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block = weight[:, start:end].T.contiguous()  # a column is contiguous
        errors = torch.empty_like(block)
        carried = torch.empty_like(block) if correction is not None else errors[:0]
        yield Columns(weight, block.T, start), factor[start:end, start:end], errors, carried
        weight[:, end:] -= errors.T @ factor[start:end, end:]
        if correction is not None:
            weight[:, end:] += carried.T @ correction.matrix[start:end, end:]


@dataclass(frozen=True)
class BinaryEntries:
    """Entries that are one bit, beside others on a grid: a weight of at least the mean becomes mean + scale, another mean - scale.

    mask   [in, out] bool: the entries
    scale  [groups, out] float32, of the groups of the grids beside them
    mean   [groups, out] float32
    """

    mask: Tensor
    scale: Tensor
    mean: Tensor


@dataclass
class GridColumns:
    """The rounding of columns to grids that are known when their block begins; given to `feed_forward` or `round_on_grids`.

    form      bits and kind of the grids; its own scale and zero are not read
    scale     [groups, out] float32
    zero      [groups, out] float32
    group_of  the group of each column
    codes     [in, out] uint8, written as columns are rounded
    begin     called with each block before its first column is rounded: may fill scale and zero of groups in it, and set form
    binary    entries that are not on their grid but one bit; their codes are 0 and 1
    """

    form: Grid
    scale: Tensor
    zero: Tensor
    group_of: list[int]
    codes: Tensor
    begin: Callable[[Columns], None] | None = None
    binary: BinaryEntries | None = None

    def __call__(self, column: int, matrix: Columns) -> Tensor:
        """The rounded values [out] of one column of the matrix."""
        if column == matrix.start and self.begin is not None:
            self.begin(matrix)
        group = self.group_of[column]
        grid = dataclasses.replace(self.form, scale=self.scale[group], zero=self.zero[group])
        w = matrix[column]
        code = grid.quantize(w)
        values = grid.dequantize(code)
        if self.binary is not None:
            mask, scale = self.binary.mask[column], self.binary.scale[group]
            mean = self.binary.mean[group]
            plus = w >= mean
            code = torch.where(mask, plus.to(code.dtype), code)
            values = torch.where(mask, mean + torch.where(plus, scale, -scale), values)
        self.codes[column] = code
        return values


def round_on_grids(
    weight: Tensor,
    factor: Tensor,
    columns: GridColumns,
    *,
    block_size: int = 128,
    correction: Correction | None = None,
) -> None:
    """`feed_forward` for columns on grids: columns.codes are written, and the values that they stand for are not returned.

    On the CPU in float32 each block is rounded by one compiled function, some ten times faster than column by column and to the
    same bits; elsewhere, and where Numba is not installed, by `feed_forward`.
    """
    compiled = _compiled_columns(weight, factor, columns.scale)
    if compiled is None:
        feed_forward(weight, factor, columns, block_size=block_size, correction=correction)
        return
    assert correction is None or columns.binary is None, "entries of one bit have no correction"
    group_of = torch.tensor(columns.group_of, dtype=torch.int64)
    for view, local, errors, carried in _blocks(weight.clone(), factor, block_size, correction):
        if columns.begin is not None:
            columns.begin(view)
        here, binary = slice(view.start, view.start + errors.shape[0]), columns.binary
        compiled.round_block(
            view.block.T,
            local,
            errors,
            columns.codes[here],
            columns.scale,
            columns.zero,
            group_of[here],
            columns.form,
            binary if binary is None else (binary.mask[here], binary.scale, binary.mean),
            None if correction is None else (correction.matrix[here, here], carried),
        )
        if correction is not None and correction.rounded_behind:
            group = group_of[here]
            grid = dataclasses.replace(
                columns.form, scale=columns.scale[group], zero=columns.zero[group]
            )
            carried.copy_(grid.dequantize(columns.codes[here]))


@dataclass
class PrunedColumns:
    """What `prune_columns` does to each column: pruned entries become 0, the others stay as they are or go to their grids.

    pruned    [in, out] bool: read where it says what is pruned when a block begins; written where `pattern` chooses
    pattern   (kept, of): of every `of` columns the entries with the smallest w² / U_jj², as they are when the first of these
              columns is reached, are pruned, row by row; None: `pruned` is given
    values    [in, out] float32, written where form is None: the entries that stay, and zeros
    grids     the grids that entries go to; None: they stay as they are
    begin     called with each block before its first column: may fill `pruned` and the grids of the block
    """

    pruned: Tensor
    pattern: tuple[int, int] | None = None
    values: Tensor | None = None
    grids: GridColumns | None = None
    begin: Callable[[Columns], None] | None = None


def prune_columns(
    weight: Tensor, factor: Tensor, columns: PrunedColumns, *, block_size: int = 128
) -> None:
    """`feed_forward` with pruned entries: an entry that becomes 0 leaves its error to later columns, as rounding does.

    weight [out, in], not written to; factor as in `feed_forward`. A pattern's length must divide in and block_size.
    On the CPU in float32 each block is done by one compiled function, to the same bits as here.
    """
    compiled = _compiled_columns(weight, factor)
    grids = columns.grids
    group_of = torch.tensor(grids.group_of if grids is not None else (), dtype=torch.int64)
    for view, local, errors, _ in _blocks(weight.clone(), factor, block_size):
        if columns.begin is not None:
            columns.begin(view)
        here = slice(view.start, view.start + errors.shape[0])
        block = view.block.T
        if compiled is None:
            _prune_block(block, local, errors, columns, view.start)
            continue
        compiled.prune_block(
            block,
            local,
            errors,
            columns.pruned[here],
            columns.pattern,
            None if columns.values is None else columns.values[here],
            None
            if grids is None
            else (grids.codes[here], grids.scale, grids.zero, group_of[here], grids.form),
        )


def _prune_block(
    block: Tensor, factor: Tensor, errors: Tensor, columns: PrunedColumns, start: int
) -> None:
    """One block of `prune_columns`: block [columns, out] and errors are written."""
    diagonal = factor.diagonal()
    for i in range(block.shape[0]):
        if columns.pattern is not None and i % columns.pattern[1] == 0:
            kept, of = columns.pattern
            d = diagonal[i : i + of, None]
            scores = block[i : i + of] * block[i : i + of] / (d * d)
            lowest = scores.argsort(dim=0, stable=True)[: of - kept]
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, lowest, True)
            columns.pruned[start + i : start + i + of] = chosen
        w, pruned = block[i], columns.pruned[start + i]
        grids = columns.grids
        if grids is None:
            left = torch.where(pruned, w, 0.0)
        else:
            group = grids.group_of[start + i]
            grid = dataclasses.replace(grids.form, scale=grids.scale[group], zero=grids.zero[group])
            code = grid.quantize(w)
            left = torch.where(pruned, w, w - grid.dequantize(code))
            grids.codes[start + i] = torch.where(pruned, torch.zeros_like(code), code)
        if columns.values is not None:
            columns.values[start + i] = w - left
        errors[i] = left / diagonal[i]
        block[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]


def _compiled_columns(*tensors: Tensor) -> ModuleType | None:
    """The compiled loop, where it can take these tensors."""
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return None
    try:
        return importlib.import_module("harness.quantization.numerics.compiled_columns")
    except ImportError:  # Numba is not installed
        return None


def ldlq(
    target: Tensor,
    hessian: Tensor,
    round_values: Callable[[Tensor], Tensor],
    *,
    block_size: int = 128,
) -> Tensor:
    """The rounded matrix [out, in], last column first.

    target        [out, in] in units of the grid
    hessian       [in, in], positive definite
    round_values  of a column [out] with the errors of later columns added -> its rounded values

    Column i becomes round_values(t_i + sum over j > i of (t_j - q_j) L_ji) with L the unit lower Cholesky factor less its
    diagonal. Raises torch.linalg.LinAlgError when hessian is not positive definite. The same result for every block_size, up
    to the order of float sums.
    """
    lower = torch.linalg.cholesky(hessian)
    lower = lower / lower.diagonal()
    columns = target.shape[1]
    # (t - q)ᵀ
    errors = torch.zeros(columns, target.shape[0], dtype=target.dtype, device=target.device)
    rounded = torch.empty_like(target)
    for end in range(columns, 0, -block_size):
        start = max(0, end - block_size)
        # [columns of the block, out]
        shifted = target[:, start:end].T + lower[end:, start:end].T @ errors[end:]
        local = lower[start:end, start:end]
        for i in range(end - start - 1, -1, -1):
            values = round_values(shifted[i])
            rounded[:, start + i] = values
            errors[start + i] = target[:, start + i] - values
            shifted[:i].addr_(local[i, :i], errors[start + i])
    return rounded


def descend(
    rounded: Tensor,
    target: Tensor,
    hessian: Tensor,
    round_values: Callable[[Tensor], Tensor],
    clamp: Callable[[Tensor], Tensor],
    *,
    passes: int,
    block_size: int = 128,
) -> Tensor:
    """Coordinate descent on tr((q - t) H (q - t)ᵀ), QuIP's greedy passes: each column, last first, takes its best grid point.

    Values are clamped after each pass only, and the error that a clamp makes is not seen by the next pass, as published.
    Stops early when a pass changes nothing. rounded, target [out, in]; hessian [in, in].
    """
    hessian = hessian / hessian.diagonal().max()
    errors = rounded - target
    for _ in range(passes):
        before = rounded
        rounded = rounded.clone()
        for end in range(rounded.shape[1], 0, -block_size):
            start = max(0, end - block_size)
            slope = (errors @ hessian[:, start:end]).T.contiguous()  # [columns of the block, out]
            local = hessian[start:end, start:end]
            for i in range(end - start - 1, -1, -1):
                column = start + i
                values = round_values(rounded[:, column] - slope[i] / local[i, i])
                change = values - rounded[:, column]
                rounded[:, column] = values
                errors[:, column] += change
                slope.addr_(local[i], change)
        rounded = clamp(rounded)
        if torch.equal(rounded, before):
            break
    return rounded
