"""What block-wise methods share: a block's matrices in groups, the loss of its output, and activations rounded in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.quantization.methods.checks import require_finite
from harness.quantization.methods.protocols import BlockView
from harness.quantization.numerics.activations import round_dynamic
from harness.quantization.numerics.training import round_through

Receive = Callable[[str, Tensor], Tensor]

# What `block_loss` is multiplied by before its gradients: those of a mean over a block's outputs are smaller than the smallest
# number of float16. A power of two, so that other types get the same bits.
GRADIENT_SCALE = 1024.0


def activation_reasons(scheme: Scheme) -> list[str]:
    """Reasons why a block cannot be trained with this scheme's activations rounded."""
    reasons, activation = [], scheme.activation
    if activation is not None and not activation.dynamic:
        reasons.append(
            "static activation scales are found after rounding and cannot be trained against; use dynamic: true"
        )
    if activation is not None and activation.format != "int":
        reasons.append(f"no gradient passes activations in {activation.format}; use integers")
    return reasons


def activation_rounding(block: BlockView, scheme: Scheme) -> Receive | None:
    """A function that rounds inputs of linears as at run time, with gradients; None where inputs stay as they are."""
    if scheme.activation is None:
        return None

    def receive(name: str, inputs: Tensor) -> Tensor:
        activation = scheme.activation_for(block.index, name)
        return inputs if activation is None else round_dynamic(inputs, activation, round_through)

    return receive


@dataclass(frozen=True)
class GroupedMatrix:
    """A matrix of a block before rounding, in groups of input channels with one grid each.

    groups [out, groups, g] float32   scheme: of this matrix in this block
    """

    groups: Tensor
    scheme: WeightScheme

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.groups.shape[0], self.groups.shape[1] * self.groups.shape[2]


def grouped_matrices(block: BlockView, scheme: Scheme) -> dict[str, GroupedMatrix]:
    """Copies of the block's matrices by linear name. Raises MethodError for a weight that is not finite."""
    found = {}
    for shape in block.shapes.linears:
        weight = block.linear(shape.name).weight.detach().float()
        require_finite(weight, shape.name)
        own = scheme.weight_for(block.index, shape.name)
        size = weight.shape[1] if own.group_size == -1 else own.group_size
        found[shape.name] = GroupedMatrix(weight.reshape(weight.shape[0], -1, size).clone(), own)
    return found


def block_loss(
    block: BlockView, sample: int, weights: Mapping[str, Tensor], receive: Receive | None = None
) -> Tensor:
    """Mean squared distance, float32, of the block's output on its own inputs to its full-precision output, for one sequence.

    weights: matrices [out, in] by linear name, in place of the block's; cast to the model's dtype, differentiable.
    """
    placed = {
        f"{name}.weight": weight.to(block.linear(name).weight.dtype)
        for name, weight in weights.items()
    }
    output = block.run(block.inputs()[sample], placed, receive).float()
    reference = block.references()[sample].to(output.device).float()
    return (output - reference).square().mean()


def note_unreached(block: BlockView) -> None:
    """State in the block's notes which experts no calibration token reached: no gradient moved them from the nearest codes."""
    unreached = {
        shape.name: 0
        for shape in block.shapes.linears
        if shape.expert and (of := block.evidence.get(shape.name)) is not None and not of.tokens
    }
    if unreached:
        block.notes["rounded_to_nearest"] = unreached
