"""Hadamard matrices: orthogonal, fast and slow products equal, all sizes of current models."""

from __future__ import annotations

import pytest
import torch

from harness.quantization.numerics import hadamard

SIZES = (1, 2, 4, 12, 16, 20, 24, 28, 36, 40, 52, 60, 64, 96, 108, 140, 148, 160, 344)


@pytest.mark.parametrize("size", SIZES)
def test_matrices_are_orthogonal_and_of_one_magnitude(size: int) -> None:
    h = hadamard.matrix(size)
    assert torch.allclose(h @ h.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(h.abs(), torch.full_like(h, size**-0.5), atol=1e-12)


@pytest.mark.parametrize(
    "size", (4096, 5120, 8192, 3584, 11008, 13824, 14336, 18944, 28672, 29568, 172 * 64)
)
def test_sizes_of_current_models_exist(size: int) -> None:
    assert hadamard.exists(size)


@pytest.mark.parametrize("size", (3, 6, 7, 172 // 4, 86))
def test_other_sizes_are_refused(size: int) -> None:
    assert not hadamard.exists(size)
    with pytest.raises(ValueError, match=str(size)):
        hadamard.matrix(size)


@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 24), -1), ((24, 4), 0), ((2, 12, 7), 1)])
def test_the_fast_product_is_the_product(shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (x.movedim(axis, -1) @ hadamard.matrix(shape[axis]).T).movedim(-1, axis)
    assert torch.allclose(hadamard.transform(x, axis), expected, atol=1e-12)


def test_narrow_types_are_computed_in_float32() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(hadamard.transform(x), hadamard.transform(x.float()).bfloat16())


def test_random_rotations_are_orthogonal_and_known_by_their_seed() -> None:
    one, again, other = (hadamard.random_hadamard(40, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.allclose(one.T @ one, torch.eye(40, dtype=torch.float64), atol=1e-12)
