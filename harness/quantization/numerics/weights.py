"""A quantized weight matrix as it is stored: codes and all that dequantizes them, with every overhead counted.

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

from harness.core.cell import WeightScheme
from harness.core.number_formats import DOUBLE_QUANTIZED, FORMATS
from harness.quantization.numerics.block_maxima import BlockMaxima
from harness.quantization.numerics.grids import (
    SCALE_DTYPES,
    Grid,
    decode,
    pack_scales,
    unpack_scales,
)
from harness.quantization.numerics.packing import pack, unpack


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

    def beside_outliers(self) -> Tensor | None:
        """The matrix [out, in] float32 that outlier channels of the activations multiply (`outlier_threshold`); None where that is
        the dequantized matrix."""
        return None

    @abstractmethod
    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The stored form: contiguous tensors by name, and JSON values for everything small."""

    @classmethod
    @abstractmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        """The inverse of `pack`, exact: unpack(*pack()).dequantize() has the same bits."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths in bits at which this layout can be read; empty for a layout of one width."""
        return ()

    def at(self, bits: float) -> QuantizedWeight:
        """The matrix at one of its widths; itself where it has one width only."""
        return self

    @property
    def contained(self) -> tuple[QuantizedWeight, ...]:
        """Matrices in layouts of their own that this one holds."""
        return ()

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
    """The matrix in a floating dtype: layers that a method does not quantize. values: [out, in]."""

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
    tensor_scale  [1] float32 where scale_dtype is float8_e4m3: scale is an E4M3 number times it
    """

    kind = "uniform"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    scale_dtype: str = "float16"
    column_group: Tensor | None = None
    tensor_scale: Tensor | None = None

    @classmethod
    def from_grid(cls, codes: Tensor, grid: Grid, *, symmetric: bool, scale_dtype: str) -> Self:
        """From codes [out, groups, g] (or [out, in] with one grid per row) and their Grid (scale [out, groups, 1] or [out, 1])."""
        rows = codes.shape[0]
        scale = grid.scale.reshape(rows, -1)
        zero = None if symmetric else grid.zero.reshape(rows, -1)
        return cls(
            codes.reshape(rows, -1).to(torch.uint8),
            scale,
            zero,
            grid.bits,
            scale_dtype,
            tensor_scale=grid.tensor_scale,
        )

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
        # of zero points that are not codes
        target = SCALE_DTYPES.get(self.scale_dtype, torch.float16)
        tensors = {
            "codes": pack(self.codes, self.bits),
            **pack_scales(self.scale, self.scale_dtype, self.tensor_scale),
        }
        meta: dict[str, Any] = {
            "shape": list(self.shape),
            "bits": self.bits,
            "scale_dtype": self.scale_dtype,
            "zero": "none",
        }
        if self.zero is not None:
            if bool(
                (
                    (self.zero == self.zero.round()) & (self.zero >= 0) & (self.zero < 2**self.bits)
                ).all()
            ):
                tensors["zero"], meta["zero"] = pack(self.zero.to(torch.uint8), self.bits), "codes"
            else:
                exact = torch.equal(self.zero.to(target).float(), self.zero)
                tensors["zero"], meta["zero"] = (
                    self.zero.to(target if exact else torch.float32).contiguous(),
                    "float",
                )
        if self.column_group is not None:
            tensors["column_group"] = _narrow(self.column_group, self.scale.shape[1])
        return tensors, meta

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        bits, scale = meta["bits"], unpack_scales(tensors, meta["scale_dtype"])
        zero: Tensor | None = None
        if meta["zero"] == "codes":
            zero = unpack(tensors["zero"], bits, scale.numel()).float().reshape(scale.shape)
        elif meta["zero"] == "float":
            zero = tensors["zero"].float()
        group = tensors.get("column_group")
        codes = unpack(tensors["codes"], bits, rows * columns).reshape(rows, columns)
        column_group = None if group is None else group.to(torch.int32)
        return cls(
            codes, scale, zero, bits, meta["scale_dtype"], column_group, tensors.get("tensor_scale")
        )


@dataclass(frozen=True)
class ElementWeight(QuantizedWeight):
    """scale * element(code) in a format of `number_formats`, one scale per row and group of consecutive input channels.

    codes         [out, in] uint8, the format's own codes: sign in the highest bit of floats, two's complement in mxint8
    scale         [out, groups] float32, exact in scale_dtype
    tensor_scale, column_group as in UniformWeight
    """

    kind = "element"
    codes: Tensor
    scale: Tensor
    format: str
    scale_dtype: str = "float16"
    column_group: Tensor | None = None
    tensor_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Input channels per group; the row length when there is one group."""
        return self.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        values = decode(self.codes, FORMATS[self.format].element)
        if self.column_group is not None:
            return self.scale[:, self.column_group.long()] * values
        return (self.scale.unsqueeze(-1) * values.reshape(*self.scale.shape, -1)).reshape(
            self.shape
        )

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"codes": pack(self.codes, FORMATS[self.format].bits)}
        tensors |= pack_scales(self.scale, self.scale_dtype, self.tensor_scale)
        if self.column_group is not None:
            tensors["column_group"] = _narrow(self.column_group, self.scale.shape[1])
        return tensors, {
            "shape": list(self.shape),
            "format": self.format,
            "scale_dtype": self.scale_dtype,
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        codes = unpack(tensors["codes"], FORMATS[meta["format"]].bits, rows * columns).reshape(
            rows, columns
        )
        scale = unpack_scales(tensors, meta["scale_dtype"])
        group = tensors.get("column_group")
        column_group = None if group is None else group.to(torch.int32)
        return cls(
            codes,
            scale,
            meta["format"],
            meta["scale_dtype"],
            column_group,
            tensors.get("tensor_scale"),
        )


@dataclass(frozen=True)
class NormalFloatWeight(QuantizedWeight):
    """table[code] · A over blocks of the flattened matrix, in the layout of bitsandbytes.

    codes   [out, in] uint8, 0 … 15; two in a byte, the first in the high half
    maxima  A of each block   block: weights per block, which runs on from row to row
    format  nf4 or fp4
    """

    kind = "nf4"
    codes: Tensor
    maxima: BlockMaxima
    block: int
    format: str = "nf4"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        scale = self.maxima.read().repeat_interleave(self.block)[: self.codes.numel()]
        return decode(self.codes, FORMATS[self.format].element) * scale.reshape(self.codes.shape)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        flat = self.codes.reshape(-1)
        zero = FORMATS[self.format].element.values.index(0.0)
        flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2), value=zero)
        tensors = {"codes": (flat[::2] << 4) | flat[1::2]}
        for name in ("values", "codes", "scale", "offset"):
            part = getattr(self.maxima, name)
            if part is not None:
                tensors[f"maxima_{name}"] = part.contiguous()
        return tensors, {"shape": list(self.shape), "block": self.block, "format": self.format}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        both = torch.stack((tensors["codes"] >> 4, tensors["codes"] & 15), dim=1).reshape(-1)[
            : rows * columns
        ]
        maxima = BlockMaxima(
            *(tensors.get(f"maxima_{name}") for name in ("values", "codes", "scale", "offset"))
        )
        return cls(both.reshape(rows, columns), maxima, meta["block"], meta.get("format", "nf4"))


