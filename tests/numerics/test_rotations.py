"""Butterfly rotations: orthogonal, undone exactly, one seed one matrix."""

from __future__ import annotations

import pytest
import torch

from harness.numerics.rotations import Butterfly, split


@pytest.mark.parametrize(("size", "factors"), [(4096, (64, 64)), (11008, (688, 16)), (7, (7, 1)), (96, (8, 12)), (1, (1, 1))])
def test_split(size: int, factors: tuple[int, int]) -> None:
    assert split(size) == factors and factors[0] * factors[1] == size


@pytest.mark.parametrize("size", [2, 7, 32, 96, 160])
def test_orthogonal_with_determinant_one_up_to_permutations(size: int) -> None:
    rotation = Butterfly.from_seed(size, 3)
    matrix = rotation.apply(torch.eye(size, dtype=torch.float64)).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation.columns.double()), torch.ones(rotation.columns.shape[0]).double())


@pytest.mark.parametrize("size", [2, 7, 32, 96])
def test_undo_is_the_inverse_and_the_transpose(size: int) -> None:
    rotation = Butterfly.from_seed(size, 5)
    values = torch.randn(3, 4, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.undo(rotation.apply(values)), values, atol=1e-5, rtol=1e-5)
    eye = torch.eye(size)
    torch.testing.assert_close(rotation.undo(eye), rotation.apply(eye).T, atol=1e-6, rtol=0)


def test_a_seed_is_a_matrix() -> None:
    one, same, other = (Butterfly.from_seed(48, seed) for seed in (1, 1, 2))
    assert torch.equal(one.columns, same.columns) and torch.equal(one.first, same.first)
    assert not torch.equal(one.columns, other.columns)


def test_the_stream_does_not_drift() -> None:
    """Stored checkpoints hold seeds, so these numbers may never change."""
    rotation = Butterfly.from_seed(12, 2024)
    assert rotation.first.tolist() == GOLDEN_FIRST
    torch.testing.assert_close(rotation.columns[0, 0], torch.tensor(GOLDEN_ROW), atol=1e-6, rtol=0)


GOLDEN_FIRST = [2, 0, 11, 6, 7, 8, 1, 5, 10, 3, 4, 9]
GOLDEN_ROW = [-0.01893169, 0.32618031, -0.26163849, 0.18357648, -0.88541746, -0.08443301]
