"""AutoRound: every weight's rounding offset and every group's range are learned block by block, by the signs of gradients.

Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs (SignRound, arXiv 2309.05516).
Objective: min over V, α, β of ||F(W, X) - F(W', X')||², F a decoder block, X its inputs in the full-precision model, X' its inputs
behind the quantized blocks. Per group, with lo = min(min w, 0) and hi = max(max w, 0):

    asymmetric   s = (β hi - α lo) / (2^b - 1)   z = round(-α lo / s)   w' = s (clamp(round(w / s + V) + z, 0, 2^b - 1) - z)
    symmetric    s = -m / 2^(b-1), m of α lo and β hi the larger in magnitude   z = 2^(b-1), w' alike

V starts at 0, α and β at 1. Gradients pass rounding straight through, that of z and of the stored scale too, and clamps inside
only. Every iteration moves p by -rate (1 - t / iterations) sign(gradient), after α and β were clamped to [0, 1]. With rate =
1 / iterations no V leaves ±½ by more than 1 / (2 iterations), which is the paper's bound. keep `best`, as published, is the
iteration with the lowest loss of its own batch, though losses of different sequences are compared; `best_of_all`, ours, compares
the loss over all sequences every ten iterations.

Symmetric schemes have signed_scales (w4g128signed): the entry of largest magnitude is exact and half of the scales are negative, as
in the authors' code; the paper has ordinary grids. The activations of the scheme, if it has any, are rounded while the block is
trained. Where we differ from the authors' code: the smallest scale is the smallest normal number of its type (theirs: 1e-5 in
float16); calibration windows have no padding that a loss would mask; "SignRound v2" (scales from a search, outliers left out of the
loss) is not here. Experts that no token reached stay at their nearest codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Scheme
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
from harness.quantization.numerics.grids import SIGNED, Grid, from_range
from harness.quantization.numerics.training import nearest_between, round_through, sign_steps
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight


class Rounding:
    """Rounding offsets and ranges, learned to keep each block's output."""

    version = 1
    needs = ("reference",)
    stochastic = True
    activation_aware = True
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        iterations   steps per block; 0: nearest codes
        batch        sequences per step; all where there are fewer
        rate         step of V, in units of the grid; 0: 1 / iterations
        range_rate   step of α and β; 0: as rate
        ranges       learn α and β
        keep         best (lowest loss of a batch), best_of_all (lowest loss over all sequences, every check_every steps), last
        check_every  steps between two losses over all sequences
        """

        iterations: int = 200
        batch: int = 8
        rate: float = 0.0
        range_rate: float = 0.0
        ranges: bool = True
        keep: Literal["best", "best_of_all", "last"] = "best"
        check_every: int = 10

        def __post_init__(self) -> None:
            for name in ("iterations", "batch", "check_every"):
                if getattr(self, name) < (least := int(name != "iterations")):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; it must be at least {least}"
                    )
            for name in ("rate", "range_rate"):
                if not getattr(self, name) >= 0:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
            if self.keep not in ("best", "best_of_all", "last"):
                raise ValueError(f'no keep "{self.keep}"; known: best, best_of_all, last')

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Integers of 2 to 8 bits whose groups divide every layer, symmetric ones with signed scales; no static activations."""
        return check_uniform(scheme, shapes, signed=(True,)) + activation_reasons(scheme)

    def round_block(
        self, block: BlockView, scheme: Scheme, rng: Generator
    ) -> dict[str, QuantizedWeight]:
        """Quantize the block's linears.

        Peak memory: the block's matrices in float32 some ten times (weights, offsets, their gradients and best copies, rounded
        weights, what their gradients need), and the activations of one sequence.
        """
        settings = self.settings
        linears = {
            name: _Offsets(matrix) for name, matrix in grouped_matrices(block, scheme).items()
        }
        if settings.iterations:
            self._train(block, scheme, linears, rng)
        with torch.no_grad():
            return {name: each.quantize() for name, each in linears.items()}

    def _train(
        self, block: BlockView, scheme: Scheme, linears: dict[str, _Offsets], rng: Generator
    ) -> None:
        settings, receive = self.settings, activation_rounding(block, scheme)
        samples = len(block.inputs())

        def batch_loss(batch: Sequence[int]) -> Tensor:
            # gradients of the matrices first, sequence by sequence, then once those of the offsets and ranges
            rounded = {name: each.nearest() for name, each in linears.items()}
            leaves = {name: value.detach().requires_grad_() for name, value in rounded.items()}
            losses = []
            for sample in batch:
                loss = block_loss(block, sample, leaves, receive) / len(batch)
                # of their gradients the signs alone matter
                (GRADIENT_SCALE * loss).backward(inputs=list(leaves.values()))
                losses.append(loss.detach())
            reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
            torch.autograd.backward(
                [rounded[name] for name in reached], [leaves[name].grad for name in reached]
            )
            return torch.stack(losses).sum()

        @torch.no_grad()
        def whole_loss() -> Tensor:
            rounded = {name: each.nearest() for name, each in linears.items()}
            every = [block_loss(block, sample, rounded, receive) for sample in range(samples)]
            return torch.stack(every).mean()

        rate = settings.rate or 1 / settings.iterations
        groups = [{"params": [each.offset for each in linears.values()], "lr": rate}]
        if settings.ranges:
            factors = [factor for each in linears.values() for factor in (each.lower, each.upper)]
            groups.append(
                {"params": factors, "lr": settings.range_rate or rate, "range": (0.0, 1.0)}
            )
        descent = sign_steps(
            batch_loss,
            whole_loss,
            samples,
            groups,
            iterations=settings.iterations,
            batch=settings.batch,
            rng=rng,
            keep=settings.keep,
            check_every=settings.check_every,
            what=f"block {block.index}",
        )
        note_unreached(block)
        with torch.no_grad():
            moved = sum(int(each.moved().sum()) for each in linears.values())
        block.notes["autoround"] = {
            "loss": descent.losses,
            "initial_loss": descent.first,
            "kept_iteration": descent.kept,
            "codes_off_nearest": moved / sum(each.offset.numel() for each in linears.values()),
        }


