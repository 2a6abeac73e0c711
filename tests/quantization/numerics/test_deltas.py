"""Differences from a base as they are stored: exact round trips, sizes, and singular vectors with canonical signs."""

from __future__ import annotations

import json

import pytest
import torch
from evidence import generator, planted_change, random_weight

from harness.core.errors import MethodError
from harness.quantization.numerics.deltas import (
    DeltaWeight,
    LowRankPart,
    LowRankWeight,
    SignWeight,
    singular_vectors,
)
from harness.quantization.numerics.weights import DenseWeight, QuantizedWeight, UniformWeight


def again(weight: QuantizedWeight) -> QuantizedWeight:
    tensors, meta = weight.pack()
    return QuantizedWeight.kinds[weight.kind].unpack(tensors, json.loads(json.dumps(meta)))


def test_a_difference_stores_itself_and_no_base() -> None:
    base, change = random_weight(24, 40), random_weight(24, 40, 1)
    weight = DeltaWeight(DenseWeight(change), base)
    assert torch.equal(weight.dequantize(), base + change)
    assert weight.stored_bytes == change.numel() * 4 and weight.bits_per_weight == 32
    read = again(weight)
    assert isinstance(read, DeltaWeight)
    with pytest.raises(MethodError, match="base that it must be added to"):
        read.dequantize()
    assert torch.equal(read.with_base(base).dequantize(), weight.dequantize())
    with pytest.raises(MethodError, match=r"base's matrix is \[40, 24\]"):
        read.with_base(base.T)


def test_signs_take_one_bit_and_a_scale() -> None:
    change = planted_change(20, 33)
    for alpha in (change.abs().mean().reshape(1), change.abs().mean(1)):
        weight = SignWeight(change >= 0, alpha)
        read = again(weight)
        assert torch.equal(read.dequantize(), weight.dequantize())
        expected = torch.where(change >= 0, 1.0, -1.0) * alpha[:, None]
        assert torch.equal(weight.dequantize(), expected)
        assert weight.stored_bytes == -(-20 * 33 // 8) + 4 * alpha.numel()


def test_low_rank_parts_of_several_widths_add_up() -> None:
    """A left factor with a short last group (k = 136 at groups of 128) keeps its columns' groups."""
    rows, columns, count = 9, 256, 136
    rng = generator(3)
    left = UniformWeight(
        torch.randint(0, 4, (rows, count), generator=rng, dtype=torch.uint8),
        torch.rand(rows, 2, generator=rng).half().float(),
        torch.full((rows, 2), 1.0),
        2,
        column_group=(torch.arange(count) // 128).to(torch.int32),
    )
    right = UniformWeight(
        torch.randint(0, 8, (count, columns), generator=rng, dtype=torch.uint8),
        torch.rand(count, 2, generator=rng).half().float(),
        None,
        3,
    )
    dense = LowRankPart(
        DenseWeight(torch.randn(rows, 2, generator=rng)),
        torch.tensor([2.0, 1.0]),
        DenseWeight(torch.randn(2, columns, generator=rng)),
    )
    sizes = torch.rand(count, generator=rng).bfloat16().float()
    weight = LowRankWeight((dense, LowRankPart(left, sizes, right)), (rows, columns))
    read = again(weight)
    assert isinstance(read, LowRankWeight) and read.rank == 138
    assert torch.equal(read.dequantize(), weight.dequantize())
    up, down = weight.factors()
    assert torch.allclose(up @ down, weight.dequantize(), atol=1e-4)
    assert sum(t.numel() * t.element_size() for t in weight.pack()[0].values()) == (
        weight.stored_bytes
    )
    assert again(DeltaWeight(weight)).shape == (rows, columns)


def test_no_part_is_a_matrix_of_zeros() -> None:
    weight = again(LowRankWeight((), (4, 6)))
    assert torch.equal(weight.dequantize(), torch.zeros(4, 6)) and weight.stored_bytes == 0


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_singular_vectors_have_canonical_signs(shape: tuple[int, int]) -> None:
    change = planted_change(*shape)
    left, sizes, right = singular_vectors(change)
    peaks = left.gather(0, left.abs().argmax(0)[None])[0]
    assert bool((peaks > 0).all()) and bool((sizes.diff() <= 0).all())
    assert torch.allclose((left * sizes) @ right.T, change, atol=5e-6)
    # flipping pairs of vectors of the matrix, as another library may, changes nothing
    mirrored = singular_vectors((left * sizes) @ right.T, 5)
    for one, other in zip((left[:, :5], right[:, :5]), mirrored[::2], strict=True):
        assert torch.allclose(one, other, atol=1e-3)


def test_a_sketch_finds_the_large_singular_values_and_is_always_the_same() -> None:
    change = planted_change(96, 80)
    exact = singular_vectors(change, 6)[1]
    first, second = (singular_vectors(change, 6, randomized=True) for _ in range(2))
    assert torch.allclose(first[1], exact, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
