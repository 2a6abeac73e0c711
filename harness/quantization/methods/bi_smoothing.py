"""Bi-smoothing: every linear shares the difficulty of each input channel evenly between its weight and its input.

The Uniqueness of LLaMA3-70B Series with Per-Channel Quantization (arXiv 2408.15301, version 2).

For y = W x, per input channel j, with mx_j the median over sequences of the largest |x_j| of a sequence ("max_med"; "max_max":
the largest over sequences) and mw_j = max_i |W_ij|: s_j = sqrt(mx_j / (mw_j + 1e-8)) / T, W' = W diag(s), x' = x / s. With T = 1
both sides have channel maximum sqrt(mx mw). Where a few weights are huge, as in early blocks of LLaMA3-70B, s is far below 1: the
opposite of SmoothQuant's usual case, whose formula with strength 0.5 this is, for every linear and at run time.

As in the author's code (jybbjybb/llama_quant): each linear has its own s, inputs are divided at run time, statistics are of the
unrounded model (inputs=full_precision). There statistics come from the first batch that a layer sees, here from the calibration
windows; recomputing them for every batch is not offered, for then a text's score would depend on its neighbours. fold=true puts
one s per norm, from the largest weight of its consumers, into the norms instead, and leaves o_proj and down_proj unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.folding import fold_scales
from harness.quantization.methods.protocols import BlockView

STATISTICS = ("max_med", "max_max")
SMALLEST = 1e-8  # added to weights; the floor of activations, which the author leaves free to be 0


class Transform:
    """Smoothing in both directions, of every linear, at run time."""

    version = 1
    needs = ("abs_max_per_sequence",)
    stochastic = False
    activation_aware = False
    scheme_independent = True

    @dataclass(frozen=True)
    class Settings:
        """
        statistic  of the activations over sequences: max_med (median of their maxima, the lower of two) or max_max
        divisor    T: above 1 presses weights down further
        blocks     indices of the blocks to smooth; empty: all
        fold       one scale per norm, folded into it, instead of one per linear at run time
        """

        statistic: str = "max_med"
        divisor: float = 1.0
        blocks: tuple[int, ...] = ()
        fold: bool = False

        def __post_init__(self) -> None:
            if self.statistic not in STATISTICS:
                raise ValueError(f'no statistic "{self.statistic}"; known: {", ".join(STATISTICS)}')
            if not self.divisor > 0:
                raise ValueError(
                    f"divisor is {self.divisor}; it must be positive (leave the transform out to switch it off)"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Blocks that exist, and linears with inputs of their own, or norms to fold into."""
        reasons = []
        beyond = [index for index in self.settings.blocks if not 0 <= index < shapes.blocks]
        if beyond:
            reasons.append(
                f"the model has {shapes.blocks} blocks, so none of index {', '.join(map(str, beyond))}"
            )
        fused = [linear.name for linear in shapes.linears if linear.fused]
        if fused and not self.settings.fold:
            names = ", ".join(dict.fromkeys(fused))
            reasons.append(
                f"run-time scales need linears of their own; fused here: {names}; use fold=true"
            )
        if self.settings.fold and not any(pair.kind == "norm" for pair in shapes.pairs):
            reasons.append(f'family "{shapes.family}" states no norm whose output can be scaled')
        return reasons

    @torch.no_grad()
    def rewrite_block(self, block: BlockView, scheme: Scheme, rng: Generator) -> dict[str, Any]:
        """Smooth the block in place; notes: by linear or norm, the smallest and largest scale."""
        if self.settings.blocks and block.index not in self.settings.blocks:
            return {"scales": {}}
        notes: dict[str, Any] = {}
        if self.settings.fold:
            for pair in (pair for pair in block.shapes.pairs if pair.kind == "norm"):
                scales = self._scales(block, pair.consumers)
                fold_scales(block, pair, scales)
                notes[pair.producer] = {
                    "smallest": float(scales.min()),
                    "largest": float(scales.max()),
                }
            return {"scales": notes}
        for linear in block.shapes.linears:
            weight = block.linear(linear.name).weight
            scales = (
                self._scales(block, (linear.name,)).to(weight.dtype).float()
            )  # as it will be divided by
            weight.copy_(weight.float() * scales)
            block.set_input(linear.name, "input_scale", scales)
            notes[linear.name] = {"smallest": float(scales.min()), "largest": float(scales.max())}
        return {"scales": notes}

    def _scales(self, block: BlockView, names: tuple[str, ...]) -> Tensor:
        """s [in] of linears with one input."""
        maxima = block.evidence[names[0]]["abs_max_per_sequence"].float()
        activations = (
            maxima.median(0).values if self.settings.statistic == "max_med" else maxima.amax(0)
        )
        weights = torch.stack(
            [block.linear(name).weight.float().abs().amax(0) for name in names]
        ).amax(0)
        scales = (
            activations.clamp(min=SMALLEST) / (weights + SMALLEST)
        ).sqrt() / self.settings.divisor
        if not bool(torch.isfinite(scales).all()):
            raise MethodError(
                f"block {block.index}: the scales of {', '.join(names)} are not finite; load the model in a wider dtype "
                "(model.dtype=float32)"
            )
        return scales
