"""Largest magnitudes of blocks as bitsandbytes stores them: float32, or 8-bit codes of their difference from their mean.

QLoRA (arXiv 2305.14314), §3, double quantization: the mean over the matrix is taken off, the rest is divided by its own largest
magnitude in blocks of 256, and the nearest entry of a signed 8-bit table for numbers of very unequal size is stored. Codes of the
weights are chosen by the exact maxima, as there; what is read back is used when they are dequantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

SECOND_BLOCK = 256  # block maxima that share one second-level scale
SMALLEST = 1e-38  # lower bound of a divisor: blocks of zeros stay zeros


def dynamic_table() -> Tensor:
    """The signed 8-bit table of bitsandbytes, [256] float32 ascending, for numbers of very unequal size.

    For i = 0 … 6, the midpoints of 2^i equal intervals of [0.1, 1] times 10^(i - 6), with both signs; and 0 and 1.
    """
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    values = torch.cat(positive)
    return torch.cat((-values, torch.tensor([0.0, 1.0]), values)).sort().values


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry of an ascending table [k] for each value, int64; a value exactly between two takes the lower."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2)


def check_block(formats: str, size: int) -> list[str]:
    """Reasons why bitsandbytes has no blocks of `size` weights; empty when it has."""
    if 32 <= size <= 4096 and not size & (size - 1):
        return []
    return [f"{formats} blocks are powers of two from 32 to 4096 weights, not group_size {size}"]


def unit_blocks(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """values [n] divided by the largest magnitude of their block, and these magnitudes [ceil(n / size)]; the last may be short."""
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % size)).reshape(-1, size)
    largest = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / largest.clamp(min=SMALLEST)).unsqueeze(1)).clamp_(-1, 1)
    return scaled.reshape(-1)[:count], largest


@dataclass(frozen=True)
class BlockMaxima:
    """One number per block, positive before it was stored.

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
        centred, scale = unit_blocks(values - offset, SECOND_BLOCK)
        return cls(
            None, nearest(centred, dynamic_table().to(values.device)).to(torch.uint8), scale, offset
        )

    def read(self) -> Tensor:
        """[blocks] float32"""
        if self.values is not None:
            return self.values
        assert self.codes is not None and self.scale is not None and self.offset is not None
        scale = self.scale.repeat_interleave(SECOND_BLOCK)[: self.codes.numel()]
        return dynamic_table().to(self.codes.device)[self.codes.long()] * scale + self.offset