class _Offsets:
    """One matrix with the offsets of its weights V [out, groups, g] and the factors of its ranges α, β [out, groups, 1]."""

    def __init__(self, matrix: GroupedMatrix) -> None:
        self.matrix, self.bits = matrix, int(matrix.scheme.bits)
        groups = matrix.groups
        self.lo = groups.amin(-1, keepdim=True).clamp(max=0)
        self.hi = groups.amax(-1, keepdim=True).clamp(min=0)
        # groups of zeros stay zeros
        self.holds_weights = (self.lo < self.hi).float()
        self.offset = nn.Parameter(torch.zeros_like(groups))
        self.lower = nn.Parameter(torch.ones_like(self.lo))
        self.upper = nn.Parameter(torch.ones_like(self.lo))

    def grid(self) -> Grid:
        """The grids as they stand, differentiable in the factors: scale [out, groups, 1], zero alike."""
        scheme = self.matrix.scheme
        lo, hi = self.lower * self.lo, self.upper * self.hi
        convention = SIGNED if scheme.symmetric else "gptq"
        grid = from_range(lo, hi, self.bits, scheme.symmetric, convention, scheme.scale_dtype)
        if scheme.symmetric:
            return grid
        scale = grid.scale.clamp(min=torch.finfo(torch.float32).tiny)
        return Grid(scale, round_through(-lo / scale), self.bits)

    def nearest(self) -> Tensor:
        """The rounded matrix [out, in], differentiable in V, α and β."""
        grid = self.grid()
        offset = self.offset * self.holds_weights
        rounded = nearest_between(self.matrix.groups, grid.scale, grid.zero, grid.top, offset)
        return rounded.reshape(self.matrix.shape)

    def codes(self, grid: Grid) -> Tensor:
        """Codes [out, groups, g] of the weights that `nearest` returns."""
        steps = torch.round(self.matrix.groups / grid.scale + self.offset * self.holds_weights)
        return (steps + grid.zero).clamp(0, grid.top)

    def moved(self) -> Tensor:
        """Which codes are not the nearest ones of their grid, [out, groups, g] bool."""
        grid = self.grid()
        return self.codes(grid) != grid.quantize(self.matrix.groups)

    def quantize(self) -> UniformWeight:
        """The matrix as it is stored."""
        grid, scheme = self.grid(), self.matrix.scheme
        return UniformWeight.from_grid(
            self.codes(grid), grid, symmetric=scheme.symmetric, scale_dtype=scheme.scale_dtype
        )
