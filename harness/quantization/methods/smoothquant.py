"""SmoothQuant: the magnitude of activation channels is shared with the weights that read them, then both are rounded.

SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (arXiv 2211.10438).

Objective: X W = (X diag(s)⁻¹)(diag(s) W) (eq. 3) with both factors easy to round; per input channel j (eq. 4)
s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), the weight's maximum over all linears that read the input. The division goes into the
norm before them, so nothing is left to do at run time. s may be below 1: a channel large in the weights moves the other way.

As in the authors' code: the weights' maxima and s are floored at 1e-5, and only norm → linear pairs are smoothed. Where we differ:
s in float32, theirs in the weights' dtype; maxima are of the cell's input stream (theirs: inputs=full_precision, as the method's
YAML says), floored at 1e-5 as well, so that alpha = 1 and a dead channel give no zero.
down adds up_proj → down_proj, as later published recipes do; direction "activation_to_weight" clamps s to at least 1, the ablation
that cannot repair outliers of the weights; run_time leaves norms unchanged and divides inputs when the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme
from harness.core.errors import MethodError
from harness.core.shapes import ScalePair, Shapes
from harness.quantization.methods.folding import fold_scales
from harness.quantization.methods.protocols import BlockView

FLOOR = 1e-5
DIRECTIONS = ("both", "activation_to_weight")


class Transform:
    """Smoothing of norm → linear pairs."""

    version = 1
    needs = ("abs_max",)
    stochastic = False
    activation_aware = False
    scheme_independent = True

    @dataclass(frozen=True)
    class Settings:
        """
        alpha      share of the activations' magnitude that moves into the weights: 0 to 1
        down       also up_proj → down_proj
        direction  both, or activation_to_weight: s at least 1
        run_time   divide inputs at run time instead of folding into norms
        """

        alpha: float = 0.5
        down: bool = False
        direction: str = "both"
        run_time: bool = False

        def __post_init__(self) -> None:
            if not 0 <= self.alpha <= 1:
                raise ValueError(f"alpha is {self.alpha}; it must be from 0 to 1")
            if self.direction not in DIRECTIONS:
                raise ValueError(f'no direction "{self.direction}"; known: {", ".join(DIRECTIONS)}')

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Norms with linears behind them; for run_time, linears with inputs of their own."""
        pairs = self._pairs(shapes)
        if not pairs:
            return [f'family "{shapes.family}" states no norm whose output can be scaled']
        fused = {linear.name for linear in shapes.linears if linear.fused}
        touched = [name for pair in pairs for name in pair.consumers if name in fused]
        if self.settings.run_time and touched:
            return [
                f"run_time scales need linears of their own; fused here: {', '.join(dict.fromkeys(touched))}"
            ]
        return []

    @torch.no_grad()
    def rewrite_block(self, block: BlockView, scheme: Scheme, rng: Generator) -> dict[str, Any]:
        """Smooth the block in place; notes: by pair, the smallest and largest scale."""
        notes: dict[str, Any] = {}
        for pair in self._pairs(block.shapes):
            title = f"{pair.producer} → {', '.join(pair.consumers)}"
            weights = torch.stack(
                [block.linear(name).weight.float().abs().amax(0) for name in pair.consumers]
            ).amax(0)
            activations = block.evidence[pair.consumers[0]]["abs_max"].float()
            scales = smoothing_scales(activations, weights, self.settings.alpha)
            if self.settings.direction == "activation_to_weight":
                scales = scales.clamp(min=1)
            if not bool(torch.isfinite(scales).all()):
                raise MethodError(
                    f"block {block.index}: the scales of {title} are not finite; the weights hold NaN or infinity, "
                    "or the model needs a wider dtype (model.dtype=float32)"
                )
            if self.settings.run_time:
                for name in pair.consumers:
                    weight = block.linear(name).weight
                    stored = scales.to(weight.dtype).float()
                    weight.copy_(weight.float() * stored)
                    block.set_input(name, "input_scale", stored)
            else:
                fold_scales(block, pair, scales)
            notes[title] = {"smallest": float(scales.min()), "largest": float(scales.max())}
        return {"scales": notes}

    def _pairs(self, shapes: Shapes) -> list[ScalePair]:
        """Norm pairs, and with `down` the pair up → down: the linear pair outside attention, which repeats nothing."""
        return [
            pair
            for pair in shapes.pairs
            if pair.kind == "norm"
            or (self.settings.down and "att" not in pair.producer.rpartition(".")[0])
        ]


def smoothing_scales(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s [in] from the largest magnitudes of activations and weights per input channel, [in] each."""
    return (
        activations.clamp(min=FLOOR).pow(alpha) / weights.clamp(min=FLOOR).pow(1 - alpha)
    ).clamp(min=FLOOR)
