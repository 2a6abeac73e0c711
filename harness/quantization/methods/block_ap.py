"""Block-AP: weights, scales and zero points of a block are all trained so that the rounded block keeps its output.

EfficientQAT: Efficient Quantization-Aware Training for Large Language Models (arXiv 2407.11062), first phase; the second, scales
alone on the whole model, is the tuning `peqa`, and both together are `method: efficientqat`.
Objective: min over W, s, z of ||F(W, X) - F(W', X')||², F a decoder block, X its inputs in the full-precision model, X' its inputs
behind the quantized blocks, w' = s (clamp(round(w / s) + z, 0, Q) - z) per group of inputs, Q = 2^b - 1.

At first s = (max w - min w) / Q within [1e-4, 1e4] and z = round(-min w / s): the range need not hold zero. Every step uses s
clamped to these limits, and z rounded and clamped to the codes, both with the gradient of what is trained (straight through the
clamp too); codes pass gradients inside only. AdamW without decay, all sequences in order, rates on a cosine down to
1 / min_rate_factor of their start. The authors take two passes over 4,096 × 2,048 tokens; a few hundred sequences are learned by
heart.

Written from the published description; the authors' code states no licence. Where we differ from what is described: float32
instead of float16 autocast; scales are rounded to their storage type while they are trained; the scheme's activations, if it has
any, are rounded while the block is trained (theirs are not); no early stop on other sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Cell, Scheme
from harness.core.shapes import Shapes
from harness.quantization.methods.blockwise import (
    GRADIENT_SCALE,
    GroupedMatrix,
    activation_reasons,
    activation_rounding,
    block_loss,
    grouped_matrices,
    note_unreached,
)
from harness.quantization.methods.checks import check_uniform
from harness.quantization.methods.protocols import BlockView
from harness.quantization.numerics.grids import Grid, as_stored
from harness.quantization.numerics.training import nearest_between, through, train
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

SMALLEST_SCALE, LARGEST_SCALE = 1e-4, 1e4
FEW_TOKENS = 2_000_000  # below which the plan warns; published with 8.4 million


class Rounding:
    """Weights, scales and zero points, trained to keep each block's output."""

    version = 1
    needs = ("reference",)
    stochastic = False
    activation_aware = True
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        epochs           passes over the calibration sequences per block; 0: untrained
        batch            sequences per step
        weight_rate      first learning rate of the weights
        scale_rate       first learning rate of scales and zero points
        min_rate_factor  rates end at this fraction (1 / min_rate_factor) of the first ones
        train_weights, train_scales, train_zeros   what is trained
        """

        epochs: int = 2
        batch: int = 2
        weight_rate: float = 0.00001
        scale_rate: float = 0.0001
        min_rate_factor: float = 20.0
        train_weights: bool = True
        train_scales: bool = True
        train_zeros: bool = True

        def __post_init__(self) -> None:
            for name in ("epochs", "batch"):
                if getattr(self, name) < (least := int(name != "epochs")):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; it must be at least {least}"
                    )
            for name in ("weight_rate", "scale_rate"):
                if not getattr(self, name) >= 0:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
            if not self.min_rate_factor >= 1:
                raise ValueError(
                    f"min_rate_factor is {self.min_rate_factor}; it must be at least 1"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Asymmetric integers of 2 to 8 bits whose groups divide every layer; no static activations."""
        reasons = check_uniform(scheme, shapes, never_symmetric="Block-AP trains zero points")
        return reasons + activation_reasons(scheme)

    def warnings(self, cell: Cell, shapes: Shapes) -> list[str]:
        """Calibration data so small that a block learns it by heart."""
        calibration = cell.calibration
        if calibration is None or not self.settings.epochs:
            return []
        tokens = calibration.samples * calibration.length
        if tokens >= FEW_TOKENS:
            return []
        return [
            f"trains all weights on {tokens:,} tokens ({calibration.name}), and is published with 8.4 million; "
            "it may learn them by heart"
        ]

    def round_block(
        self, block: BlockView, scheme: Scheme, rng: Generator
    ) -> dict[str, QuantizedWeight]:
        """Quantize the block's linears.

        Peak memory: the block's matrices in float32 some eight times (weights, gradients, two moments, rounded weights and what
        their gradients need), and the activations of a batch.
        """
        settings, receive = self.settings, activation_rounding(block, scheme)
        linears = {
            name: _Trained(matrix) for name, matrix in grouped_matrices(block, scheme).items()
        }
        with torch.no_grad():
            first = {name: each.codes() for name, each in linears.items()}
        samples = len(block.inputs())

        def loss_of(step: int) -> Tensor:
            weights = {name: each.nearest() for name, each in linears.items()}
            batch = range(samples)[step * settings.batch : (step + 1) * settings.batch]
            losses = [block_loss(block, sample, weights, receive) for sample in batch]
            return torch.stack(losses).mean()

        losses = train(
            loss_of,
            -(-samples // settings.batch),
            self._groups(list(linears.values())),
            settings.epochs,
            f"block {block.index}",
            1 / settings.min_rate_factor,
            GRADIENT_SCALE,
        )
        with torch.no_grad():
            if losses:
                note_unreached(block)
                moved = sum(
                    int((each.codes() != first[name]).sum()) for name, each in linears.items()
                )
                total = sum(codes.numel() for codes in first.values())
                block.notes["block_ap"] = {"loss": losses, "codes_changed": moved / total}
            return {name: each.quantize() for name, each in linears.items()}

    def _groups(self, linears: list[_Trained]) -> list[dict[str, Any]]:
        settings = self.settings
        grids = [each.scale for each in linears] if settings.train_scales else []
        grids += [each.zero for each in linears] if settings.train_zeros else []
        groups = [{"params": grids, "lr": settings.scale_rate}]
        if settings.train_weights:
            weights = [each.weight for each in linears]
            groups.append({"params": weights, "lr": settings.weight_rate})
        return [group for group in groups if group["params"]]


class _Trained:
    """One matrix: weights [out, groups, g], scales and zero points [out, groups, 1], all trained."""

    def __init__(self, matrix: GroupedMatrix) -> None:
        self.matrix, self.top = matrix, 2 ** int(matrix.scheme.bits) - 1
        lo, hi = (end(matrix.groups, -1, keepdim=True) for end in (torch.amin, torch.amax))
        scale = ((hi - lo) / self.top).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        zero = torch.round((-lo / scale).clamp(-LARGEST_SCALE, LARGEST_SCALE))
        self.weight, self.scale, self.zero = map(nn.Parameter, (matrix.groups.clone(), scale, zero))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are used and stored, with the gradients of those that are trained."""
        scale = as_stored(
            self.scale.detach().clamp(SMALLEST_SCALE, LARGEST_SCALE), self.matrix.scheme.scale_dtype
        )
        zero = torch.round(self.zero.detach()).clamp(0, self.top)
        return through(scale, self.scale), through(zero, self.zero)

    def nearest(self) -> Tensor:
        """The rounded matrix [out, in], differentiable."""
        scale, zero = self.grid()
        return nearest_between(self.weight, scale, zero, self.top).reshape(self.matrix.shape)

    def codes(self) -> Tensor:
        """Codes [out, groups, g] of the weights that `nearest` returns."""
        scale, zero = self.grid()
        return Grid(scale, zero, int(self.matrix.scheme.bits)).quantize(self.weight)

    def quantize(self) -> UniformWeight:
        """The matrix as it is stored."""
        grid = Grid(*self.grid(), int(self.matrix.scheme.bits))
        return UniformWeight.from_grid(
            self.codes(), grid, symmetric=False, scale_dtype=self.matrix.scheme.scale_dtype
        )
