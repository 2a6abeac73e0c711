"""Rounding with error feedback: the two forms are one rule, block sizes do not matter, the first column is optimal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.quantization.numerics.error_feedback import Columns, descend, feed_forward, ldlq
from harness.quantization.numerics.hessians import inverse_factor


def problem(rows: int = 6, columns: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Target [rows, columns] in units of the grid and a correlated Hessian, float64."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=rng, dtype=torch.float64)
    x = x @ (
        torch.eye(columns, dtype=torch.float64)
        + 0.5 * torch.randn(columns, columns, generator=rng, dtype=torch.float64)
    )
    hessian = x.T @ x / x.shape[0] + 0.05 * torch.eye(columns, dtype=torch.float64)
    return 5 * torch.randn(rows, columns, generator=rng, dtype=torch.float64), hessian


def half_up(values: Tensor) -> Tensor:
    return torch.floor(values + 0.5)


def loss(rounded: Tensor, target: Tensor, hessian: Tensor) -> float:
    error = rounded - target
    return float(torch.trace(error @ hessian @ error.T))


def test_forward_on_the_flipped_problem_is_ldlq() -> None:
    target, hessian = problem()
    flipped = inverse_factor(hessian.flip(0, 1))
    forward = feed_forward(target.flip(1), flipped, lambda j, view: half_up(view[j])).flip(1)
    assert torch.equal(forward, ldlq(target, hessian, half_up))


@pytest.mark.parametrize("block_size", [1, 3, 20, 128])
def test_the_block_size_changes_nothing(block_size: int) -> None:
    target, hessian = problem()
    upper = inverse_factor(hessian)
    reference = feed_forward(target, upper, lambda j, view: half_up(view[j]), block_size=20)
    assert torch.equal(
        feed_forward(target, upper, lambda j, view: half_up(view[j]), block_size=block_size),
        reference,
    )
    assert torch.equal(
        ldlq(target, hessian, half_up, block_size=block_size), ldlq(target, hessian, half_up)
    )
    start = half_up(target)
    descended = descend(
        start, target, hessian, torch.round, lambda v: v, passes=3, block_size=block_size
    )
    assert torch.equal(
        descended, descend(start, target, hessian, torch.round, lambda v: v, passes=3)
    )


def test_a_diagonal_hessian_rounds_to_nearest() -> None:
    target, hessian = problem()
    diagonal = hessian.diagonal().diag()
    assert torch.equal(
        feed_forward(target, inverse_factor(diagonal), lambda j, view: half_up(view[j])),
        half_up(target),
    )
    assert torch.equal(ldlq(target, diagonal, half_up), half_up(target))


def test_feedback_beats_rounding_to_nearest_and_descent_does_not_hurt() -> None:
    target, hessian = problem(rows=32)
    fed = ldlq(target, hessian, half_up)
    assert loss(fed, target, hessian) < loss(half_up(target), target, hessian)
    descended = descend(fed, target, hessian, torch.round, lambda v: v, passes=10)
    assert loss(descended, target, hessian) <= loss(fed, target, hessian) + 1e-9


def test_remaining_columns_are_the_least_squares_answer_to_the_first() -> None:
    target, hessian = problem(rows=1, columns=3)
    seen: dict[int, Tensor] = {}

    def record(j: int, view: Columns) -> Tensor:
        if j == 1:
            seen[0] = view.block.clone()
        return half_up(view[j]) if j == 0 else view[j].clone()

    rounded = feed_forward(target, inverse_factor(hessian), record)
    error = rounded[0, 0] - target[0, 0]
    expected = target[0, 1:] - torch.linalg.solve(hessian[1:, 1:], hessian[1:, 0]) * error
    torch.testing.assert_close(seen[0][0, 1:], expected)


def test_updates_can_wait_for_the_next_block() -> None:
    target, hessian = problem()
    upper = inverse_factor(hessian)
    rounded = feed_forward(
        target, upper, lambda j, view: half_up(view[j]), block_size=10, update_block=False
    )
    assert torch.equal(rounded[:, :10], half_up(target[:, :10]))
    assert not torch.equal(rounded[:, 10:], half_up(target[:, 10:]))


def test_groups_reach_over_the_end_of_a_block() -> None:
    weight = torch.arange(12.0).reshape(2, 6)
    view = Columns(weight, weight[:, 2:4] + 100, 2)
    assert view.group(3, 3).tolist() == [[103, 4, 5], [109, 10, 11]]
    assert view.group(2, 2).tolist() == [[102, 103], [108, 109]]
