"""A few entries of a matrix that are stored besides its codes, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored
from harness.quantization.numerics.packing import pack, unpack


@dataclass(frozen=True)
class Outliers:
    """Entries of a matrix [out, in] in compressed rows: row r holds entries row_start[r] … row_start[r + 1] - 1.

    row_start  [out + 1] int32
    columns    [entries] int64, stored in 16 bits (32 where the matrix is wider)
    values     [entries] float32, exact in dtype
    """

    row_start: Tensor
    columns: Tensor
    values: Tensor
    width: int  # in
    dtype: str = "float16"

    @classmethod
    def where(cls, mask: Tensor, values: Tensor, dtype: str) -> Self:
        """The entries of values [out, in] that mask [out, in] marks, as they can be stored in dtype."""
        counts = mask.sum(1)
        row_start = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
        return cls(
            row_start, mask.nonzero()[:, 1], as_stored(values[mask], dtype), mask.shape[1], dtype
        )

    @property
    def rows(self) -> Tensor:
        """[entries] int64"""
        counts = self.row_start.diff().long()
        return torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)

    def put_into(self, matrix: Tensor) -> Tensor:
        """Overwrite the entries in matrix [out, in], in place; returns it."""
        matrix[self.rows, self.columns] = self.values
        return matrix

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        columns = pack(self.columns, 16) if self.width <= 2**16 else self.columns.to(torch.int32)
        tensors = {
            "row_start": self.row_start,
            "columns": columns,
            "values": self.values.to(SCALE_DTYPES[self.dtype]),
        }
        return tensors, {"width": self.width, "dtype": self.dtype}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        values = tensors["values"].float()
        columns = tensors["columns"]
        columns = unpack(columns, 16, values.numel()) if meta["width"] <= 2**16 else columns
        return cls(tensors["row_start"], columns.long(), values, meta["width"], meta["dtype"])
