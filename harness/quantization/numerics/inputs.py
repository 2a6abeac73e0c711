"""Transforms of a linear's input at run time, before it is rounded: the part of a transform that cannot be folded into a weight.

A transform that multiplies W by some invertible matrix from the right must undo it on x. Where a norm or a linear comes before, the
inverse is folded into it; otherwise it is stored with the weight, as tensors of the linear, and executed at run time:

    input_scale      [in]           x / input_scale                                    smoothing without folding
    input_hadamard   [1 or 2, 3]    x as [outer, size, inner], H_size along the middle; several rows: one after another

With both, the division comes first. The forward of a calibrating pass and that of a loaded model do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.quantization.numerics.hadamard import transform

SCALE, HADAMARD = "input_scale", "input_hadamard"
NAMES = (SCALE, HADAMARD)


def of_module(module: nn.Module) -> dict[str, Tensor]:
    """The input tensors that a module holds, by name; empty for an ordinary linear."""
    held = {name: module._parameters.get(name) for name in NAMES}
    return {name: parameter.data for name, parameter in held.items() if parameter is not None}


def apply(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """x [..., in] as the weight expects it, in x's dtype."""
    if SCALE in tensors:
        x = x / tensors[SCALE].to(x.dtype)
    if HADAMARD in tensors:
        for outer, size, inner in tensors[HADAMARD].tolist():
            x = transform(x.unflatten(-1, (outer, size, inner)), -2).flatten(-3)
    return x


def attach(module: nn.Module) -> None:
    """From now on the module applies the input tensors that it holds when it runs; a second call changes nothing."""
    if getattr(module, "_applies_inputs", False):
        return

    def hook(owner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (apply(args[0], of_module(owner)), *args[1:])

    module.register_forward_pre_hook(hook)
    module._applies_inputs = True  # type: ignore[assignment]


def attach_all(block: nn.Module) -> None:
    """`attach` for every module of a block that holds input tensors."""
    for module in block.modules():
        if of_module(module):
            attach(module)


def hold(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module an input tensor, and let it apply it. scale: in the dtype of the module's weight."""
    assert name in NAMES, name
    weight = module.weight
    assert isinstance(weight, Tensor)
    # of its own: files hold no views
    placed = value.to(weight.device, weight.dtype if name == SCALE else torch.int32, copy=True)
    module._parameters[name] = nn.Parameter(placed, requires_grad=False)
    attach(module)
