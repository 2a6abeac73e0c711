"""FineQuant-style adaptive granularity: each matrix chooses its own group size by how much finer groups shrink the range.

FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs (arXiv 2308.09723). The authors published no
code; their abstract and secondary summaries state the idea (data-free; groups per matrix refined where outliers would collapse
the precision). The rule below is this project's definition in that spirit, and results should be called "FineQuant-style".

Objective: the coarsest groups whose range no longer falls sharply when halved. R_g(row) = mean over the row's groups of max|w|,
from g = in: accept g / 2 while the 99.9th percentile over rows of 1 - R_{g/2} / R_g exceeds alpha, g / 2 divides the row and is at
least minimum_group. (Halving a normally distributed row shrinks R by 5 to 10 %, a row ruled by one outlier by nearly a half.)
Then q = round(w / s) with s = max|w| / (2^(bits-1) - 1) per row and group; code -2^(bits-1) is unused.
The group size is a result: each layer has it as `UniformWeight.group_size`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_uniform, refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.grids import from_range
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight


class Rounding:
    """Round to nearest with a group size chosen per matrix."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        alpha          share of the range that halving the groups must take off; 1: never halved, 0 or less: always
        minimum_group  the finest group size; 64 suits the kernels of the paper
        """

        alpha: float = 0.3
        minimum_group: int = 64

        def __post_init__(self) -> None:
            if self.minimum_group < 2:
                raise ValueError(f"minimum_group is {self.minimum_group}; it must be at least 2")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Symmetric integers of 3, 4 or 8 bits; the group size is the method's to choose."""

        def reasons(linear: object, weight: WeightScheme) -> list[str]:
            problems = []
            if not weight.symmetric:
                problems.append("FineQuant has no zero points; use symmetric=true")
            if weight.group_size != -1:
                problems.append(
                    f"FineQuant chooses its groups; leave group_size at -1 instead of {weight.group_size}"
                )
            return problems

        return check_uniform(scheme, shapes, bits=(3, 4, 8)) + refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: three copies of weight."""
        require_finite(weight)
        size = choose_group_size(weight, self.settings.alpha, self.settings.minimum_group)
        bits = int(scheme.bits)
        grouped = weight.reshape(weight.shape[0], -1, size)
        largest = grouped.abs().amax(-1, keepdim=True)
        grid = from_range(
            -largest,
            largest,
            bits,
            symmetric=True,
            convention="awq",
            scale_dtype=scheme.scale_dtype,
        )
        codes = grid.quantize(grouped).clamp_(min=1)
        return UniformWeight.from_grid(codes, grid, symmetric=True, scale_dtype=scheme.scale_dtype)


def choose_group_size(weight: Tensor, alpha: float, minimum_group: int) -> int:
    """The group size of one matrix [out, in]; in · 2^-i, never below minimum_group. It does not depend on the bits."""
    size = weight.shape[1]
    magnitude = weight.abs()
    spread = magnitude.amax(1)  # R_g, [out]
    while size % 2 == 0 and size // 2 >= minimum_group:
        finer = magnitude.reshape(weight.shape[0], -1, size // 2).amax(-1).mean(1)
        shrink = torch.where(spread > 0, 1 - finer / spread, 0.0)
        if not float(torch.quantile(shrink, 0.999)) > alpha:
            break
        size, spread = size // 2, finer
    return size
