"""QA-LoRA: adapters that see one mean per quantization group, so that they merge exactly into the zero points.

QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models (arXiv 2309.14717), eq. 4 and algorithm 1.
Objective: min over A, B of the cross-entropy of answers to instructions with y = x W'ᵀ + α/r · (p Aᵀ) Bᵀ, W' = s (q - z) on integer
grids, p [groups] the mean of x over each group of columns that share a scale, A [r, groups], B [out, r]. The change of W' is then
one number per row and group, so that after training z ← z - (α/r · B A) / g / s with g columns per group: the same integers, the
same function, no adapter left. A is drawn uniformly within √(6 / (r + groups)), B is 0 at first.

Defaults as in the authors' code (yuhuixu1993/qa-lora): rank 64, α 16, all linears, AdamW at a constant 2e-4, 10,000 steps of 16
texts; their base is GPTQ, asymmetric, in groups of 32, columns in their order, which is `method: qa_lora`.

Where we differ: the prompt and answer lengths, the loss and the order of texts are those of QLoRA here, described there (theirs
keep 1,024 and 256 tokens); merged zero points are rounded to zero_dtype, with float32 nothing is lost; other groupings work too,
columns out of order (act order) among them; GPTQ is calibrated on windows of the very texts that are trained on, since a cell has
one text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Scheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_uniform
from harness.quantization.numerics.adapters import (
    AdapterTuning,
    LowRankLinear,
    LowRankSettings,
    check_dtype,
    low_rank,
)
from harness.quantization.numerics.grids import as_stored
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight


class Tuning(AdapterTuning):
    """Fine-tuning of adapters of group means, merged at the end."""

    version = 1
    needs = ("documents",)
    stochastic = True
    activation_aware = False
    settings: Settings

    @dataclass(frozen=True)
    class Settings(LowRankSettings):
        """zero_dtype: in which merged zero points are stored: float16, bfloat16 or float32."""

        zero_dtype: str = "float16"

        def __post_init__(self) -> None:
            super().__post_init__()
            check_dtype("zero_dtype", self.zero_dtype)

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Integer grids of 2 to 8 bits whose groups divide every layer; `linears` must name linears of the model."""
        return check_uniform(scheme, shapes) + self.unknown_linears(
            [linear.name for linear in shapes.linears]
        )

    def linear(
        self, name: str, weight: QuantizedWeight, bias: Tensor | None, original: Tensor | None
    ) -> nn.Module:
        """The quantized linear with an adapter of its groups' means, or frozen where it gets none. Only of integer grids."""
        if not isinstance(weight, UniformWeight):
            raise MethodError(
                f'QA-LoRA merges into zero points of integer grids; "{weight.kind}" has none; use rounding=gptq'
            )
        return super().linear(name, weight, bias, original)

    def adapted(self, weight: QuantizedWeight, bias: Tensor | None) -> LowRankLinear:
        """Factors as wide as there are groups."""
        assert isinstance(weight, UniformWeight)
        return _PooledLinear(weight, bias, self.settings)


class _PooledLinear(LowRankLinear):
    """x W'ᵀ + b + α/r · (p Aᵀ) Bᵀ with p the mean of x over each group of columns."""

    def __init__(
        self, weight: UniformWeight, bias: Tensor | None, settings: Tuning.Settings
    ) -> None:
        super().__init__(weight, bias, settings, weight.scale.shape[1])
        self.grid, self.zero_dtype = weight, settings.zero_dtype
        order = (
            None if weight.column_group is None else torch.argsort(weight.column_group, stable=True)
        )
        self.register_buffer("order", order, persistent=False)

    def start(self, rng: Generator) -> None:
        """A as Xavier draws it, B 0."""
        super().start(rng)
        with torch.no_grad():
            bound = (6 / sum(self.down.shape)) ** 0.5
            self.down.copy_((2 * torch.rand(self.down.shape, generator=rng) - 1) * bound)

    def pool(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., groups]"""
        ordered = x if self.order is None else x[..., self.order]  # type: ignore[index]
        return ordered.unflatten(-1, (self.grid.scale.shape[1], -1)).mean(-1)

    def change(self, x: Tensor) -> Tensor:
        return low_rank(self.drop(self.pool(x)), self.down, self.up, self.scaling)

    @torch.no_grad()
    def stored(self) -> UniformWeight:
        """The same integers and scales; zero points hold the adapter."""
        grid = self.grid
        zero = torch.full_like(grid.scale, 2 ** (grid.bits - 1)) if grid.zero is None else grid.zero
        change = self.scaling * (self.up @ self.down).detach().cpu() / grid.group_size
        moved = zero - change.to(zero.device) / grid.scale
        merged = as_stored(moved, self.zero_dtype)
        if not bool((moved.abs() <= merged.abs().clamp(min=1) * 1.01).all()):
            raise MethodError(
                f"a merged zero point is {float(moved.abs().max()):.3g}, beyond {self.zero_dtype} or not finite; "
                "set tuning.zero_dtype=float32, or lower the learning rate"
            )
        return dataclasses.replace(grid, zero=merged)
