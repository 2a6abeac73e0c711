"""AWEQ: ranges of activations and weights are equalized, and the mean shift that rounding leaves is taken out of the biases.

AWEQ: Post-Training Quantization with Activation-Weight Equalization for Large Language Models (arXiv 2311.01305).

No code was published, and this is a reconstruction from the method's own sources: equalization and bias correction of data-free
quantization (Nagel et al., arXiv 1906.04721, §4), with the input of a linear in the place of its producer's weights. Report its
results as "AWEQ (reconstructed)".

Transform. Per norm → linear pair, r_x = max|x_j| over calibration, r_w = max|W_j| over the pair's linears; s_j = sqrt(r_x / r_w)
maximises the product of the channels' precisions, and both ranges become sqrt(r_x r_w). Folded into the norm. With magnitudes as
ranges this is SmoothQuant's formula at alpha = 0.5: compare the two as an ablation of the correction below.
Rounding. To nearest, then b' = b - E[W' x' - W x] over the calibration tokens, x' the activations as the scheme rounds them; a bias
is made where there is none. With `sequential` the linears of a block are corrected in order of execution, each on inputs that
come from the rounded and corrected ones before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Scheme
from harness.core.errors import MethodError
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import check_uniform, require_finite
from harness.quantization.methods.folding import fold_scales
from harness.quantization.methods.protocols import BlockView
from harness.quantization.numerics.activations import round_dynamic
from harness.quantization.numerics.grids import CONVENTIONS, fit
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

FLOOR = 1e-5


class Transform:
    """Equal ranges of inputs and weights, channel by channel."""

    version = 1
    needs = ("abs_max",)
    stochastic = False
    activation_aware = False

    @dataclass(frozen=True)
    class Settings:
        """The equalization has nothing to set."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """A family with norms to fold into."""
        if not any(pair.kind == "norm" for pair in shapes.pairs):
            return [f'family "{shapes.family}" states no norm whose output can be scaled']
        return []

    @torch.no_grad()
    def rewrite_block(self, block: BlockView, scheme: Scheme, rng: Generator) -> dict[str, Any]:
        """Equalize the block in place; notes: by norm, the smallest and largest scale."""
        notes: dict[str, Any] = {}
        for pair in (pair for pair in block.shapes.pairs if pair.kind == "norm"):
            inputs = block.evidence[pair.consumers[0]]["abs_max"].float().clamp(min=FLOOR)
            weights = torch.stack(
                [block.linear(name).weight.float().abs().amax(0) for name in pair.consumers]
            ).amax(0)
            scales = (inputs / weights.clamp(min=FLOOR)).sqrt()
            if not bool(torch.isfinite(scales).all()):
                raise MethodError(
                    f"block {block.index}: scales behind {pair.producer} are not finite; use model.dtype=float32"
                )
            fold_scales(block, pair, scales)
            notes[pair.producer] = {"smallest": float(scales.min()), "largest": float(scales.max())}
        return {"scales": notes}


class Rounding:
    """Round to nearest with bias correction."""

    version = 1
    needs = ("mean",)
    stochastic = False
    activation_aware = True

    @dataclass(frozen=True)
    class Settings:
        """
        grid        gptq, awq, omniquant or compressed
        sequential  correct each linear on inputs from the rounded ones before it, instead of those of the unrounded block
        """

        grid: str = "awq"
        sequential: bool = True

        def __post_init__(self) -> None:
            if self.grid not in CONVENTIONS:
                raise ValueError(f'no grid "{self.grid}"; known: {", ".join(CONVENTIONS)}')

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Integer grids, linears of their own that can take a bias, and activation scales that need no calibration."""
        reasons = check_uniform(scheme, shapes, convention=self.settings.grid)
        if any(linear.fused for linear in shapes.linears) or shapes.experts:
            reasons.append(
                "biases are corrected in linears of their own, not in parts of a fused parameter or in experts"
            )
        if scheme.activation is not None and not scheme.activation.dynamic:
            reasons.append(
                "biases are corrected for dynamic activation scales; use activation.dynamic=true"
            )
        return reasons

    @torch.no_grad()
    def round_block(
        self, block: BlockView, scheme: Scheme, rng: Generator
    ) -> dict[str, QuantizedWeight]:
        """Round every linear and correct its bias in place; notes: by linear, the largest correction."""
        rounded: dict[str, QuantizedWeight] = {}
        notes: dict[str, float] = {}
        groups: dict[str, list[LinearShape]] = {}
        for linear in block.shapes.linears:
            groups.setdefault(linear.group, []).append(linear)
            weight = block.linear(linear.name).weight.float()
            require_finite(weight, linear.name)
            rounded[linear.name] = self._round(weight, scheme, block.index, linear.name)
        placed: dict[str, Tensor] = {}
        corrections: dict[str, Tensor] = {}
        for members in groups.values():
            names = [linear.name for linear in members]
            for name, (mean, rounded_mean) in _means(block, names, placed, scheme).items():
                weight = block.linear(name).weight.double()
                shift = (
                    rounded[name].dequantize().to(weight.device).double() @ rounded_mean
                    - weight @ mean
                )
                corrections[name] = shift
                if self.settings.sequential:
                    _correct(block.linear(name), shift)
            if self.settings.sequential:
                for name in names:
                    weight = block.linear(name).weight
                    placed[f"{name}.weight"] = (
                        rounded[name].dequantize().to(weight.device, weight.dtype)
                    )
        for name, shift in corrections.items():
            if not self.settings.sequential:
                _correct(block.linear(name), shift)
            notes[name] = float(shift.abs().max())
        block.notes["largest_correction"] = notes
        return rounded

    def _round(self, weight: Tensor, scheme: Scheme, block: int, name: str) -> QuantizedWeight:
        own = scheme.weight_for(block, name)
        size = weight.shape[1] if own.group_size == -1 else own.group_size
        grouped = weight.reshape(weight.shape[0], -1, size)
        grid = fit(grouped, int(own.bits), own.symmetric, self.settings.grid, own.scale_dtype)
        return UniformWeight.from_grid(
            grid.quantize(grouped), grid, symmetric=own.symmetric, scale_dtype=own.scale_dtype
        )


def _means(
    block: BlockView, names: list[str], placed: dict[str, Tensor], scheme: Scheme
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over all calibration tokens of each linear's input, as it is and as the scheme rounds it, [in] float64.

    placed: weights in place of the block's own, those of linears rounded before.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    tokens: dict[str, int] = {}

    def receive(name: str, inputs: Tensor) -> Tensor:
        activation = scheme.activation_for(block.index, name)
        rounded = inputs if activation is None else round_dynamic(inputs, activation)
        if name in names:
            pair = tuple(x.reshape(-1, x.shape[-1]).double().sum(0) for x in (inputs, rounded))
            before = sums.get(name, (torch.zeros_like(pair[0]), torch.zeros_like(pair[1])))
            sums[name] = (before[0] + pair[0], before[1] + pair[1])
            tokens[name] = tokens.get(name, 0) + inputs.numel() // inputs.shape[-1]
        return rounded if f"{name}.weight" in placed else inputs

    for hidden in block.inputs():
        block.run(hidden, placed, receive)
    return {
        name: (total / tokens[name], rounded / tokens[name])
        for name, (total, rounded) in sums.items()
    }


def _correct(linear: nn.Linear, shift: Tensor) -> None:
    bias = torch.zeros_like(shift) if linear.bias is None else linear.bias.double()
    linear.bias = nn.Parameter((bias - shift).to(linear.weight.dtype), requires_grad=False)