def on_grid(
    codes: Tensor, grid: Grid, scheme: WeightScheme, column_group: Tensor | None = None
) -> UniformWeight | ElementWeight | NormalFloatWeight:
    """The layout of codes [out, groups, g] or [out, in] on a grid with scale [out, groups, 1] or [out, groups].

    Groups within rows are blocks of the flattened matrix, so double_quantized scales are stored as bitsandbytes stores them.
    """
    rows = codes.shape[0]
    flat, scale = codes.reshape(rows, -1).to(torch.uint8), grid.scale.reshape(rows, -1)
    if scheme.scale_dtype == DOUBLE_QUANTIZED:
        assert column_group is None, (
            "groups of columns that are not neighbours are no blocks of this layout"
        )
        maxima = BlockMaxima.double_quantized(scale.reshape(-1))
        return NormalFloatWeight(flat, maxima, flat.shape[1] // scale.shape[1], scheme.format)
    if grid.element is not None:
        return ElementWeight(
            flat, scale, scheme.format, scheme.scale_dtype, column_group, grid.tensor_scale
        )
    zero = None if scheme.symmetric else grid.zero.reshape(rows, -1)
    return UniformWeight(
        flat, scale, zero, grid.bits, scheme.scale_dtype, column_group, grid.tensor_scale
    )


def _narrow(column_group: Tensor, groups: int) -> Tensor:
    return column_group.to(torch.uint8 if groups <= 256 else torch.int16)
