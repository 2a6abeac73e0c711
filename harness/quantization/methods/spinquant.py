"""SpinQuant: rotations of the residual stream and of values, learned so that the rounded model's loss is least.

SpinQuant: LLM Quantization with Learned Rotations (arXiv 2405.16406).
Objective (eq. 2): min over R on the Stiefel manifold of L(R | W, X), the next-token cross-entropy on calibration text of the model
whose weights, activations and cache are rounded as the scheme says; gradients pass rounding straight through.

With norms folded into the linears behind them the function does not depend on (figure 1)

    R1  [hidden, hidden]        embeddings E R1; q, k, v, gate, up and head W R1; o and down R1ᵀ W
    R2  [head_dim, head_dim]    one per block: every head's values, and the columns of o that read them

but the rounded model's loss does. Both start as random Hadamard matrices and follow Cayley SGD (eq. 3, `numerics.rotations`), rate
falling by a cosine to zero. R4, a Hadamard transform of down's input, is executed at run time (`numerics.inputs`), R3 rotates
queries and keys where the scheme has kv.hadamard; neither is learned. Afterwards the rotations are folded, and the rounding sees an
ordinary model.

Where we differ from the authors' code: the model is never whole on the device, a step walks its blocks forward and backward
(`pipeline.model_gradients`). Cayley's map is solved exactly, in float64; theirs takes five fixed-point iterations, with which R
drifts from the manifold. Weights of a step are rotated in float32, theirs in float64. A norm keeps its own epsilon, and no mean is
subtracted from embeddings. A step's sequences are the calibration's, in order; theirs are shuffled over eight cards. Ranges of
weights are those of min and max while rotations are learned, unless range_search is set; theirs are searched. The inputs of o get
the scheme's scale per token like all others; theirs one per head.

With 16 bits everywhere the loss does not depend on R. With no steps the method is QuaRot's without its Hadamard across heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_rotations, check_uniform
from harness.quantization.methods.folding import (
    mlp_outputs,
    put_parameters,
    rotate_block,
    rotate_ends,
)
from harness.quantization.methods.protocols import BlockView, WholeModel
from harness.quantization.numerics import hadamard
from harness.quantization.numerics.activations import round_dynamic
from harness.quantization.numerics.grids import CONVENTIONS, Fitting
from harness.quantization.numerics.rotations import cayley_step
from harness.quantization.numerics.training import nearest_through, round_through

# names of what is learned; a block's number in the second
RESIDUAL, VALUES = "residual", "values.{}"


class Transform:
    """Learned rotations of the residual stream and of values."""

    version = 1
    needs = ("tokens",)
    stochastic = False
    activation_aware = True

    @dataclass(frozen=True)
    class Settings:
        """
        rotation_seed   of the signs of the Hadamard matrices that learning starts from; 0 and up
        steps           of Cayley SGD; 0: the random rotations as they are
        sequences       calibration sequences of one step
        rate            learning rate of the first step, above 0
        round_weights   round weights while rotations are learned; false where GPTQ follows, as published
        grid            of these weights: gptq, awq, omniquant or compressed; that of the rounding which follows
        range_search    search their ranges in every step; 80 times the work of min and max
        online          rotate the inputs of down at run time (R4)
        """

        rotation_seed: int = 0
        steps: int = 100
        sequences: int = 8
        rate: float = 1.5
        round_weights: bool = True
        grid: str = "awq"
        range_search: bool = False
        online: bool = True

        def __post_init__(self) -> None:
            for name, least in (("rotation_seed", 0), ("steps", 0), ("sequences", 1)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
            if not self.rate > 0:
                raise ValueError(f"rate is {self.rate}; it must be above 0")
            if self.grid not in CONVENTIONS:
                raise ValueError(f'no grid "{self.grid}"; known: {", ".join(CONVENTIONS)}')

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._learned: Mapping[str, Tensor] = {}

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Reasons to refuse: no rotations of the residual stream, sizes without Hadamard matrices, rounding without gradients."""
        reasons = check_rotations(shapes)
        if not shapes.rotations or shapes.ends is None:
            return reasons
        sizes = {"the residual stream": shapes.hidden_size, "a head": shapes.head_dim}
        if self.settings.online:
            sizes |= {
                linear.name: linear.in_features
                for linear in shapes.linears
                if linear.name in mlp_outputs(shapes)
            }
            fused = [
                linear.name
                for linear in shapes.linears
                if linear.fused and linear.name in mlp_outputs(shapes)
            ]
            if fused:
                reasons.append(
                    f"inputs of fused linears cannot be rotated at run time: {', '.join(fused)}; use online=false"
                )
        reasons += hadamard.unknown_sizes(sizes)
        found = {
            scheme.activation_for(block, linear.name)
            for block in range(shapes.blocks)
            for linear in shapes.linears
        }
        activations = [activation for activation in found if activation is not None]
        if any(not activation.dynamic for activation in activations):
            reasons.append(
                "static activation scales are found after rounding and cannot be learned against; use dynamic: true"
            )
        if any(activation.format != "int" for activation in activations):
            reasons.append(
                "no gradient passes activations in other formats than integers; use activation.format=int, or quarot"
            )
        if scheme.kv is not None and scheme.kv.format != "int":
            reasons.append(
                f"no gradient passes a KV cache in {scheme.kv.format}; use kv.format=int, or quarot"
            )
        if self.settings.round_weights and scheme.weight.format != "dense":
            reasons += check_uniform(scheme, shapes, convention=self.settings.grid)
        return reasons

    def learn(
        self, model: WholeModel, scheme: Scheme, rng: torch.Generator
    ) -> Generator[tuple[int, int], None, dict[str, Tensor]]:
        """Cayley SGD. Returns the rotations, float64 on the CPU, and the loss [steps + 1]: before each step, and at last.

        Raises MethodError when a loss is not finite.
        """
        settings, shapes = self.settings, model.shapes
        start = hadamard.random_hadamard(shapes.hidden_size, settings.rotation_seed)
        held = {RESIDUAL: start} | {
            VALUES.format(index): hadamard.random_hadamard(
                shapes.head_dim, settings.rotation_seed + 1 + index
            )
            for index in range(shapes.blocks)
        }
        rounded = _Rounded(settings, scheme)
        losses: list[float] = []
        for step in range(settings.steps + 1):
            last = step == settings.steps
            # the first and last loss: of one text
            begin = 0 if step in (0, settings.steps) else step * settings.sequences
            batch = [
                (begin + position) % model.sequences
                for position in range(min(settings.sequences, model.sequences))
            ]
            leaves = {name: value.clone().requires_grad_(not last) for name, value in held.items()}
            loss = rounded.loss(model, leaves, batch)
            if not math.isfinite(loss):
                raise MethodError(
                    f"the loss of step {step + 1} is {loss}; lower the rate, or use more bits"
                )
            losses.append(loss)
            if last:
                break
            rate = settings.rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
            for name, leaf in leaves.items():
                assert leaf.grad is not None
                held[name] = cayley_step(held[name], leaf.grad, rate)
            yield step + 1, settings.steps
        return {**held, "loss": torch.tensor(losses, dtype=torch.float64)}

    def use(self, learned: Mapping[str, Tensor]) -> None:
        """Rewrite with these rotations from now on."""
        self._learned = learned

    @torch.no_grad()
    def rewrite_ends(
        self, ends: dict[str, Tensor], shapes: Shapes, scheme: Scheme, rng: torch.Generator
    ) -> dict[str, Tensor]:
        """Embeddings, final norm and head of the rotated residual stream."""
        return rotate_ends(ends, shapes, self._learned[RESIDUAL])

    @torch.no_grad()
    def rewrite_block(
        self, block: BlockView, scheme: Scheme, rng: torch.Generator
    ) -> dict[str, Any]:
        """Fold norms and rotations, in place. Notes: in the first block, the loss before and after learning."""
        device = next(block.module.parameters()).device
        residual, values = (
            self._learned[name].to(device) for name in (RESIDUAL, VALUES.format(block.index))
        )
        by_head = _along(values)
        put_parameters(block, rotate_block(block, residual, by_head, by_head))
        if self.settings.online:
            for name in mlp_outputs(block.shapes):
                weight = block.linear(name).weight
                weight.copy_(hadamard.transform(weight.double()))
                block.set_input(name, "input_hadamard", torch.tensor([[1, weight.shape[1], 1]]))
        notes: dict[str, Any] = {
            "online": mlp_outputs(block.shapes) if self.settings.online else []
        }
        if block.index == 0:
            losses = self._learned["loss"].tolist()
            notes["learned"] = {
                "steps": len(losses) - 1,
                "loss_before": losses[0],
                "loss_after": losses[-1],
            }
        return notes


