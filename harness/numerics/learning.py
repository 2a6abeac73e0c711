"""Training inside a rounding: gradients through rounded values, learned ranges of grids, and the loop of block-wise methods."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.errors import MethodError
from harness.numerics.grids import Grid, from_range


def round_through(x: Tensor) -> Tensor:
    """Nearest integers, with the gradient of x itself (straight-through estimator)."""
    return torch.round(x).detach() + (x - x.detach())             # the second term is 0: integers stay exact


def nearest_through(values: Tensor, grid: Grid) -> Tensor:
    """grid.nearest(values), the same numbers, with gradients to values and to the grid's scale.

    Rounding is straight-through, clamping passes gradients inside the range only, the zero point has none.
    """
    codes = (round_through(values / grid.scale) + grid.zero).clamp(0, grid.top)
    return grid.dequantize(codes)


def clipped_grid(
    values: Tensor, upper: Tensor, lower: Tensor, bits: int, symmetric: bool, convention: str, scale_dtype: str
) -> Grid:
    """The grid of each row of values [..., g] over [sigmoid(lower) min, sigmoid(upper) max], differentiable in both strengths.

    upper, lower: [..., 1] logits; large ones leave the range as it is (OmniQuant's learnable weight clipping, eq. 2).
    """
    hi = torch.sigmoid(upper) * values.amax(-1, keepdim=True)
    lo = torch.sigmoid(lower) * values.amin(-1, keepdim=True)
    return from_range(lo, hi, bits, symmetric, convention, scale_dtype)


def steps_of(
    loss_of: Callable[[int], Tensor], samples: int, groups: Sequence[Mapping[str, Any]], epochs: int, what: str = "training"
) -> Generator[tuple[int, int], None, list[float]]:
    """AdamW without weight decay, one sample per step, in order. Yields (step, steps); returns the mean loss of each epoch.

    loss_of  sample number -> scalar loss, differentiable in the parameters
    groups   torch.optim groups: {"params": [...], "lr": ...}
    what     is trained, for the message
    Raises MethodError when a loss is not finite; the parameters are then worth nothing.
    """
    trained = [parameter for group in groups for parameter in group["params"]]
    losses: list[float] = []
    if not trained or not samples:
        return losses
    optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.0)
    for epoch in range(epochs):
        total: Tensor | None = None
        for sample in range(samples):
            with torch.enable_grad():
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(sample)
                loss.backward(inputs=trained)
                optimizer.step()
            total = loss.detach() if total is None else total + loss.detach()
            yield epoch * samples + sample + 1, epochs * samples
        assert total is not None
        losses.append(float(total) / samples)
        if not losses[-1] < float("inf"):                         # once per epoch: a check per step would wait for the device
            raise MethodError(
                f"{what}: the loss of epoch {epoch + 1} is {losses[-1]}; lower the learning rate, "
                "or load the model in a wider dtype (model.dtype=float32)"
            )
    return losses


def train(
    loss_of: Callable[[int], Tensor], samples: int, groups: Sequence[Mapping[str, Any]], epochs: int, what: str = "training"
) -> list[float]:
    """`steps_of` to its end: the mean loss of each epoch."""
    walk = steps_of(loss_of, samples, groups, epochs, what)
    while True:
        try:
            next(walk)
        except StopIteration as end:
            losses: list[float] = end.value
            return losses
