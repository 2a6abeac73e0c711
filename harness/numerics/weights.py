"""A quantized weight matrix as it is stored: codes with what turns them back into numbers, all overheads counted.

Each layout is a `QuantizedWeight` with a `kind`, by which a checkpoint names it. `pack` gives exactly the tensors that go to
disk and `unpack` reads them back; `bits_per_weight` is their size. A method whose layout is not here defines its own subclass
in its method file; it registers itself when that file is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from harness.numerics.grids import SCALE_DTYPES, Grid
from harness.numerics.packing import pack, unpack


class QuantizedWeight(ABC):
    """A matrix [out, in] in some low-bit layout."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[QuantizedWeight]]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "kind" in cls.__dict__:
            QuantizedWeight.kinds[cls.kind] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)"""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The matrix in numbers, [out, in] float32."""

    @abstractmethod
    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is stored: contiguous tensors by name, and JSON values that are not worth a tensor."""

    @classmethod
    @abstractmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        """The inverse of `pack`, exact: unpack(*pack()).dequantize() has the same bits."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything `pack` stores."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.pack()[0].values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the number of weights: codes, scales, zero points, indices, outliers."""
        rows, columns = self.shape
        return 8 * self.stored_bytes / (rows * columns)


@dataclass(frozen=True)
class DenseWeight(QuantizedWeight):
    """The matrix in a floating dtype: layers that a method leaves alone. values: [out, in]."""

    kind = "dense"
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> Tensor:
        return self.values.float()

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"values": self.values.contiguous()}, {}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        return cls(tensors["values"])


@dataclass(frozen=True)
class UniformWeight(QuantizedWeight):
    """scale * (code - zero) on uniform grids, one grid per row and group of consecutive input channels.

    codes         [out, in] uint8, 0 .. 2^bits - 1
    scale         [out, groups] float32, exact in scale_dtype
    zero          [out, groups] float32, or None: 2^(bits-1) everywhere (symmetric). Stored as codes when all zeros are
                  integers of 0 .. 2^bits - 1, else in scale_dtype, or float32 where that would round them.
    column_group  [in] int32, the group of each column where groups are not consecutive (act-order); None: column // group size
    """

    kind = "uniform"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    scale_dtype: str = "float16"
    column_group: Tensor | None = None

    @classmethod
    def from_grid(cls, codes: Tensor, grid: Grid, *, symmetric: bool, scale_dtype: str) -> Self:
        """From codes [out, groups, g] (or [out, in] with one grid per row) and their Grid (scale [out, groups, 1] or [out, 1])."""
        rows = codes.shape[0]
        scale = grid.scale.reshape(rows, -1)
        zero = None if symmetric else grid.zero.reshape(rows, -1)
        return cls(codes.reshape(rows, -1).to(torch.uint8), scale, zero, grid.bits, scale_dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Input channels per group; the row length when there is one group."""
        return self.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        middle = 2 ** (self.bits - 1)
        if self.column_group is not None:
            index = self.column_group.long()
            zero = middle if self.zero is None else self.zero[:, index]
            return self.scale[:, index] * (self.codes.float() - zero)
        groups = self.codes.float().reshape(rows, self.scale.shape[1], -1)
        centred = groups - (middle if self.zero is None else self.zero.unsqueeze(-1))
        return (self.scale.unsqueeze(-1) * centred).reshape(rows, columns)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        target = SCALE_DTYPES[self.scale_dtype]
        tensors = {"codes": pack(self.codes, self.bits), "scale": self.scale.to(target).contiguous()}
        meta: dict[str, Any] = {"shape": list(self.shape), "bits": self.bits, "scale_dtype": self.scale_dtype, "zero": "none"}
        if self.zero is not None:
            if bool(((self.zero == self.zero.round()) & (self.zero >= 0) & (self.zero < 2**self.bits)).all()):
                tensors["zero"], meta["zero"] = pack(self.zero.to(torch.uint8), self.bits), "codes"
            else:
                exact = torch.equal(self.zero.to(target).float(), self.zero)
                tensors["zero"], meta["zero"] = self.zero.to(target if exact else torch.float32).contiguous(), "float"
        if self.column_group is not None:
            few = self.scale.shape[1] <= 256
            tensors["column_group"] = self.column_group.to(torch.uint8 if few else torch.int16)
        return tensors, meta

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        bits, scale = meta["bits"], tensors["scale"].float()
        zero: Tensor | None = None
        if meta["zero"] == "codes":
            zero = unpack(tensors["zero"], bits, scale.numel()).float().reshape(scale.shape)
        elif meta["zero"] == "float":
            zero = tensors["zero"].float()
        group = tensors.get("column_group")
        codes = unpack(tensors["codes"], bits, rows * columns).reshape(rows, columns)
        return cls(codes, scale, zero, bits, meta["scale_dtype"], None if group is None else group.to(torch.int32))
