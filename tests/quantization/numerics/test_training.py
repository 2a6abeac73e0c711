"""Training inside a rounding: exact numbers forward, straight-through gradients back, and a loop that says when it breaks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from harness.core.errors import MethodError
from harness.quantization.numerics.grids import fit
from harness.quantization.numerics.training import nearest_through, round_through, steps_of, train


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
