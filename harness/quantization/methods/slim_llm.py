"""SliM-LLM: GPTQ that takes a bit from the least salient groups and gives it to the most salient ones; ranges are searched.

SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large Language Models (arXiv 2405.14917). Their code states no licence;
this file is written from descriptions alone.

Per linear, with groups of g columns, base width b and Uᵀ U = (H + λ I)⁻¹ as in GPTQ:

1. salience of a group = sum over it of w² / U_jj².
2. For k = 1 … groups / 2 - 1: the k least salient groups at b - 1, the k most salient at b + 1; the k with the least divergence
   between softmaxes over the layer's outputs, before and after round-to-nearest, on the calibration sequences.
3. GPTQ with these widths. Each group's range is multiplied by p = 1, 1.002 … 1.1, 0.998 … 0.9; the least
   sum |w' - w|^2.4, with entries of a salience above 2 standard deviations weighted by salient_weight.
   Groups of one bit take mean ± mean|w|.

The mean width is always b, because uniform widths are not among the candidates. As in the authors' code the search adds 0.01 to
the diagonal of the Hessian, in their unit (twice the mean over sequences of the sum over tokens), and leaves it there: after a
search no column counts as dead any more, so the weights of dead columns stay in salience, ranges and codes. Without a search
(uniform widths, or fewer than four groups) nothing is added, and weights of dead columns become 0 as in GPTQ. salient_weight is 1
by default, so that salience has no effect on the range search.

Where we differ from the authors' code: a layer's bias is on neither side of the divergence (theirs has it on one); every group's
grid is asymmetric, as with their downloaded maps of widths (in a search from scratch their leading low groups start symmetric); a
layer of fewer than four groups has no candidate and keeps width b (theirs fails); scales are rounded to their storage type; a
weight on its group's mean takes the upper of two values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import check_uniform, refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.error_feedback import Columns, feed_forward
from harness.quantization.numerics.grids import from_range
from harness.quantization.numerics.hessians import damped, factored, inverse_factor
from harness.quantization.numerics.mixed_width import (
    MixedWidthWeight,
    binarize,
    group_salience,
    search_moved,
    widths_of,
)
from harness.quantization.numerics.weights import QuantizedWeight

ADDED = 0.01  # to the diagonal before the search, in the authors' unit
LEAST_GROUPS = 4  # a layer with fewer offers no pair of groups to the search
EXPONENT = 2.4


class Rounding:
    """Error-compensating rounding with a width per group."""

    version = 2
    needs = ("hessian", "inputs")
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        damping_fraction  of the mean diagonal, added to the diagonal of H; above 0
        search_widths     False: every group at the base width
        range_steps       ranges tried on either side of 1, in steps of 0.002; 0: ranges as they are
        salient_weight    of salient entries in the error of the range search
        """

        damping_fraction: float = 0.01
        search_widths: bool = True
        range_steps: int = 50
        salient_weight: float = 1.0

        def __post_init__(self) -> None:
            if not self.damping_fraction > 0:
                raise ValueError(f"damping_fraction is {self.damping_fraction}; it must be above 0")
            if not 0 <= self.range_steps < 500:
                raise ValueError(f"range_steps is {self.range_steps}; it must be from 0 to 499")
            if not self.salient_weight >= 0:
                raise ValueError(
                    f"salient_weight is {self.salient_weight}; it must not be negative"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Asymmetric integers of 2 to 4 bits in groups, four or more of them in some layer."""
        return check_uniform(
            scheme, shapes, bits=(2, 3, 4), never_symmetric="SliM-LLM's grids have zero points"
        ) + check_groups(scheme, shapes)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: six copies of weight, or four [in, in] while H is factored."""
        assert evidence is not None, "slim_llm needs the Hessian and the inputs"
        require_finite(weight)
        bits, size, settings = int(scheme.bits), scheme.group_size, self.settings
        inputs = evidence["inputs"]
        unit = 2.0 * inputs.shape[-2]  # the authors' Hessian over ours
        moved, fraction = 0, settings.damping_fraction
        if settings.search_widths and weight.shape[1] // size >= LEAST_GROUPS:
            before, factor = evidence.once(
                ("slim_llm search", fraction),
                lambda: search_factors(evidence["hessian"] * unit, fraction),
            )
            salience = group_salience(weight, before, size)
            moved = search_moved(weight, list(inputs), salience, bits, size, scheme.scale_dtype)
        else:
            found = evidence.once(
                ("slim_llm", fraction), lambda: factored(evidence["hessian"] * unit, fraction)
            )
            factor, weight = found.upper, weight.masked_fill(found.dead, 0)
        widths = widths_of(group_salience(weight, factor, size), bits, moved)
        return self._round(weight, factor, widths, scheme)

    def _round(
        self, weight: Tensor, factor: Tensor, widths: tuple[int, ...], scheme: WeightScheme
    ) -> MixedWidthWeight:
        rows, columns = weight.shape
        size = scheme.group_size
        scale = torch.empty(len(widths), rows, device=weight.device)
        offset = torch.empty_like(scale)
        codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)

        def round_column(column: int, matrix: Columns) -> Tensor:
            group, bits = column // size, widths[column // size]
            if column == matrix.start:
                diagonal = factor.diagonal()[column : column + size]
                fitted = self._fit(matrix.block, diagonal, bits, scheme.scale_dtype)
                scale[group], offset[group] = fitted[0][:, 0], fitted[1][:, 0]
            values, s, o = matrix[column], scale[group], offset[group]
            if bits == 1:
                code = (values >= o).float()
                codes[column] = code
                return o + s * (2 * code - 1)
            code = (torch.round(values / s) + o).clamp_(0, 2**bits - 1)
            codes[column] = code
            return s * (code - o)

        feed_forward(weight, factor, round_column, block_size=size)
        return MixedWidthWeight(
            codes.T.contiguous(),
            scale.T.contiguous(),
            offset.T.contiguous(),
            widths,
            scheme.scale_dtype,
        )

    def _fit(
        self, values: Tensor, diagonal: Tensor, bits: int, scale_dtype: str
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero point (mean, at one bit) of a group as it stands, values [out, g]: both [out, 1]."""
        if bits == 1:
            _, scale, mean = binarize(values, scale_dtype)
            return scale, mean
        importance: Tensor | float = 1.0
        if self.settings.salient_weight != 1:
            salience = (values / diagonal).square()
            salient = (salience - salience.mean()) > 2 * salience.std()
            importance = torch.where(salient, self.settings.salient_weight, 1.0)
        lo, hi = (
            values.amin(-1, keepdim=True).clamp(max=0),
            values.amax(-1, keepdim=True).clamp(min=0),
        )
        best: tuple[Tensor, Tensor] | None = None
        lowest = torch.full_like(lo, torch.inf)
        steps = [
            0,
            *range(1, self.settings.range_steps + 1),
            *range(-1, -self.settings.range_steps - 1, -1),
        ]
        for step in steps:
            factor = 1 + 0.002 * step
            grid = from_range(factor * lo, factor * hi, bits, False, "gptq", scale_dtype)
            error = ((grid.nearest(values) - values).abs_().pow_(EXPONENT) * importance).sum(
                -1, keepdim=True
            )
            better = error < lowest
            lowest = torch.where(better, error, lowest)
            if best is None:
                best = grid.scale, grid.zero
            else:
                best = (
                    torch.where(better, grid.scale, best[0]),
                    torch.where(better, grid.zero, best[1]),
                )
        assert best is not None
        return best


def search_factors(hessian: Tensor, damping_fraction: float) -> tuple[Tensor, Tensor]:
    """The upper triangular factors of the search and of the rounding after it, of a Hessian [in, in] in the authors' unit.

    Dead columns get a unit diagonal, then the whole diagonal 0.01 more, which the rounding's damping comes on top of.
    """
    searched, _ = damped(hessian, 0.0)
    searched.diagonal().add_(ADDED)
    return inverse_factor(searched), inverse_factor(damped(searched, damping_fraction)[0])


def check_groups(scheme: Scheme, shapes: Shapes) -> list[str]:
    """Reasons why groups cannot be moved between widths."""
    counts: list[int] = []

    def reasons(linear: LinearShape, weight: WeightScheme) -> list[str]:
        problems = []
        if weight.group_size < 1:
            problems.append(
                "SliM-LLM gives each group its own width; set a group_size (128 as published)"
            )
        else:
            counts.append(linear.in_features // weight.group_size)
        return problems

    found = refusals(scheme, shapes, reasons)
    if not found and counts and max(counts) < LEAST_GROUPS:
        found.append(
            f"no layer has four groups (the most is {max(counts)}), so no width could be moved; use a smaller group_size"
        )
    return found
