"""Codes of 1 to 16 bits, packed without gaps: eight codes of b bits fill b bytes.

Eight codes, one per byte, are one 64-bit word. Three steps close the gaps: between the two codes of every 16 bits, between the
two pairs of every 32, between the two halves; unpacking opens them again. Words are little-endian, as on every CPU and GPU
that torch runs on.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES_16 = 0x0001_0001_0001_0001  # one bit at the foot of each 16-bit lane; times a mask: that mask in every lane
LANES_32 = 0x0000_0001_0000_0001


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1 in any integer dtype and shape -> bytes [ceil(n / 8) * bits] uint8, row-major.

    Code i of a run of eight occupies bits [i * bits, (i + 1) * bits) of the run, least significant first; the tail is
    padded with zeros. Widths above 8 are stored as their low bytes followed by their packed high parts.
    """
    flat = codes.reshape(-1)
    if bits > 8:
        return torch.cat((pack(flat & 0xFF, 8), pack(flat >> 8, bits - 8)))
    count = flat.numel()
    padded = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8, device=codes.device)
    padded[:count] = flat
    if bits == 8:
        return padded
    word = padded.view(torch.int64)
    _merge(word, 0xFF * LANES_16, 8 - bits, (2**bits - 1 << bits) * LANES_16)
    _merge(word, 0xFFFF * LANES_32, 16 - 2 * bits, (2 ** (2 * bits) - 1 << 2 * bits) * LANES_32)
    _merge(word, 0xFFFF_FFFF, 32 - 4 * bits, 2 ** (4 * bits) - 1 << 4 * bits)
    return word.view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1).contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: the first `count` codes, [count] uint8 (int32 above 8 bits)."""
    if bits > 8:
        low_bytes = -(-count // 8) * 8
        high = unpack(packed[low_bytes:], bits - 8, count).to(torch.int32)
        return unpack(packed[:low_bytes], 8, count).to(torch.int32) | (high << 8)
    if bits == 8:
        return packed[:count]
    runs = packed.reshape(-1, bits)
    padded = torch.zeros(runs.shape[0], 8, dtype=torch.uint8, device=packed.device)
    padded[:, :bits] = runs
    word = padded.view(-1).view(torch.int64)
    _part(word, 2 ** (4 * bits) - 1, 4 * bits, 32)
    _part(word, (2 ** (2 * bits) - 1) * LANES_32, 2 * bits, 16)
    _part(word, (2**bits - 1) * LANES_16, bits, 8)
    return word.view(torch.uint8)[:count]


def _merge(word: Tensor, keep: int, shift: int, moved: int) -> None:
    """word = (word & keep) | ((word >> shift) & moved), in place."""
    high = (word >> shift).bitwise_and_(moved)
    word.bitwise_and_(keep).bitwise_or_(high)


def _part(word: Tensor, keep: int, shift: int, apart: int) -> None:
    """word = (word & keep) | (((word >> shift) & keep) << apart), in place."""
    high = (word >> shift).bitwise_and_(keep).bitwise_left_shift_(apart)
    word.bitwise_and_(keep).bitwise_or_(high)
