"""Training inside a rounding: exact numbers forward, straight-through gradients back, and a loop that says when it breaks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.core.errors import MethodError
from harness.quantization.numerics.grids import fit
from harness.quantization.numerics.training import (
    nearest_between,
    nearest_through,
    round_through,
    sign_steps,
    steps_of,
    train,
)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_through_is_exact_and_passes_gradients() -> None:
    x = (1000 * values(4096)).requires_grad_()
    y = round_through(x)
    assert torch.equal(y, torch.round(x.detach()))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(4096))


@pytest.mark.parametrize(
    ("convention", "symmetric"),
    [("gptq", False), ("omniquant", False), ("omniquant", True), ("awq", True)],
)
def test_nearest_through_is_the_grids_nearest(convention: str, symmetric: bool) -> None:
    x = values(8, 4, 16)
    grid = fit(x, 3, symmetric, convention)
    assert torch.equal(nearest_through(x, grid), grid.nearest(x))


def test_only_weights_inside_the_grid_get_gradient() -> None:
    x = values(8, 16).requires_grad_()
    grid = fit(x.detach() / 2, 3, False)  # half the range: the outer weights are clipped
    (gradient,) = torch.autograd.grad(nearest_through(x, grid).sum(), x)
    codes = torch.round(x.detach() / grid.scale) + grid.zero
    inside = (codes >= 0) & (codes <= grid.top)
    assert torch.allclose(gradient, inside.float()) and not bool(inside.all())


def test_training_visits_the_samples_in_order() -> None:
    weight, seen = nn.Parameter(torch.zeros(3)), []

    def loss_of(sample: int) -> Tensor:
        seen.append(sample)
        return (weight - 1).square().sum()

    losses = train(loss_of, 3, [{"params": [weight], "lr": 0.1}], 2)
    assert seen == [0, 1, 2, 0, 1, 2] and len(losses) == 2 and losses[1] < losses[0]
    assert list(steps_of(loss_of, 2, [{"params": [weight], "lr": 0.1}], 2)) == [
        (1, 4),
        (2, 4),
        (3, 4),
        (4, 4),
    ]


def test_rates_fall_on_a_cosine_to_their_last_share() -> None:
    """AdamW with one gradient over and over moves by the rate in every step."""
    weight, seen = nn.Parameter(torch.zeros(1)), []

    def loss_of(_: int) -> Tensor:
        seen.append(float(weight.detach()))
        return -weight.sum()

    train(loss_of, 4, [{"params": [weight], "lr": 1.0}], 2, last_rate=0.1)
    steps = [after - before for before, after in itertools.pairwise(seen)]
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(7)]
    assert steps == pytest.approx(expected, rel=1e-4)


def test_other_parameters_keep_their_gradients() -> None:
    trained, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    train(lambda _sample: (trained * other).sum(), 1, [{"params": [trained], "lr": 0.1}], 1)
    assert other.grad is None and not torch.equal(trained, torch.ones(2))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(loss: float) -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(
        MethodError, match=r"block 3: the loss of epoch 1 .* lower the learning rate"
    ):
        train(
            lambda _sample: weight.sum() * loss, 2, [{"params": [weight], "lr": 0.1}], 2, "block 3"
        )


def test_nothing_to_train_is_no_training() -> None:
    assert train(lambda _sample: torch.tensor(math.nan), 4, [], 3) == []
    assert (
        train(
            lambda _sample: torch.tensor(math.nan),
            4,
            [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0}],
            0,
        )
        == []
    )


# ---- by the signs of gradients ---------------------------------------------------------------------------------------


def descend(loss_of: Callable[[Sequence[int]], Tensor], weight: nn.Parameter, **own: Any) -> Any:
    def batch_loss(batch: Sequence[int]) -> Tensor:
        loss = loss_of(batch)
        loss.backward()
        return loss.detach()

    options = {"iterations": 10, "batch": 2, "rng": torch.Generator().manual_seed(0), **own}
    groups = options.pop("groups", [{"params": [weight], "lr": 0.1}])
    samples = options.pop("samples", 4)

    def whole_loss() -> Tensor:
        with torch.no_grad():
            return loss_of(range(samples))

    return sign_steps(batch_loss, whole_loss, samples, groups, **options)


@pytest.mark.parametrize("iterations", [1, 7, 40])
def test_signed_steps_add_up_to_half_the_rate_times_their_number(iterations: int) -> None:
    weight = nn.Parameter(torch.zeros(3))
    groups = [{"params": [weight], "lr": 1 / iterations}]
    descend(
        lambda _: (weight * torch.tensor([3.0, -0.1, 0.0])).sum(),
        weight,
        groups=groups,
        iterations=iterations,
        keep="last",
    )
    most = 0.5 + 1 / (2 * iterations)
    assert torch.allclose(weight.detach(), torch.tensor([-most, most, 0.0]), atol=1e-6)


def test_batches_are_shuffled_and_their_tail_waits_for_the_next_order() -> None:
    weight, seen = nn.Parameter(torch.zeros(1)), []

    def loss_of(batch: Sequence[int]) -> Tensor:
        seen.append(list(batch))
        return weight.sum()

    descend(loss_of, weight, samples=5, iterations=40)
    assert all(len(set(a + b)) == 4 for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert {number for batch in seen for number in batch} == {0, 1, 2, 3, 4}
    assert len({str(batch) for batch in seen}) > 10


def test_the_best_parameters_are_those_before_the_step_that_followed_their_loss() -> None:
    weight = nn.Parameter(torch.tensor(1.0))
    found = descend(lambda _: weight.square(), weight, samples=2, iterations=10)
    assert found.first == 1 and found.kept == 9  # it falls all the way: the last that was measured
    ends = nn.Parameter(torch.tensor(1.0))
    last = descend(lambda _: ends.square(), ends, samples=2, iterations=10, keep="last")
    assert last.kept == 10 and float(ends.detach()) < float(weight.detach())
    whole = nn.Parameter(torch.tensor(1.0))
    best = descend(lambda _: whole.square(), whole, samples=2, keep="best_of_all", check_every=3)
    assert best.kept == 10 and torch.equal(whole, ends)  # the state after the last step counts too


def test_ranges_are_kept_and_losses_are_means_of_stretches() -> None:
    weight = nn.Parameter(torch.tensor([0.95]))
    groups = [{"params": [weight], "lr": 0.5, "range": (0.0, 1.0)}]
    found = descend(lambda _: -weight.sum(), weight, groups=groups, iterations=45, keep="last")
    assert weight.item() == 1.0 and len(found.losses) == 20
    assert found.losses[-1] == -1.0 and found.losses[0] == pytest.approx((-0.95 - 1) / 2)


def test_a_signed_step_to_infinity_is_named() -> None:
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(MethodError, match=r"block 7: the loss of iteration 3 .* lower the rate"):
        descend(lambda _: weight.sum() * (1 if weight > 0.85 else math.nan), weight, what="block 7")


@pytest.mark.parametrize("offset", [False, True])
def test_codes_inside_cancel_their_zero_point(offset: bool) -> None:
    x, scale = values(8, 16), torch.full((8, 1), 0.4, requires_grad=True)
    zero = torch.full((8, 1), 2.0, requires_grad=True)
    moved = values(8, 16, seed=1).clamp(-0.5, 0.5).requires_grad_() if offset else None
    y = nearest_between(x, scale, zero, 7, moved)
    with torch.no_grad():
        raw = torch.round(x / scale + (0 if moved is None else moved)) + zero
        inside = (raw >= 0) & (raw <= 7)
        assert torch.equal(y, scale * (raw.clamp(0, 7) - zero)) and not bool(inside.all())
    y.sum().backward()
    assert torch.allclose(zero.grad, (-0.4 * (~inside).sum(1, keepdim=True)).float())
    residue = raw.clamp(0, 7) - zero - inside * x / scale
    assert torch.allclose(scale.grad, residue.sum(1, keepdim=True), atol=1e-5)
    if moved is not None:
        assert torch.allclose(moved.grad, 0.4 * inside.float())


def test_a_scale_of_gradients_changes_nothing_but_what_float16_cannot_hold() -> None:
    def trained(half: bool, scale: float) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(0.1, 1, 8))

        def loss_of(_sample: int) -> torch.Tensor:
            within = weight.half() if half else weight
            return 1e-8 * within.float().square().sum()

        train(loss_of, 2, [{"params": [weight], "lr": 0.01}], 2, gradient_scale=scale)
        return weight.detach()

    start = torch.linspace(0.1, 1, 8)
    assert torch.equal(trained(False, 1.0), trained(False, 1024.0))
    assert torch.equal(trained(True, 1.0), start)
    assert bool((trained(True, 1024.0) < start).all())
