"""SliM-LLM+: SliM-LLM's widths per group, with ranges trained block by block instead of GPTQ.

SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large Language Models (arXiv 2405.14917), its variant on OmniQuant
(arXiv 2308.13137). Their code states no licence; this file is written from descriptions alone.

Per linear the widths of SliM-LLM: salience of a group = sum of w² / U_jj², the least and most salient groups one bit down and up,
as many as give the least divergence of the layer's output. Then, per block, min over γ, β of ||F(W, X) - F(Q(W), X')||²: every
group of 2 bits and more lies on the asymmetric grid over [sigmoid(β) min w, sigmoid(γ) max w], γ = β = 4 at first. Groups of one
bit take mean ± mean|w| and have nothing to train; the descriptions do not say what theirs do.
Where we differ: as in slim_llm and omniquant, whose remarks hold here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import check_uniform, refusals, require_finite
from harness.quantization.methods.protocols import BlockView, Evidence
from harness.quantization.numerics.grids import Grid
from harness.quantization.numerics.hessians import damped, inverse_factor
from harness.quantization.numerics.mixed_width import (
    MixedWidthWeight,
    binarize,
    group_salience,
    search_moved,
    widths_of,
)
from harness.quantization.numerics.training import clipped_grid, nearest_through, train
from harness.quantization.numerics.weights import QuantizedWeight

INITIAL_STRENGTH = 4.0


class Rounding:
    """Widths by salience, ranges by training."""

    version = 1
    needs = ("hessian", "inputs", "reference")
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        epochs            passes over the calibration sequences per block; 0: untrained
        clip_rate         learning rate of the clipping strengths
        augmented_loss    add the distance to the full-precision block on the quantized inputs
        damping_fraction  of the mean diagonal, added to the diagonal of H for the salience; above 0
        """

        epochs: int = 20
        clip_rate: float = 0.01
        augmented_loss: bool = False
        damping_fraction: float = 0.01

        def __post_init__(self) -> None:
            if self.epochs < 0:
                raise ValueError(f"epochs is {self.epochs}; it must be 0 or more")
            if not self.clip_rate > 0:
                raise ValueError(f"clip_rate is {self.clip_rate}; it must be above 0")
            if not self.damping_fraction > 0:
                raise ValueError(f"damping_fraction is {self.damping_fraction}; it must be above 0")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Asymmetric integers of 2 to 4 bits in groups."""

        def reasons(_linear: LinearShape, weight: WeightScheme) -> list[str]:
            grouped = weight.group_size > 0
            return (
                []
                if grouped
                else [
                    "SliM-LLM gives each group its own width; set a group_size (128 as published)"
                ]
            )

        word = "SliM-LLM's grids have zero points"
        return check_uniform(scheme, shapes, bits=(2, 3, 4), never_symmetric=word) + refusals(
            scheme, shapes, reasons
        )

    def round_block(
        self, block: BlockView, scheme: Scheme, rng: Generator
    ) -> dict[str, QuantizedWeight]:
        """Quantize the block's linears. Peak memory: the block in float32 four times, or one Hessian's factorisation."""
        settings = self.settings
        matrices: dict[str, _Matrix] = {}
        for shape in block.shapes.linears:
            weight = block.linear(shape.name).weight.detach()
            require_finite(weight, shape.name)
            own = scheme.weight_for(block.index, shape.name)
            try:
                widths = self._widths(weight.float(), block.evidence[shape.name], own)
            except MethodError as error:
                raise MethodError(f"{shape.name}: {error}") from error
            matrices[shape.name] = _Matrix(weight.float(), widths, own)
        dtypes = {name: block.linear(name).weight.dtype for name in matrices}
        inputs, references = block.inputs(), block.references()
        again: list[Tensor] = []
        if settings.augmented_loss and settings.epochs:
            with torch.no_grad():
                again = [block.run(hidden).to(hidden.device) for hidden in inputs]

        def loss_of(sample: int) -> Tensor:
            weights = {
                f"{name}.weight": matrix.nearest().to(dtypes[name])
                for name, matrix in matrices.items()
            }
            output = block.run(inputs[sample], weights).float()
            loss = (output - references[sample].to(output.device).float()).square().mean()
            if again:
                loss = loss + (output - again[sample].to(output.device).float()).square().mean()
            return loss

        groups = [
            {
                "params": [p for matrix in matrices.values() for p in matrix.strengths()],
                "lr": settings.clip_rate,
            }
        ]
        losses = train(loss_of, len(inputs), groups, settings.epochs, f"block {block.index}")
        if losses:
            block.notes["slim_llm_plus"] = {"loss": losses}
        with torch.no_grad():
            return {name: matrix.quantize() for name, matrix in matrices.items()}

    def _widths(self, weight: Tensor, evidence: Evidence, scheme: WeightScheme) -> tuple[int, ...]:
        bits, size, fraction = int(scheme.bits), scheme.group_size, self.settings.damping_fraction
        factor = evidence.once(
            ("factor of the original order", fraction),
            lambda: inverse_factor(damped(evidence["hessian"], fraction)[0]),
        )
        salience = group_salience(weight, factor, size)
        return widths_of(
            salience,
            bits,
            search_moved(
                weight, list(evidence["inputs"]), salience, bits, size, scheme.scale_dtype
            ),
        )


class _Matrix:
    """One weight with a width per group, and the clipping strengths of its groups of 2 bits and more, by width."""

    def __init__(self, weight: Tensor, widths: tuple[int, ...], scheme: WeightScheme) -> None:
        self.groups = weight.reshape(weight.shape[0], len(widths), -1)
        self.widths, self.scheme = widths, scheme
        self.members = {
            w: [g for g, width in enumerate(widths) if width == w] for w in sorted(set(widths))
        }
        self.upper, self.lower = (
            {
                w: nn.Parameter(
                    torch.full((weight.shape[0], len(m), 1), INITIAL_STRENGTH, device=weight.device)
                )
                for w, m in self.members.items()
                if w > 1
            }
            for _ in range(2)
        )

    def strengths(self) -> list[nn.Parameter]:
        return [*self.upper.values(), *self.lower.values()]

    def nearest(self) -> Tensor:
        """The matrix as it stands, [out, in], differentiable."""
        parts: list[Tensor | None] = [None] * len(self.widths)
        for width, members in self.members.items():
            values = self.groups[:, members]
            if width == 1:
                codes, scale, mean = binarize(values, self.scheme.scale_dtype)
                found = mean + scale * (2 * codes.float() - 1)
            else:
                found = nearest_through(values, self._grid(width, values))
            for position, group in enumerate(members):
                parts[group] = found[:, position]
        return torch.cat([part for part in parts if part is not None], dim=1)

    def quantize(self) -> MixedWidthWeight:
        """The codes of the weights that `nearest` returns."""
        rows, count, _ = self.groups.shape
        codes = torch.empty_like(self.groups, dtype=torch.uint8)
        scale = torch.empty(rows, count, device=codes.device)
        offset = torch.empty_like(scale)
        for width, members in self.members.items():
            values = self.groups[:, members]
            if width == 1:
                part, s, o = binarize(values, self.scheme.scale_dtype)
            else:
                grid = self._grid(width, values)
                part, s, o = grid.quantize(values).to(torch.uint8), grid.scale, grid.zero
            codes[:, members], scale[:, members], offset[:, members] = part, s[..., 0], o[..., 0]
        return MixedWidthWeight(
            codes.reshape(rows, -1), scale, offset, self.widths, self.scheme.scale_dtype
        )

    def _grid(self, width: int, values: Tensor) -> Grid:
        return clipped_grid(
            values,
            self.upper[width],
            self.lower[width],
            width,
            False,
            "omniquant",
            self.scheme.scale_dtype,
        )
