"""Packed codes: no gaps, and the same codes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.quantization.numerics.packing import pack, unpack


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 16), count=st.integers(0, 70), seed=st.integers(0, 1000))
def test_unpacking_gives_the_codes_back(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(
        0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.numel() == -(-count // 8) * bits
    assert torch.equal(unpack(packed, bits, count).to(torch.int32), codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_the_largest_code_survives_in_every_position(bits: int) -> None:
    for position in range(8):
        codes = torch.zeros(8, dtype=torch.int32)
        codes[position] = 2**bits - 1
        assert unpack(pack(codes, bits), bits, 8).tolist() == codes.tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_and_shape_packs_to_the_same_bytes(dtype: torch.dtype) -> None:
    codes = torch.arange(24).remainder(8)
    assert torch.equal(pack(codes.to(dtype).reshape(2, 3, 4), 3), pack(codes, 3))


def test_the_layout_is_little_endian_within_a_run() -> None:
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]), 3).tolist() == [1, 0, 0]
    assert pack(torch.tensor([0, 1, 0, 0, 0, 0, 0, 0]), 3).tolist() == [8, 0, 0]
    assert pack(torch.tensor([0, 0, 0, 0, 0, 0, 0, 7]), 3).tolist() == [0, 0, 0b11100000]
    assert pack(torch.tensor([3, 5]), 4).tolist() == [0x53, 0, 0, 0]
    assert pack(torch.tensor([0x1FF]), 9).tolist() == [0xFF, *[0] * 7, 1]
