"""PB-LLM: most weights become a sign with the row's mean and scale, the salient few keep 8 bits, inside GPTQ's loop.

PB-LLM: Partially Binarized Large Language Models (arXiv 2310.00034), §3.2 (post-training part, "GPTQ-PB").
Objective: GPTQ's, min ||W X - W' X||². A weight is binarized when its salience, w² / d² with d_j = U_jj of the damped inverse
Hessian (or |w|), is among the `low_fraction` smallest of its group of columns, all rows together. For those, per row and group,

    μ = mean(v), a = mean|v - μ|, w' = μ + a sign(w - μ)          v: the group's weights with the salient ones set to 0

The others go to GPTQ's asymmetric 8-bit grid per output row. The quantization-aware half of the paper is not this file.

Bits. Papers count b = f + 8 (1 - f) (f = 0.9: 1.7), which leaves out the bitmap that tells the two kinds apart (1 bit) and all
statistics. scheme.weight.bits is that nominal b, and gives f = (8 - b) / 7 unless low_fraction is set; `bits_per_weight` counts
everything (2.7 and more), `nominal_bits` of a weight gives b as it came out.

As in the authors' code: statistics and masks come from the weights before any update, zeros at salient places included (this pulls
μ to 0 and shrinks a by about f); the 8-bit grid is fitted before dead columns are set to 0. Where we differ: a weight equal to μ
becomes μ + a (there μ); f = 1 binarizes everything (there an index error); groups need not be multiples of 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import refusals, require_finite
from harness.quantization.methods.evidence import shared_factor
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.error_feedback import Columns, feed_forward
from harness.quantization.numerics.grids import SCALE_DTYPES, Grid, as_stored, fit
from harness.quantization.numerics.hessians import Factor
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import QuantizedWeight

HIGH_BITS = 8


@dataclass(frozen=True)
class PartlyBinaryWeight(QuantizedWeight):
    """mean ± scale where `low`, high_scale · (code - high_zero) elsewhere.

    low          [out, in] bool
    codes        [out, in] uint8: 0 or 1 (minus, plus) where low, 0 … 255 elsewhere
    mean, scale  [out, groups] float32
    high_scale   [out, 1] float32, high_zero [out, 1] float32 holding integers 0 … 255
    """

    kind = "partly_binary"
    low: Tensor
    codes: Tensor
    mean: Tensor
    scale: Tensor
    high_scale: Tensor
    high_zero: Tensor
    scale_dtype: str = "float16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nominal_bits(self) -> float:
        """As papers count: 1 bit per binarized weight, 8 per salient one, nothing else."""
        low = float(self.low.float().mean())
        return low + HIGH_BITS * (1 - low)

    def dequantize(self) -> Tensor:
        size = self.shape[1] // self.mean.shape[1]
        mean, scale = self.mean.repeat_interleave(size, 1), self.scale.repeat_interleave(size, 1)
        codes = self.codes.float()
        return torch.where(
            self.low, mean + scale * (2 * codes - 1), self.high_scale * (codes - self.high_zero)
        )

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        target = SCALE_DTYPES[self.scale_dtype]
        tensors = {
            "low": pack(self.low.to(torch.uint8), 1),
            "signs": pack(self.codes[self.low], 1),
            "codes": self.codes[~self.low].contiguous(),
            "high_zero": self.high_zero.to(torch.uint8).contiguous(),
        }
        tensors |= {
            name: getattr(self, name).to(target).contiguous()
            for name in ("mean", "scale", "high_scale")
        }
        return tensors, {"shape": list(self.shape), "scale_dtype": self.scale_dtype}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        low = unpack(tensors["low"], 1, rows * columns).reshape(rows, columns).bool()
        codes = torch.empty(rows, columns, dtype=torch.uint8, device=low.device)
        codes[low] = unpack(tensors["signs"], 1, int(low.sum()))
        codes[~low] = tensors["codes"]
        mean, scale, high_scale, high_zero = (
            tensors[name].float() for name in ("mean", "scale", "high_scale", "high_zero")
        )
        return cls(low, codes, mean, scale, high_scale, high_zero, meta["scale_dtype"])


class Rounding:
    """Binary weights beside 8-bit salient ones, with error feedback."""

    version = 1
    needs = ("hessian",)
    stochastic = False
    activation_aware = False

    @dataclass(frozen=True)
    class Settings:
        """
        low_fraction      share of the weights that is binarized, 0 to 1; None: from the scheme's bits
        salience          hessian: w² / d²; magnitude: |w|
        feedback          GPTQ's updates; False rounds the weights as they are ("disable_gptq")
        damping_fraction  of the mean diagonal, added to the diagonal of H
        block_size        columns between two products; changes the order of float sums only
        sequential        rounds a block's linears in four steps, each seeing the rounded ones before it
        """

        low_fraction: float | None = None
        salience: str = "hessian"
        feedback: bool = True
        damping_fraction: float = 0.01
        block_size: int = 128
        sequential: bool = False

        def __post_init__(self) -> None:
            if self.low_fraction is not None and not 0 <= self.low_fraction <= 1:
                raise ValueError(f"low_fraction is {self.low_fraction}; it must be from 0 to 1")
            if self.salience not in ("hessian", "magnitude"):
                raise ValueError(f'no salience "{self.salience}"; known: hessian, magnitude')
            if not self.damping_fraction > 0 or self.block_size < 1:
                raise ValueError(
                    f"damping_fraction={self.damping_fraction}, block_size={self.block_size}; both must be positive"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """1 to 8 nominal bits that agree with low_fraction; groups that divide every layer."""
        given = self.settings.low_fraction
        made = None if given is None else given + HIGH_BITS * (1 - given)

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.format != "int":
                yield f'format "{weight.format}" is not integer codes; use scheme.weight.format=int'
            if not 1 <= weight.bits <= HIGH_BITS:
                yield f"PB-LLM mixes 1 and 8 bits, and cannot make {weight.bits:g}"
            elif made is not None and abs(made - weight.bits) > 0.05:
                yield (
                    f"low_fraction {given:g} makes {made:.3g} nominal bits, the scheme says {weight.bits:g}; "
                    "leave low_fraction at null to follow the scheme"
                )
            if weight.scale_dtype not in SCALE_DTYPES:
                yield f'no scale_dtype "{weight.scale_dtype}"; known: {", ".join(SCALE_DTYPES)}'
            size = weight.group_size
            if size != -1 and (size < 2 or linear.in_features % size):
                yield f"group_size {size} does not divide the inputs"

        return refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: six copies of weight, and four [in, in] while H is factored."""
        return _round(
            weight,
            shared_factor(weight, evidence, self.settings.damping_fraction),
            scheme,
            self.settings,
        )

    def round_unseen(
        self, name: str, weight: Tensor, scheme: WeightScheme, rng: Generator
    ) -> QuantizedWeight:
        """A matrix that too few tokens reached, such as an expert's: salience by magnitude, and no feedback."""
        require_finite(weight)
        return _round(
            weight,
            Factor.uncalibrated(weight),
            scheme,
            replace(self.settings, salience="magnitude", feedback=False),
        )


