"""A pruned matrix as it is stored: which weights are kept, and the kept ones in the layout of a dense matrix."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from harness.core.number_formats import FORMATS
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import (
    DenseWeight,
    ElementWeight,
    NormalFloatWeight,
    QuantizedWeight,
    UniformWeight,
)

Survivors = DenseWeight | UniformWeight | ElementWeight | NormalFloatWeight


@dataclass(frozen=True)
class SparseWeight(QuantizedWeight):
    """The mask at one bit per weight, and the codes or values of the kept weights alone, row by row.

    mask       [out, in] bool, True where a weight is kept. It says what is stored: a kept weight may round to 0
    survivors  the matrix in a dense layout; what it holds at pruned places is neither read nor stored
    pattern    "2:4": that many of every so many neighbouring inputs are kept, in every row; "" where nothing is promised

    Two bits per kept weight name its place among four, which is one bit per weight too: patterns need no other layout.
    """

    kind: ClassVar[str] = "sparse"
    mask: Tensor
    survivors: Survivors
    pattern: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def contained(self) -> tuple[QuantizedWeight, ...]:
        return (self.survivors,)

    @property
    def density(self) -> float:
        """The share of weights that are kept."""
        return float(self.mask.float().mean())

    def dequantize(self) -> Tensor:
        return torch.where(self.mask, self.survivors.dequantize(), 0.0)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.pattern:
            kept, of = map(int, self.pattern.split(":"))
            counts = self.mask.reshape(self.shape[0], -1, of).sum(-1)
            assert bool((counts == kept).all()), f"the mask is not {self.pattern}"
        name = _codes_of(self.survivors)
        tensors, meta = self.survivors.pack()
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        if isinstance(self.survivors, DenseWeight):
            kept_values, bits = self.survivors.values[self.mask], 0
        else:
            bits = _bits_of(self.survivors)
            kept_values = pack(self.survivors.codes[self.mask], bits)
        packed = {"mask": pack(self.mask, 1), "kept": kept_values.contiguous(), **others}
        return packed, {
            "shape": list(self.shape),
            "pattern": self.pattern,
            "layout": self.survivors.kind,
            "bits": bits,
            "of_layout": meta,
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        kept, bits = tensors["kept"], meta["bits"]
        mask = unpack(tensors["mask"], 1, rows * columns).reshape(rows, columns).bool()
        others = {name: t for name, t in tensors.items() if name not in ("mask", "kept")}
        survivors: Survivors
        if meta["layout"] == DenseWeight.kind:
            values = torch.zeros(rows, columns, dtype=kept.dtype, device=kept.device)
            values[mask] = kept
            survivors = DenseWeight(values)
        else:
            codes = torch.zeros(rows, columns, dtype=torch.uint8, device=kept.device)
            codes[mask] = unpack(kept, bits, int(mask.sum()))
            # its own `unpack` reads everything but the codes, whose places are empty here
            empty = torch.zeros(
                -(-rows * columns // 8) * bits, dtype=torch.uint8, device=kept.device
            )
            layout: Any = QuantizedWeight.kinds[meta["layout"]]
            read = layout.unpack({**others, "codes": empty}, meta["of_layout"])
            survivors = dataclasses.replace(read, codes=codes)
        return cls(mask, survivors, meta["pattern"])


def _codes_of(survivors: Survivors) -> str:
    return "values" if isinstance(survivors, DenseWeight) else "codes"


def _bits_of(survivors: UniformWeight | ElementWeight | NormalFloatWeight) -> int:
    return (
        survivors.bits
        if isinstance(survivors, UniformWeight)
        else FORMATS[survivors.format].element.bits
    )


def is_unrounded(weight: QuantizedWeight) -> bool:
    """Whether a matrix holds plain numbers, with zeros where it is pruned: an ordinary weight for any library."""
    return isinstance(weight, DenseWeight) or (
        isinstance(weight, SparseWeight) and isinstance(weight.survivors, DenseWeight)
    )
