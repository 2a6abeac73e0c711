"""Stored weights: packing is exact, sizes count every overhead."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.quantization.numerics import grids
from harness.quantization.numerics.weights import DenseWeight, QuantizedWeight, UniformWeight


def uniform(
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    convention: str = "gptq",
    seed: int = 0,
    shift: float = 0.0,
) -> UniformWeight:
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(seed)) + shift
    grouped = weight.reshape(8, -1, group_size)
    grid = grids.fit(grouped, bits, symmetric, convention, scale_dtype)
    return UniformWeight.from_grid(
        grid.quantize(grouped), grid, symmetric=symmetric, scale_dtype=scale_dtype
    )


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from([8, 16, 48]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    convention=st.sampled_from(["gptq", "awq", "omniquant"]),
    shift=st.sampled_from([0.0, 6.0]),
    seed=st.integers(0, 100),
)
def test_uniform_weights_come_back_bit_for_bit(
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    convention: str,
    shift: float,
    seed: int,
) -> None:
    weight = uniform(bits, group_size, symmetric, scale_dtype, convention, seed, shift)
    again = UniformWeight.unpack(*weight.pack())
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert torch.equal(again.codes, weight.codes)
    assert (again.shape, again.bits, again.group_size, again.scale_dtype) == (
        (8, 48),
        bits,
        group_size,
        scale_dtype,
    )


@pytest.mark.parametrize("columns_per_group", [1, 4])
@pytest.mark.parametrize("groups", [2, 300])
def test_the_index_of_scattered_groups_comes_back(groups: int, columns_per_group: int) -> None:
    rng = torch.Generator().manual_seed(0)
    columns = groups * columns_per_group
    index = torch.randperm(columns, generator=rng).to(torch.int32) // columns_per_group
    scale = torch.rand(3, groups, generator=rng).half().float() + 0.5
    codes = torch.randint(0, 16, (3, columns), generator=rng, dtype=torch.uint8)
    weight = UniformWeight(
        codes, scale.half().float(), torch.full_like(scale, 7), 4, "float16", index
    )
    again = UniformWeight.unpack(*weight.pack())
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert torch.equal(weight.dequantize(), weight.scale[:, index.long()] * (codes.float() - 7))


def test_dequantizing_is_scale_times_code_less_zero() -> None:
    weight = uniform(4, 16, False, "float32")
    assert weight.zero is not None
    expected = weight.scale.repeat_interleave(16, 1) * (
        weight.codes.float() - weight.zero.repeat_interleave(16, 1)
    )
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize(
    ("symmetric", "scale_dtype", "bits_per_weight"),
    [
        (True, "float16", 4 + 16 / 16),
        (False, "float16", 4 + (16 + 4) / 16),
        (False, "float32", 4 + (32 + 4) / 16),
    ],
)
def test_bits_per_weight_count_scales_and_zeros(
    symmetric: bool, scale_dtype: str, bits_per_weight: float
) -> None:
    assert uniform(4, 16, symmetric, scale_dtype).bits_per_weight == bits_per_weight


def test_zeros_outside_the_codes_are_stored_as_numbers() -> None:
    weight = uniform(4, 16, False, "float16", "omniquant", shift=50.0)
    tensors, meta = weight.pack()
    assert meta["zero"] == "float" and tensors["zero"].dtype in (torch.float16, torch.float32)
    assert torch.equal(UniformWeight.unpack(tensors, meta).dequantize(), weight.dequantize())


def test_dense_weights_keep_their_type() -> None:
    weight = DenseWeight(torch.randn(4, 6).to(torch.bfloat16))
    again = DenseWeight.unpack(*weight.pack())
    assert again.values.dtype == torch.bfloat16 and torch.equal(again.values, weight.values)
    assert (
        weight.bits_per_weight == 16
        and weight.shape == (4, 6)
        and weight.dequantize().dtype == torch.float32
    )


def test_a_layout_registers_itself_by_its_kind() -> None:
    assert QuantizedWeight.kinds["uniform"] is UniformWeight
    assert QuantizedWeight.kinds["dense"] is DenseWeight