class _Rounded:
    """The loss of the rounded model as a function of its rotations."""

    def __init__(self, settings: Transform.Settings, scheme: Scheme) -> None:
        self.settings, self.scheme = settings, scheme

    def loss(
        self, model: WholeModel, rotations: Mapping[str, Tensor], sequences: Sequence[int]
    ) -> float:
        """Over these calibration sequences; gradients go to the rotations that ask for them."""
        residual = rotations[RESIDUAL]
        asking = [rotation for rotation in rotations.values() if rotation.requires_grad]

        def matrix(hidden: Tensor) -> Tensor:
            return residual.to(hidden.device, torch.float32)

        def enter(hidden: Tensor) -> Tensor:
            return (hidden.float() @ matrix(hidden)).to(hidden.dtype)

        # the head is not rounded: the original one reads the stream rotated back
        def leave(hidden: Tensor) -> Tensor:
            return (hidden.float() @ matrix(hidden).T).to(hidden.dtype)

        def run(block: BlockView, hidden: Sequence[Tensor]) -> list[Tensor]:
            by_head = _along(
                rotations[VALUES.format(block.index)].to(hidden[0].device, torch.float32)
            )
            weights = self._weights(block, rotate_block(block, matrix(hidden[0]), by_head, by_head))
            down = set(mlp_outputs(block.shapes)) if self.settings.online else set()
            return [block.run(one, weights, self._receive(block.index, down)) for one in hidden]

        return model.gradients(asking, sequences, enter, run, leave)

    def _weights(self, block: BlockView, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every parameter that rotations change, matrices rounded; down's as its rotated input needs it."""
        down = mlp_outputs(block.shapes) if self.settings.online else []
        for linear in block.shapes.linears:
            name = f"{linear.name}.weight"
            weight = parameters[name]
            if linear.name in down:
                weight = hadamard.transform(weight.float()).to(weight.dtype)
            own = self.scheme.weight_for(block.index, linear.name)
            if self.settings.round_weights and own.format != "dense":
                weight = self._nearest(weight, own)
            parameters[name] = weight
        return parameters

    def _nearest(self, weight: Tensor, scheme: WeightScheme) -> Tensor:
        """weight [out, in] on its grids, ranges taken as constants, in its dtype."""
        wide = weight.float()
        size = wide.shape[1] if scheme.group_size == -1 else scheme.group_size
        groups = wide.reshape(wide.shape[0], -1, size)
        with torch.no_grad():
            grid = Fitting.of(
                wide, scheme, self.settings.grid, "range" if self.settings.range_search else "none"
            ).fit(groups)
        return nearest_through(groups, grid).reshape(wide.shape).to(weight.dtype)

    def _receive(self, index: int, down: set[str]) -> Callable[[str, Tensor], Tensor]:
        """The input of a linear of block `index` as at run time: rotated where the linear has a rotation, then rounded."""

        def receive(name: str, inputs: Tensor) -> Tensor:
            x = hadamard.transform(inputs) if name in down else inputs
            activation = self.scheme.activation_for(index, name)
            return x if activation is None else round_dynamic(x, activation, round_through)

        return receive


def _along(rotation: Tensor) -> Callable[[Tensor, int], Tensor]:
    """(values, axis) -> rotationᵀ applied along the axis."""

    def turn(values: Tensor, axis: int) -> Tensor:
        return (values.movedim(axis, -1) @ rotation).movedim(-1, axis)

    return turn
