"""Butterfly rotations: orthogonal, undone exactly, one seed one matrix; and the step of learned ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from harness.quantization.numerics.rotations import Butterfly, cayley_step, split


@pytest.mark.parametrize(
    ("size", "factors"),
    [(4096, (64, 64)), (11008, (688, 16)), (7, (7, 1)), (96, (8, 12)), (1, (1, 1))],
)
def test_split(size: int, factors: tuple[int, int]) -> None:
    assert split(size) == factors and factors[0] * factors[1] == size


@pytest.mark.parametrize("size", [2, 7, 32, 96, 160])
def test_orthogonal_with_determinant_one_up_to_permutations(size: int) -> None:
    rotation = Butterfly.from_seed(size, 3)
    matrix = rotation.apply(torch.eye(size, dtype=torch.float64)).T
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        torch.linalg.det(rotation.columns.double()), torch.ones(rotation.columns.shape[0]).double()
    )


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


def test_a_cayley_step_stays_orthogonal_and_descends() -> None:
    """Towards a target rotation, whose distance is a smooth loss; 300 steps do not drift from the manifold."""
    rng = torch.Generator().manual_seed(0)
    first, target = (
        torch.linalg.qr(torch.randn(24, 24, generator=rng, dtype=torch.float64))[0]
        for _ in range(2)
    )
    target[:, 0] *= torch.linalg.det(target) * torch.linalg.det(first)  # a path leads there
    rotation, distances = first, []
    for _ in range(300):
        distances.append(float((rotation - target).square().sum()))
        rotation = cayley_step(rotation, 2 * (rotation - target), 0.5)
        assert torch.allclose(
            rotation.T @ rotation, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12
        )
    assert all(after < before + 1e-9 for before, after in itertools.pairwise(distances))
    assert distances[-1] < 0.3 * distances[0]


def test_a_gradient_that_leaves_the_rotations_alone_moves_nothing() -> None:
    """R S with S symmetric points straight off the manifold."""
    rng = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64))[0]
    symmetric = torch.randn(8, 8, generator=rng, dtype=torch.float64)
    assert torch.allclose(
        cayley_step(rotation, rotation @ (symmetric + symmetric.T), 1.5),
        rotation,
        rtol=0,
        atol=1e-12,
    )


def test_a_small_cayley_step_is_the_step_along_the_skew_part() -> None:
    rng = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64))[0]
    gradient = torch.randn(8, 8, generator=rng, dtype=torch.float64)
    skew = (rotation.T @ gradient - gradient.T @ rotation) / 2
    moved = (cayley_step(rotation, gradient, 1e-5) - rotation) / 1e-5
    assert torch.allclose(moved, -rotation @ skew, rtol=0, atol=1e-3)
