"""Codes of 1 to 16 bits, packed without gaps: eight codes of b bits fill b bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1 in any integer dtype and shape -> bytes [ceil(n / 8) * bits] uint8, row-major.

    Code i of a run of eight occupies bits [i * bits, (i + 1) * bits) of the run, least significant first; the tail is
    padded with zeros. Widths above 8 are stored as their low bytes followed by their packed high parts.
    """
    flat = codes.reshape(-1)
    if bits > 8:
        return torch.cat((pack(flat & 0xFF, 8), pack(flat >> 8, bits - 8)))
    padding = -flat.numel() % 8
    flat = torch.nn.functional.pad(flat, (0, padding))
    if bits == 8:
        return flat.to(torch.uint8)
    runs = flat.reshape(-1, 8).to(torch.int64)
    word = torch.zeros(runs.shape[0], dtype=torch.int64, device=codes.device)
    for position in range(8):
        word |= runs[:, position] << (bits * position)
    return torch.stack([(word >> (8 * byte)) & 0xFF for byte in range(bits)], dim=1).to(torch.uint8).reshape(-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: the first `count` codes, [count] uint8 (int32 above 8 bits)."""
    if bits > 8:
        low_bytes = -(-count // 8) * 8
        high = unpack(packed[low_bytes:], bits - 8, count).to(torch.int32)
        return unpack(packed[:low_bytes], 8, count).to(torch.int32) | (high << 8)
    if bits == 8:
        return packed[:count]
    rows = packed.reshape(-1, bits).to(torch.int64)
    word = torch.zeros(rows.shape[0], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        word |= rows[:, byte] << (8 * byte)
    mask = (1 << bits) - 1
    codes = torch.stack([(word >> (bits * position)) & mask for position in range(8)], dim=1)
    return codes.to(torch.uint8).reshape(-1)[:count]
