"""Linears that 8-bit weights and activations damage, whether weights or activations are the cause, and the smallest repair.

For each linear, on inputs x of calibration text (the question of arXiv 2408.15301, answered layer by layer):

    weight_ratio       largest over median, over input channels j, of max_i |W_ij|     a healthy linear has a few, LLaMA3-70B's
    activation_ratio   the same of the largest |x_j|                                   worst hundreds
    weights            ||x W'ᵀ - x Wᵀ||² / ||x Wᵀ||²: weights rounded per output channel, asymmetric min-max
    activations        the same with inputs rounded per token, weights not rounded
    both               the same with both
    grouped            the same with both in groups of input channels

A linear is affected when `both` is above 10 times the model's first decile and above 0.01 (at 8 bits; four times as much for each
bit less), so that a healthy model has none. Its cause is the side with the larger ratio. Those with outliers of weights that groups
bring back below a tenth of their error are proposed, as overrides of a scheme; linears with outliers of activations are for
smoothing, which needs no groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme, Model
from harness.core.errors import MethodError
from harness.quantization.numerics.activations import round_dynamic
from harness.quantization.numerics.grids import fit
from harness.quantization.pipeline.walk import survey

GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)
TOKENS = 1024  # tokens of each linear's input, taken at equal distances
OUTLYING, WORTH_REPAIR, REPAIRED = 10.0, 1e-2, 0.1
FEW = 0.03  # share of all linears: "less than 3 percent" in the study


@dataclass(frozen=True)
class LinearReport:
    """The figures of one linear that the module's docstring lists."""

    block: int
    linear: str
    weight_ratio: float
    activation_ratio: float
    weights: float
    activations: float
    both: float
    grouped: float
    share: float = 0.0  # part of the sum of `both` over all linears

    @property
    def cause(self) -> str:
        """The side whose channels differ more."""
        return "weights" if self.weight_ratio >= self.activation_ratio else "activations"


@dataclass(frozen=True)
class Diagnosis:
    """linears: all; affected: those that stand out; proposed: those of them that groups of group_size repair.

    channels: of the linear with the largest error, max |W| and max |x| of each input channel.
    """

    model: str
    bits: int
    group_size: int
    linears: tuple[LinearReport, ...]
    affected: tuple[LinearReport, ...]
    proposed: tuple[LinearReport, ...]
    channels: dict[str, list[float]] = field(default_factory=dict)

    @property
    def overrides(self) -> list[dict[str, Any]]:
        """The proposal as `overrides` of a scheme, blocks with the same linears together."""
        by_block: dict[int, list[str]] = {}
        for report in self.proposed:
            by_block.setdefault(report.block, []).append(report.linear.rsplit(".", 1)[-1])
        by_names: dict[tuple[str, ...], list[int]] = {}
        for block, names in by_block.items():
            by_names.setdefault(tuple(names), []).append(block)
        activation = {"granularity": "group", "group_size": self.group_size}
        return [
            {
                "blocks": blocks,
                "linears": list(names),
                "weight": {"group_size": self.group_size},
                "activation": activation,
            }
            for names, blocks in by_names.items()
        ]

    def record(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "overrides": self.overrides}


