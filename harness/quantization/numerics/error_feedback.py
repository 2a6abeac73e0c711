"""Rounding of one column after the other; later columns compensate the error of each column.

Both forms minimise tr((W - Q) H (W - Q)ᵀ) greedily and are the same rule (QuIP, arXiv 2307.13304, theorem 6):

    feed_forward    GPTQ (arXiv 2210.17323): first column to last, through the factor U of H⁻¹ = Uᵀ U; errors change later columns
    ldlq            QuIP: last column to first, through H = (L + I) D (L + I)ᵀ; each column collects the errors made after it

The caller rounds the columns: on one grid, a grid per group, a codebook, or with exact outliers. Blocks of columns keep the updates
inside the cache; the rest of the matrix is updated by one product per block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


def feed_forward(
    weight: Tensor,
    factor: Tensor,
    round_column: Callable[[int, Columns], Tensor],
    *,
    block_size: int = 128,
    update_block: bool = True,
) -> Tensor:
    """The rounded matrix [out, in].

    weight        [out, in], not written to
    factor        upper triangular U [in, in] with Uᵀ U = H⁻¹ (`hessians.inverse_factor`)
    round_column  of (column number, Columns) -> the column's rounded values [out]; called once per column, in order
    update_block  False: errors reach later blocks only (BiLLM), so a block can be rounded as a whole

    Time: out · in² multiply-adds. Peak memory: three copies of weight.
    """
    weight = weight.clone()
    rounded = torch.empty_like(weight)
    columns = weight.shape[1]
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        local = factor[start:end, start:end]
        block = weight[
            :, start:end
        ].T.contiguous()  # [columns of the block, out]: a column is contiguous
        errors = torch.empty_like(block)
        view = Columns(weight, block.T, start)
        for i in range(end - start):
            values = round_column(start + i, view)
            rounded[:, start + i] = values
            errors[i] = (block[i] - values) / local[i, i]
            if update_block:
                # A product and a subtraction, not one fused step: the rounding of each update in the authors' code of GPTQ.
                block[i + 1 :] -= local[i, i + 1 :, None] * errors[i]
        weight[:, end:] -= errors.T @ factor[start:end, end:]
    return rounded


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
    errors = torch.zeros(
        columns, target.shape[0], dtype=target.dtype, device=target.device
    )  # (t - q)ᵀ
    rounded = torch.empty_like(target)
    for end in range(columns, 0, -block_size):
        start = max(0, end - block_size)
        shifted = (
            target[:, start:end].T + lower[end:, start:end].T @ errors[end:]
        )  # [columns of the block, out]
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
