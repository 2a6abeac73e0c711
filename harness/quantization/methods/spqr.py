"""SpQR: GPTQ with tiny groups whose scales and zeros are quantized themselves, and a few outlier weights kept as they are.

SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression (arXiv 2306.03078), algorithm 1.
Objective: GPTQ's, min ||W X - W' X||² with U from the damped inverse Hessian and d_j = U_jj, over grids of `group_size` inputs. At
the first column of a group, a weight whose removal lowers the group's error sum ((w' - w) / d)² by more than τ is left out of the
fit; at each column a weight with ((w - w') / d)² > τ is kept exactly, and makes no error for later columns to undo. With

    τ = outlier_threshold · mean over columns of var(w) / d²

Scales, and zeros, of `second_group` consecutive rows of one group share a grid of 3 bits (§4.1, bilevel quantization).

As in the authors' code: zeros of the weights' grid are not integers, and 0 is not forced into the range; damping comes before
dead columns get their unit diagonal, and damping_fraction is 1; a higher threshold keeps fewer outliers. Every group sees all
earlier updates.
Where we differ: a group of equal weights is stored exactly (theirs gets the range -1 … 1), and so is a run of equal scales;
second-level grids are stored as step and start, rounded to scale_dtype before use; outlier values are stored in scale_dtype;
the "spearman" order is not offered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import check_uniform, refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.error_feedback import Columns, feed_forward
from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored
from harness.quantization.numerics.hessians import damped, inverse_factor
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.sparse import Outliers
from harness.quantization.numerics.weights import QuantizedWeight

TINY = 1e-9  # the least scale that is divided by
TILE = 2**24  # numbers that leave-one-out fits hold at a time


@dataclass(frozen=True)
class SecondLevel:
    """Statistics of groups in a few bits: start + step · code, one grid per run of rows.

    codes        [out, groups] uint8
    step, start  [out / run, groups] float32
    """

    codes: Tensor
    step: Tensor
    start: Tensor
    bits: int

    def read(self) -> Tensor:
        """[out, groups] float32"""
        run = self.codes.shape[0] // self.step.shape[0]
        return (
            self.start.repeat_interleave(run, 0) + self.step.repeat_interleave(run, 0) * self.codes
        )


@dataclass(frozen=True)
class BilevelWeight(QuantizedWeight):
    """scale · (code - zero) in small groups, scales and zeros in a second level, outliers on top.

    codes        [out, in] uint8, columns in the order of `order`
    scale, zero  [out, groups] float32, or in a SecondLevel
    order        [in] int64: column k of codes is column order[k] of the matrix; None: the same order
    """

    kind = "bilevel"
    codes: Tensor
    scale: Tensor | SecondLevel
    zero: Tensor | SecondLevel
    outliers: Outliers
    order: Tensor | None
    bits: int
    scale_dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        scale, zero = (
            part.read() if isinstance(part, SecondLevel) else part
            for part in (self.scale, self.zero)
        )
        grouped = self.codes.float().reshape(rows, scale.shape[1], -1)
        values = (scale.unsqueeze(-1) * (grouped - zero.unsqueeze(-1))).reshape(rows, columns)
        if self.order is not None:
            restored = torch.empty_like(values)
            restored[:, self.order] = values
            values = restored
        return self.outliers.put_into(values)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        target = SCALE_DTYPES[self.scale_dtype]
        outliers, outliers_meta = self.outliers.pack()
        tensors = {
            "codes": pack(self.codes, self.bits),
            **{f"outlier_{name}": tensor for name, tensor in outliers.items()},
        }
        meta: dict[str, Any] = {
            "shape": list(self.shape),
            "bits": self.bits,
            "scale_dtype": self.scale_dtype,
            "outliers": outliers_meta,
        }
        for name in ("scale", "zero"):
            part = getattr(self, name)
            if isinstance(part, SecondLevel):
                tensors[f"{name}_codes"] = pack(part.codes, part.bits)
                tensors[f"{name}_step"] = part.step.to(target).contiguous()
                tensors[f"{name}_start"] = part.start.to(target).contiguous()
                meta[name] = part.bits
            elif name == "zero" and bool(
                ((part == part.round()) & (part >= 0) & (part < 2**self.bits)).all()
            ):
                tensors["zero_codes"], meta["zero"] = pack(part.to(torch.uint8), self.bits), "codes"
                meta["groups"] = part.shape[1]
            else:
                tensors[name], meta[name] = part.to(target).contiguous(), "float"
        if self.order is not None:
            tensors["order"] = (
                pack(self.order, 16) if self.shape[1] <= 2**16 else self.order.to(torch.int32)
            )
        return tensors, meta

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        bits = meta["bits"]
        parts: dict[str, Tensor | SecondLevel] = {}
        for name in ("scale", "zero"):
            how = meta[name]
            if how == "float":
                parts[name] = tensors[name].float()
            elif how == "codes":
                parts[name] = (
                    unpack(tensors["zero_codes"], bits, rows * meta["groups"])
                    .float()
                    .reshape(rows, -1)
                )
            else:
                step = tensors[f"{name}_step"].float()
                codes = unpack(tensors[f"{name}_codes"], how, rows * step.shape[1]).reshape(
                    rows, -1
                )
                parts[name] = SecondLevel(codes, step, tensors[f"{name}_start"].float(), how)
        kept = {
            name.removeprefix("outlier_"): tensor
            for name, tensor in tensors.items()
            if name.startswith("outlier_")
        }
        outliers = Outliers.unpack(kept, meta["outliers"])
        order = tensors.get("order")
        if order is not None:
            order = (unpack(order, 16, columns) if columns <= 2**16 else order).long()
        codes = unpack(tensors["codes"], bits, rows * columns).reshape(rows, columns)
        return cls(codes, parts["scale"], parts["zero"], outliers, order, bits, meta["scale_dtype"])


class Rounding:
    """Error-compensating rounding with bilevel statistics and unstructured outliers."""

    version = 1
    needs = ("hessian",)
    stochastic = False
    activation_aware = False
    reordered_groups: ClassVar[dict[str, bool]] = {"act_order": True}

    @dataclass(frozen=True)
    class Settings:
        """
        outlier_threshold    τ in units of the mean sensitivity; lower keeps more outliers (0.1 to 0.5); None: none are kept
        leave_one_out        look for outliers before a group is fitted; False: fit on all of its weights ("simplified")
        scale_bits           bits of a group's scale in the second level; None: scales are stored in scale_dtype
        zero_bits            the same for its zero
        second_group         consecutive rows that share a second-level grid
        round_zero           integer zeros; they then cost `bits` each and have no second level unless zero_bits is smaller
        act_order            columns with the largest diagonal of H first
        damping_fraction     of the mean diagonal, added to the diagonal of H
        block_size           columns between two products, at least a group; changes the order of float sums only
        sequential           rounds a block's linears in four steps, each seeing the rounded ones before it
        """

        outlier_threshold: float | None = 0.2
        leave_one_out: bool = True
        scale_bits: int | None = 3
        zero_bits: int | None = 3
        second_group: int = 16
        round_zero: bool = False
        act_order: bool = True
        damping_fraction: float = 1.0
        block_size: int = 128
        sequential: bool = False

        def __post_init__(self) -> None:
            if self.outlier_threshold is not None and self.outlier_threshold < 0:
                raise ValueError(
                    f"outlier_threshold is {self.outlier_threshold}; it must be 0 or more, or null for no outliers"
                )
            if not self.damping_fraction > 0:
                raise ValueError(f"damping_fraction is {self.damping_fraction}; it must be above 0")
            if any(
                bits is not None and not 1 <= bits <= 8
                for bits in (self.scale_bits, self.zero_bits)
            ):
                raise ValueError(
                    f"scale_bits={self.scale_bits}, zero_bits={self.zero_bits}; each is 1 to 8, or null"
                )
            if self.second_group < 1 or self.block_size < 1:
                raise ValueError(
                    f"second_group={self.second_group}, block_size={self.block_size}; both are at least 1"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Asymmetric integers of 2 to 8 bits in groups; second-level runs that divide the output rows."""
        second_level = self.settings.scale_bits is not None or self.settings.zero_bits is not None

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.group_size == -1:
                yield "SpQR rounds small groups; set group_size (16 in the paper)"
            if second_level and linear.out_features % self.settings.second_group:
                yield f"second_group {self.settings.second_group} does not divide the output rows"

        return check_uniform(
            scheme, shapes, never_symmetric="SpQR's grid is not symmetric"
        ) + refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: five copies of weight, and four [in, in] while H is factored."""
        assert evidence is not None, "spqr needs the Hessian"
        require_finite(weight)
        settings = self.settings
        upper, dead, order = evidence.once(
            ("spqr factor", settings.damping_fraction, settings.act_order),
            lambda: _factor(evidence["hessian"], settings.damping_fraction, settings.act_order),
        )
        weight = weight.masked_fill(dead, 0)
        weight = weight if order is None else weight[:, order]
        return _Layer(weight, upper, scheme, settings).round(order)


class _Layer:
    """One matrix while it is rounded: statistics of its groups, codes and outliers, columns in the order of rounding."""

    def __init__(
        self, weight: Tensor, upper: Tensor, scheme: WeightScheme, settings: Rounding.Settings
    ) -> None:
        self.weight, self.upper, self.settings = weight, upper, settings
        self.bits, self.size, self.dtype = int(scheme.bits), scheme.group_size, scheme.scale_dtype
        self.diagonal = upper.diagonal()
        self.threshold = math.inf
        if settings.outlier_threshold is not None:
            self.threshold = settings.outlier_threshold * float(
                (weight.var(0) / self.diagonal.square()).mean()
            )
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.kept = torch.zeros_like(weight, dtype=torch.bool)
        self.scales: list[_Level] = []
        self.zeros: list[_Level] = []

    def round(self, order: Tensor | None) -> BilevelWeight:
        block = self.size * max(
            1, self.settings.block_size // self.size
        )  # whole groups, so that a fit sees every update
        rounded = feed_forward(self.weight, self.upper, self._round_column, block_size=block)
        kept = self.kept
        if order is not None:
            back = torch.argsort(order)
            rounded, kept = rounded[:, back], kept[:, back]
        outliers = Outliers.where(kept, rounded, self.dtype)
        return BilevelWeight(
            self.codes,
            _gather(self.scales),
            _gather(self.zeros),
            outliers,
            order,
            self.bits,
            self.dtype,
        )

    def _round_column(self, column: int, columns: Columns) -> Tensor:
        if column % self.size == 0:
            self._fit(columns.group(column, self.size), self.diagonal[column : column + self.size])
        scale, zero, top = self.scales[-1].values, self.zeros[-1].values, 2**self.bits - 1
        w = columns[column]
        codes = torch.round(w / scale.clamp(min=TINY) + zero).clamp_(0, top)
        values = scale * (codes - zero)
        if math.isfinite(self.threshold):
            outlier = ((w - values) / self.diagonal[column]).square() > self.threshold
            codes = torch.where(outlier, torch.round(zero).clamp(0, top), codes)
            values = torch.where(outlier, as_stored(w, self.dtype), values)
            self.kept[:, column] = outlier
        self.codes[:, column] = codes
        return values

    def _fit(self, group: Tensor, diagonal: Tensor) -> None:
        """The grids of a group [out, size] of up-to-date weights."""
        settings = self.settings
        if math.isfinite(self.threshold) and settings.leave_one_out and self.size > 1:
            inlier = leave_one_out_gain(group, diagonal, self.bits) <= self.threshold
            mean = (group * inlier).sum(1, keepdim=True) / inlier.sum(1, keepdim=True).clamp(min=1)
            group = torch.where(inlier, group, mean)
        scale, zero = asymmetric_grid(group.amin(1), group.amax(1), self.bits)
        zero = torch.round(zero) if settings.round_zero else zero
        self.scales.append(_Level.of(scale, settings.scale_bits, settings.second_group, self.dtype))
        whole = settings.round_zero and (
            settings.zero_bits is None or settings.zero_bits >= self.bits
        )
        self.zeros.append(
            _Level.of(
                zero, None if whole else settings.zero_bits, settings.second_group, self.dtype
            )
        )


@dataclass(frozen=True)
class _Level:
    """One group's statistic for every row, [out]: as it is read back, and its second level if it has one."""

    values: Tensor
    second: SecondLevel | None = None

    @classmethod
    def of(cls, values: Tensor, bits: int | None, run: int, dtype: str) -> Self:
        if bits is None:
            return cls(as_stored(values, dtype))
        runs, top = values.reshape(-1, run), 2**bits - 1
        start = as_stored(runs.amin(1, keepdim=True), dtype)
        step = as_stored((runs.amax(1, keepdim=True) - start) / top, dtype)
        codes = (
            torch.round((runs - start) / step.clamp(min=TINY))
            .clamp_(0, top)
            .reshape(-1, 1)
            .to(torch.uint8)
        )
        second = SecondLevel(codes, step, start, bits)
        return cls(second.read()[:, 0], second)


