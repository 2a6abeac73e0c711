"""BiLLM: one bit per weight; salient columns get a second one, the others two scales chosen by magnitude.

BiLLM: Pushing the Limit of Post-Training Quantization for LLMs (arXiv 2402.04291), algorithms 1 and 2.
Objective: per block of `group_size` columns, min ||W - W'||² over three masks, with GPTQ's errors passed on to later blocks. B(v)
binarizes the masked entries of each row, v' = μ + a sign(v - μ) with μ = mean(v), a = mean|v - μ| (eqs. 2–4); twice for salient
columns, the second time what the first left over (eq. 8). On S = w² / d² (or w), the search takes in turn

    the k columns with the largest sum of |S|, k ≤ 49:    least ||S - B²(salient) - B²(others)||²      salient columns
    one of the 81 quantiles 0.10 … 0.90 of |S| elsewhere: least ||S - B(below) - B(above) - B²(salient)||²      the split

and W' = B(below) + B(above) + B²(salient), now of W. A block sees the errors of earlier blocks, none of its own (no update inside).

Bits. Papers count 1 bit, and 2 in salient columns: 1.08 or so, `nominal_bits` of a weight. Not in that count: the bitmap of the
split (1 bit) and 4 means and 4 scales per row and block (1 bit at 128 columns). `bits_per_weight` counts everything: about 3.1.

As in the authors' code: the search runs on S and not on W, the non-salient part of the first search is binarized twice too, zeros
in salient places count in the quantiles. Where we differ: an entry equal to its mean takes +a (there the mean itself); statistics
of W' are rounded to scale_dtype, before the second binarization and the feedback, so that these see what is stored.
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
from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored
from harness.quantization.numerics.hessians import Factor
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import QuantizedWeight

LEVELS = ("below", "above", "salient", "residual")  # the four binarizations of a block
QUANTILES = torch.linspace(0.10, 0.90, 81)


@dataclass(frozen=True)
class SplitBinaryWeight(QuantizedWeight):
    """Sums of μ ± a: one of two pairs by magnitude, or two pairs in salient columns.

    salient       [in] bool
    above         [out, in] bool: which pair; False in salient columns
    signs         [out, in] bool: plus
    second_signs  [out, in] bool: plus in the residual of salient columns; False elsewhere
    mean, scale   [4, out, blocks] float32, in the order of LEVELS
    """

    kind = "split_binary"
    salient: Tensor
    above: Tensor
    signs: Tensor
    second_signs: Tensor
    mean: Tensor
    scale: Tensor
    scale_dtype: str = "float16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs.shape[0], self.signs.shape[1]

    @property
    def nominal_bits(self) -> float:
        """As papers count: 1 bit per weight, 2 in salient columns, nothing else."""
        return 1 + float(self.salient.float().mean())

    def dequantize(self) -> Tensor:
        size = self.shape[1] // self.mean.shape[2]

        def pair(level: int, plus: Tensor) -> Tensor:
            mean, scale = (
                part[level].repeat_interleave(size, 1) for part in (self.mean, self.scale)
            )
            return mean + torch.where(plus, scale, -scale)

        split = torch.where(self.above, pair(1, self.signs), pair(0, self.signs))
        return torch.where(self.salient, pair(2, self.signs) + pair(3, self.second_signs), split)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        target = SCALE_DTYPES[self.scale_dtype]
        bitmaps = {
            "salient": self.salient,
            "above": self.above[:, ~self.salient],
            "signs": self.signs,
            "second_signs": self.second_signs[:, self.salient],
        }
        tensors = {name: pack(bitmap.to(torch.uint8), 1) for name, bitmap in bitmaps.items()}
        tensors |= {
            "mean": self.mean.to(target).contiguous(),
            "scale": self.scale.to(target).contiguous(),
        }
        return tensors, {"shape": list(self.shape), "scale_dtype": self.scale_dtype}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        salient = unpack(tensors["salient"], 1, columns).bool()
        above, second = torch.zeros(2, rows, columns, dtype=torch.bool, device=salient.device)
        few = int(salient.sum())
        above[:, ~salient] = (
            unpack(tensors["above"], 1, rows * (columns - few)).reshape(rows, -1).bool()
        )
        second[:, salient] = (
            unpack(tensors["second_signs"], 1, rows * few).reshape(rows, few).bool()
        )
        signs = unpack(tensors["signs"], 1, rows * columns).reshape(rows, columns).bool()
        return cls(
            salient,
            above,
            signs,
            second,
            tensors["mean"].float(),
            tensors["scale"].float(),
            meta["scale_dtype"],
        )


class Rounding:
    """Binarization with salient columns, a split by magnitude, and error feedback between blocks."""

    version = 1
    needs = ("hessian",)
    stochastic = False
    activation_aware = False

    @dataclass(frozen=True)
    class Settings:
        """
        salience          hessian: w² / d² with d from the inverse Hessian; magnitude: w
        salient_columns   tried per block: 1 up to this many
        feedback          pass errors on to later blocks; False is the authors' "disable_gptq"
        damping_fraction  of the mean diagonal, added to the diagonal of H
        sequential        rounds a block's linears in four steps, each seeing the rounded ones before it
        """

        salience: str = "hessian"
        salient_columns: int = 49
        feedback: bool = True
        damping_fraction: float = 0.01
        sequential: bool = False

        def __post_init__(self) -> None:
            if self.salience not in ("hessian", "magnitude"):
                raise ValueError(f'no salience "{self.salience}"; known: hessian, magnitude')
            if self.salient_columns < 1:
                raise ValueError(
                    f"salient_columns is {self.salient_columns}; it must be at least 1"
                )
            if not self.damping_fraction > 0:
                raise ValueError(f"damping_fraction is {self.damping_fraction}; it must be above 0")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """About 1 nominal bit, in blocks (group_size) that divide every layer."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.format != "int":
                yield f'format "{weight.format}" is not binary codes; use scheme.weight.format=int'
            if not 1 <= weight.bits < 1.2:
                yield f"BiLLM has 1 bit and a little (nominally 1.06 to 1.1), not {weight.bits:g}"
            if weight.scale_dtype not in SCALE_DTYPES:
                yield f'no scale_dtype "{weight.scale_dtype}"; known: {", ".join(SCALE_DTYPES)}'
            if weight.group_size < 2:
                yield f"BiLLM binarizes blocks of columns; set group_size (128 in the paper) instead of {weight.group_size}"
            elif linear.in_features % weight.group_size:
                yield f"group_size {weight.group_size} does not divide the inputs"

        return refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32; some 260 binarizations of every block. Peak memory: four copies of weight."""
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
    weight = weight.masked_fill(factor.dead, 0)
    rows, columns = weight.shape
    size, blocks = scheme.group_size, columns // scheme.group_size
    diagonal = factor.upper.diagonal()
    salient = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    above, signs, second_signs = torch.zeros(
        3, rows, columns, dtype=torch.bool, device=weight.device
    )
    mean, scale = torch.zeros(2, 4, rows, blocks, device=weight.device)
    values = torch.empty_like(weight)

    def round_block(start: int, block: Tensor) -> None:
        block = block.contiguous()  # one memory layout, so that sums over it have one order
        here, number = slice(start, start + size), start // size
        target = block if settings.salience == "magnitude" else (block / diagonal[here]).square()
        columns_kept = choose_columns(target, settings.salient_columns)
        salient[here] = columns_kept
        everywhere = columns_kept.expand(rows, -1)
        split = choose_split(target, everywhere)
        above[:, here] = (target.abs() >= split) & ~everywhere
        below = ~above[:, here] & ~everywhere
        parts = (
            *binarize(block, below, 1, scheme.scale_dtype),
            *binarize(block, above[:, here], 1, scheme.scale_dtype),
            *binarize(block, everywhere, 2, scheme.scale_dtype),
        )
        for level, part in enumerate(parts):
            mean[level, :, number], scale[level, :, number] = part.mean[:, 0], part.scale[:, 0]
        signs[:, here] = torch.where(
            everywhere, parts[2].plus, torch.where(above[:, here], parts[1].plus, parts[0].plus)
        )
        second_signs[:, here] = parts[3].plus & everywhere
        values[:, here] = sum(part.values for part in parts)

    def round_column(column: int, view: Columns) -> Tensor:
        if column % size == 0:
            round_block(column, view.block)
        return values[:, column]

    if settings.feedback:
        feed_forward(weight, factor.upper, round_column, block_size=size, update_block=False)
    else:
        for start in range(0, columns, size):
            round_block(start, weight[:, start : start + size])
    return SplitBinaryWeight(salient, above, signs, second_signs, mean, scale, scheme.scale_dtype)


@dataclass(frozen=True)
class Binary:
    """One binarization of the masked entries of a block.

    values       [out, columns]: μ + a sign inside the mask, 0 outside
    mean, scale  [out, 1]
    plus         [out, columns] bool
    """

    values: Tensor
    mean: Tensor
    scale: Tensor
    plus: Tensor


def binarize(block: Tensor, mask: Tensor, order: int, dtype: str = "float32") -> list[Binary]:
    """`order` binarizations, each of what the ones before it left over; statistics over the mask, as stored in dtype.

    block, mask: [out, columns]. A row without masked entries gives zeros.
    """
    rest, parts = block, []
    count = mask.sum(1, keepdim=True).clamp(min=1)
    for _ in range(order):
        mean = as_stored((rest * mask).sum(1, keepdim=True) / count, dtype)
        centred = rest - mean
        scale = as_stored((centred.abs() * mask).sum(1, keepdim=True) / count, dtype)
        plus = centred >= 0
        values = (mean + torch.where(plus, scale, -scale)) * mask
        parts.append(Binary(values, mean, scale, plus))
        rest = rest - values
    return parts


def _error(target: Tensor, *parts: list[Binary]) -> Tensor:
    approximation = sum(binary.values for part in parts for binary in part)
    return (target - approximation).square().mean()


def choose_columns(target: Tensor, most: int) -> Tensor:
    """The salient columns [columns] bool of a block: 1 to `most` of those with the largest sums of magnitudes; fewer than all."""
    ranked = torch.argsort(target.abs().sum(0), descending=True, stable=True)
    errors = []
    for count in range(1, min(most, target.shape[1] - 1) + 1):
        mask = torch.zeros_like(target, dtype=torch.bool)
        mask[:, ranked[:count]] = True
        errors.append(_error(target, binarize(target, mask, 2), binarize(target, ~mask, 2)))
    best = int(torch.stack(errors).argmin())  # the first of equal ones
    chosen = torch.zeros(target.shape[1], dtype=torch.bool, device=target.device)
    chosen[ranked[: best + 1]] = True
    return chosen


def choose_split(target: Tensor, salient: Tensor) -> Tensor:
    """The magnitude [] at which the non-salient entries of a block [out, columns] part, salient [out, columns] bool."""
    magnitude = (target * ~salient).abs()
    levels = torch.quantile(magnitude.reshape(-1), QUANTILES.to(target.device))
    kept = binarize(target, salient, 2)
    errors = []
    for level in levels:
        above = (magnitude >= level) & ~salient
        errors.append(
            _error(target, binarize(target, ~above & ~salient, 1), binarize(target, above, 1), kept)
        )
    return levels[int(torch.stack(errors).argmin())]
