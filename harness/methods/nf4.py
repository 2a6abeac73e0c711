"""NF4 and FP4 as bitsandbytes stores them: 4-bit codes into a table, scaled by the largest magnitude of each flat block.

QLoRA: Efficient Finetuning of Quantized LLMs (arXiv 2305.14314), §3; the layout of bitsandbytes.
Objective: equally many weights per code when a block is normally distributed: NF4's table are 16 quantiles of the normal; FP4's are
a sign and 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1. For a block of B consecutive weights of the
row-major matrix, with A = max|w|: q = nearest entry of the table to w / A, w' = table[q] · A (eqs. 1–4).
Double quantization (§3, eqs. 5–6): A less its mean over the matrix is stored in 8 bits, itself in blocks of 256.

Blocks run over the flattened matrix: where B does not divide the rows they cross from one to the next, unlike groups.
(The roundings rtn, gptq and awq take the same tables with groups within rows and scales of any type.)
As in bitsandbytes: A and the second-level constants are float32 whatever scale_dtype says; two codes per byte, the first in the
high half; a matrix of odd size ends with the code of zero. Where we differ: the last, short block multiplies by 1 / A as all
others do (bitsandbytes' CPU path divides there, its CUDA kernel multiplies); zeros of FP4 have one code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor

from harness.errors import MethodError
from harness.methods.protocols import Evidence, LinearShape, Scheme, Shapes, WeightScheme, refusals
from harness.numerics.codebooks import dynamic_table, nearest
from harness.numerics.grids import decode, encode
from harness.numerics.number_formats import FORMATS
from harness.numerics.weights import QuantizedWeight

SECOND_BLOCK = 256                              # block maxima that share one second-level scale
FLAT_FORMATS = ("nf4", "fp4")


@dataclass(frozen=True)
class BlockMaxima:
    """One positive number per block, as stored.

    values  [blocks] float32, or None when they are double quantized:
    codes   [blocks] uint8 into `dynamic_table`, with scale [ceil(blocks / 256)] and offset [1] float32
    """

    values: Tensor | None
    codes: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def double_quantized(cls, values: Tensor) -> Self:
        """8-bit codes of values [blocks] less their mean."""
        offset = values.mean().reshape(1)
        centred, scale = _unit_blocks(values - offset, SECOND_BLOCK)
        return cls(None, nearest(centred, dynamic_table().to(values.device)).to(torch.uint8), scale, offset)

    def read(self) -> Tensor:
        """[blocks] float32"""
        if self.values is not None:
            return self.values
        assert self.codes is not None and self.scale is not None and self.offset is not None
        scale = self.scale.repeat_interleave(SECOND_BLOCK)[: self.codes.numel()]
        return dynamic_table().to(self.codes.device)[self.codes.long()] * scale + self.offset


@dataclass(frozen=True)
class NormalFloatWeight(QuantizedWeight):
    """table[code] · A over blocks of the flattened matrix.   codes: [out, in] uint8, 0 … 15; format: nf4 or fp4."""

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
        both = torch.stack((tensors["codes"] >> 4, tensors["codes"] & 15), dim=1).reshape(-1)[: rows * columns]
        maxima = BlockMaxima(*(tensors.get(f"maxima_{name}") for name in ("values", "codes", "scale", "offset")))
        return cls(both.reshape(rows, columns), maxima, meta["block"], meta.get("format", "nf4"))


class Rounding:
    """Nearest entry of the table."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """double_quantization: store the block maxima in 8 bits (QLoRA's recipe; off in the library)."""

        double_quantization: bool = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Format nf4 or fp4, 4 bits, blocks of 32 to 4096 weights in powers of two."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.format not in FLAT_FORMATS:
                yield f'format "{weight.format}" is not NF4 or FP4; use scheme.weight.format=nf4 or fp4'
            if weight.bits != 4:
                yield f"NF4 and FP4 have 4 bits, not {weight.bits:g}"
            size = weight.group_size
            if not 32 <= size <= 4096 or size & (size - 1):
                yield f"NF4 and FP4 blocks are powers of two from 32 to 4096 weights, not group_size {size}"

        return refusals(scheme, shapes, reasons)

    def round_layer(
        self, name: str, weight: Tensor, evidence: Evidence | None, scheme: WeightScheme, rng: Generator
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: three copies of weight."""
        if not bool(torch.isfinite(weight).all()):
            raise MethodError(f"{name}: the weight holds NaN or infinity; the model itself is damaged")
        scaled, values = _unit_blocks(weight.reshape(-1), scheme.group_size)
        codes = encode(scaled, FORMATS[scheme.format].element).reshape(weight.shape)
        maxima = BlockMaxima.double_quantized(values) if self.settings.double_quantization else BlockMaxima(values)
        return NormalFloatWeight(codes, maxima, scheme.group_size, scheme.format)


def _unit_blocks(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """values [n] divided by the largest magnitude of their block, and these magnitudes [ceil(n / size)]; the last may be short."""
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % size)).reshape(-1, size)
    largest = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1)
    return scaled.reshape(-1)[:count], largest
