"""A matrix rounded column by column on grids per channel or per group: what GPTQ and its relatives do once they have a factor."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from harness.core.cell import WeightScheme
from harness.quantization.numerics.error_feedback import (
    Columns,
    Correction,
    GridColumns,
    round_on_grids,
)
from harness.quantization.numerics.grids import Fitting
from harness.quantization.numerics.hessians import Factor
from harness.quantization.numerics.weights import QuantizedWeight, on_grid


def round_matrix(
    weight: Tensor,
    factor: Factor,
    scheme: WeightScheme,
    fitting: Fitting,
    *,
    block_size: int,
    static_groups: bool,
    fitted_on: Tensor | None = None,
    correction: Correction | None = None,
) -> QuantizedWeight:
    """The matrix [out, in] float32 rounded column by column, errors fed forward through the factor.

    static_groups  grids of all groups are fitted before the first column is rounded; else each on the weights as they are at the
                   start of its block, groups being runs of columns in the order of rounding
    fitted_on      the matrix [out, in] that static groups, or the grids per channel, are fitted on; None: weight itself
    correction     in the order of rounding

    One grid per channel is fitted before dead columns become 0, grids of groups after.
    """
    rows, columns = weight.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    # the last one is short where a factor of a difference ends (Delta-CoMe)
    groups = -(-columns // size)
    order = factor.order
    dynamic = scheme.group_size != -1 and not static_groups
    source = weight if fitted_on is None else fitted_on

    # holds all grids; one per channel: the grid itself
    form = fitting.fit(source if scheme.group_size == -1 else source[:, :size])
    w = weight.masked_fill(factor.dead, 0)
    scale = torch.empty(groups, rows, dtype=torch.float32, device=w.device)
    zero = torch.empty_like(scale)
    if scheme.group_size == -1:
        scale[0], zero[0] = form.scale[:, 0], form.zero[:, 0]
    elif not dynamic:
        grid = fitting.fit(source.masked_fill(factor.dead, 0).reshape(rows, groups, size))
        scale.copy_(grid.scale[..., 0].T)
        zero.copy_(grid.zero[..., 0].T)
    if order is not None:
        w = w[:, order]
    # The group of each column, in the order of rounding; a list, so that no column waits for the device.
    positions = torch.arange(columns, device=w.device) if order is None or dynamic else order
    group_of = (positions // size).tolist()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=w.device)

    def fit_groups(matrix: Columns) -> None:
        """Fit all groups that begin in this block."""
        first, last = -(-matrix.start // size), -(-(matrix.start + matrix.block.shape[1]) // size)
        full = max(first, min(last, columns // size))
        for begin, end in ((first, full), (full, last)):  # whole groups, and a short last one
            if begin < end:
                values = matrix.weight[:, begin * size : end * size]
                grid = fitting.fit(values.reshape(rows, end - begin, -1))
                scale[begin:end], zero[begin:end] = grid.scale[..., 0].T, grid.zero[..., 0].T

    round_on_grids(
        w,
        factor.upper,
        GridColumns(form, scale, zero, group_of, codes, fit_groups if dynamic else None),
        block_size=block_size,
        correction=correction,
    )

    column_group = None
    if order is None:
        codes = codes.T.contiguous()
    else:
        restored = torch.empty_like(codes)
        restored[order] = codes
        codes = restored.T.contiguous()
        if dynamic and groups > 1:
            column_group = torch.empty(columns, dtype=torch.int32, device=w.device)
            column_group[order] = (torch.arange(columns, device=w.device) // size).to(torch.int32)
    if columns % size and groups > 1 and column_group is None:
        column_group = (torch.arange(columns, device=w.device) // size).to(torch.int32)
    held = dataclasses.replace(form, scale=scale.T.contiguous(), zero=zero.T.contiguous())
    return on_grid(codes, held, scheme, column_group)