def diagnose(
    model: Model,
    folder: Path,
    windows: Tensor,
    *,
    bits: int = 8,
    group_size: int = 0,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Diagnosis:
    """Look at every linear of a model, one block in memory at a time.

    windows     [samples, length] tokens of ordinary text; a few thousand tokens suffice
    group_size  to judge; 0: the largest of GROUP_SIZES that repairs the affected linears
    progress    called with the number of blocks done
    Raises MethodError when inputs or weights are not finite.
    """
    sizes = (group_size,) if group_size else GROUP_SIZES
    found: list[tuple[LinearReport, dict[int, float]]] = []
    worst, channels = -1.0, {}
    for block, matrices, seen in survey(
        folder, model.dtype, windows, ("abs_max", "inputs"), device
    ):
        for name, weight in matrices.items():
            of_input = seen[name]
            if not of_input.tokens:  # an expert that no token chose has no error to speak of
                continue
            if not of_input.finite or not bool(torch.isfinite(weight).all()):
                raise MethodError(
                    f"block {block}, {name}: NaN or infinity; load the model in a wider dtype (model.dtype=float32)"
                )
            x = of_input.values["inputs"].flatten(0, 1)
            x = x[:: max(1, x.shape[0] // TOKENS)].to(weight.device).float()
            report, grouped = _linear(
                block, name, weight, of_input.values["abs_max"].to(weight.device), x, bits, sizes
            )
            found.append((report, grouped))
            if report.both > worst:
                worst = report.both
                channels = {
                    "weights": weight.abs().amax(0).tolist(),
                    "activations": of_input.values["abs_max"].tolist(),
                }
        if progress is not None:
            progress(block + 1)
    return _judge(model.name, bits, found, sizes, channels)


def _linear(
    block: int,
    name: str,
    weight: Tensor,
    largest: Tensor,
    x: Tensor,
    bits: int,
    sizes: Sequence[int],
) -> tuple[LinearReport, dict[int, float]]:
    """One linear's report, and its error in groups of each size that divides its inputs."""
    exact = x @ weight.T

    def error(rounded_weight: Tensor, rounded_input: Tensor) -> float:
        reference = float(exact.double().square().sum())
        return (
            float((rounded_input @ rounded_weight.T - exact).double().square().sum()) / reference
            if reference
            else 0.0
        )

    rows, tokens = _round_weight(weight, bits, weight.shape[1]), _round_input(x, bits, -1)
    grouped = {
        size: error(_round_weight(weight, bits, size), _round_input(x, bits, size))
        for size in sizes
        if weight.shape[1] % size == 0 and size < weight.shape[1]
    }
    report = LinearReport(
        block,
        name,
        _ratio(weight.abs().amax(0)),
        _ratio(largest),
        error(rows, x),
        error(weight, tokens),
        error(rows, tokens),
        0.0,
    )
    return report, grouped


def _round_weight(weight: Tensor, bits: int, group_size: int) -> Tensor:
    groups = weight.reshape(weight.shape[0], -1, group_size)
    return fit(groups, bits, False, "awq").nearest(groups).reshape(weight.shape)


def _round_input(x: Tensor, bits: int, group_size: int) -> Tensor:
    scheme = ActivationScheme(
        bits=bits,
        granularity="token" if group_size == -1 else "group",
        group_size=group_size,
        grid="llama_quant",
    )
    return round_dynamic(x, scheme)


def _ratio(channels: Tensor) -> float:
    return float(channels.max() / channels.median().clamp(min=1e-12))


def _judge(
    model: str,
    bits: int,
    found: Sequence[tuple[LinearReport, dict[int, float]]],
    sizes: Sequence[int],
    channels: dict[str, list[float]],
) -> Diagnosis:
    """Who stands out, and which group size repairs how many of them."""
    total = sum(report.both for report, _ in found) or 1.0
    healthy = sorted(report.both for report, _ in found)[len(found) // 10]
    bound = max(OUTLYING * healthy, min(1.0, WORTH_REPAIR * 4.0 ** (8 - bits)))
    stands_out = [report.both > bound for report, _ in found]

    def repaired(size: int) -> list[int]:
        return [
            index
            for index, (report, grouped) in enumerate(found)
            if stands_out[index]
            and report.cause == "weights"
            and grouped.get(size, report.both) < REPAIRED * report.both
        ]

    chosen = max(sizes, key=lambda size: (len(repaired(size)), size))
    reports = tuple(
        LinearReport(
            **{
                **asdict(report),
                "grouped": grouped.get(chosen, report.both),
                "share": report.both / total,
            }
        )
        for report, grouped in found
    )
    return Diagnosis(
        model,
        bits,
        chosen,
        reports,
        tuple(report for report, out in zip(reports, stands_out, strict=True) if out),
        tuple(reports[index] for index in repaired(chosen)),
        channels,
    )