def _round(
    weight: Tensor, factor: Factor, scheme: WeightScheme, settings: Rounding.Settings
) -> QuantizedWeight:
    high = fit(weight, HIGH_BITS, False, "gptq", scheme.scale_dtype)
    weight = weight.masked_fill(factor.dead, 0)
    rows, columns = weight.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    fraction = settings.low_fraction
    if fraction is None:
        fraction = (HIGH_BITS - float(scheme.bits)) / (HIGH_BITS - 1)
    salience = (
        weight.abs()
        if settings.salience == "magnitude"
        else (weight / factor.upper.diagonal()).square()
    )
    low = torch.cat([least(part, fraction) for part in salience.split(size, dim=1)], dim=1)

    masked = (weight * low).reshape(rows, -1, size)
    mean = as_stored(masked.mean(-1), scheme.scale_dtype)  # [out, groups]
    scale = as_stored((masked - mean.unsqueeze(-1)).abs().mean(-1), scheme.scale_dtype)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)

    def round_column(column: int, view: Columns) -> Tensor:
        w, group = view[column], column // size
        is_low, plus = low[:, column], w >= mean[:, group]
        high_codes = _column_codes(high, w)
        codes[:, column] = torch.where(is_low, plus.to(high_codes.dtype), high_codes)
        binary = mean[:, group] + torch.where(plus, scale[:, group], -scale[:, group])
        return torch.where(is_low, binary, high.scale[:, 0] * (high_codes - high.zero[:, 0]))

    if settings.feedback:
        feed_forward(weight, factor.upper, round_column, block_size=settings.block_size)
    else:
        view = Columns(weight, weight, 0)
        for column in range(columns):
            round_column(column, view)
    return PartlyBinaryWeight(low, codes, mean, scale, high.scale, high.zero, scheme.scale_dtype)


def _column_codes(grid: Grid, column: Tensor) -> Tensor:
    """Codes of one column [out] on per-row grids."""
    return grid.quantize(column.unsqueeze(1))[:, 0]


def least(salience: Tensor, fraction: float) -> Tensor:
    """The weights up to and with the one at place int(fraction · size) of ascending salience; all of them at fraction 1."""
    size = salience.numel()
    place = int(fraction * size)
    if place >= size:
        return torch.ones_like(salience, dtype=torch.bool)
    return salience <= salience.reshape(-1).kthvalue(place + 1).values