def _gather(levels: list[_Level]) -> Tensor | SecondLevel:
    if levels[0].second is None:
        return torch.stack([level.values for level in levels], dim=1)
    seconds = [level.second for level in levels if level.second is not None]
    codes, step, start = (
        torch.cat([getattr(s, name) for s in seconds], dim=1) for name in ("codes", "step", "start")
    )
    return SecondLevel(codes, step, start, seconds[0].bits)


def _factor(
    hessian: Tensor, damping_fraction: float, act_order: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """U [in, in] in the order of rounding, dead columns [in] in their own, and that order."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    ready, dead = damped(hessian, damping_fraction, dead_last=True)
    ready = ready if order is None else ready[order][:, order]
    return inverse_factor(ready), dead, order


def asymmetric_grid(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and real-valued zero of ranges; lo = hi gives the grid whose code 0 is that value, exactly."""
    same = lo == hi
    scale = torch.where(same, lo.abs(), (hi - lo) / (2**bits - 1))
    zero = torch.where(same, -lo.sign(), -lo / scale.clamp(min=TINY))
    return scale, zero


def leave_one_out_gain(group: Tensor, diagonal: Tensor, bits: int) -> Tensor:
    """How much the error sum ((w' - w) / d)² of a row's group falls when one weight is left out of fit and sum, [out, size].

    group [out, size], diagonal [size]. Peak memory: about six times TILE numbers.
    """
    size, top = group.shape[1], 2**bits - 1
    itself = torch.eye(size, dtype=torch.bool, device=group.device)

    def error(values: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        scale, zero = asymmetric_grid(lo.unsqueeze(-1), hi.unsqueeze(-1), bits)
        codes = torch.round(values / scale.clamp(min=TINY) + zero).clamp_(0, top)
        return ((scale * (codes - zero) - values) / diagonal).square_()

    gains = []
    for rows in group.split(max(1, TILE // (size * size))):
        whole = error(rows, rows.amin(1), rows.amax(1)).sum(1, keepdim=True)
        others = rows.unsqueeze(1).expand(-1, size, -1)  # [rows, left out, size]
        lo, hi = (
            others.masked_fill(itself, torch.inf).amin(-1),
            others.masked_fill(itself, -torch.inf).amax(-1),
        )
        gains.append(whole - error(others, lo, hi).masked_fill_(itself, 0).sum(-1))
    return torch.cat(gains)
