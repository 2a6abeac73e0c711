"""Why a model loses by 8-bit weights and activations: which linears, through which side, and what repairs them with least change.

For each linear, on inputs x of calibration text (the question of arXiv 2408.15301, answered layer by layer):

    weight_ratio       largest over median, over input channels j, of max_i |W_ij|     a healthy linear has a few, LLaMA3-70B's
    activation_ratio   the same of the largest |x_j|                                   worst hundreds
    weights            ||x W'ᵀ - x Wᵀ||² / ||x Wᵀ||²: weights rounded per output channel, asymmetric min-max
    activations        the same with inputs rounded per token alone
    both               the same with both
    grouped            the same with both in groups of input channels

A linear is affected when `both` is above 10 times the model's first decile and above 0.01 (at 8 bits; four times as much for each
bit less), so that a healthy model has none. Its cause is the side with the larger ratio. Those with outliers of weights that groups
bring back below a tenth of their error are proposed, as overrides of a scheme; linears with outliers of activations are for
smoothing, which needs no groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.cell import ActivationScheme, Model, to_json
from harness.errors import MethodError, TrackingError
from harness.numerics.activations import round_dynamic
from harness.numerics.grids import fit
from harness.streaming.passes import survey

if TYPE_CHECKING:
    from harness.sweep import Runtime

GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)
TOKENS = 1024                           # of each linear's input, taken at equal distances
OUTLYING, WORTH_REPAIR, REPAIRED = 10.0, 1e-2, 0.1
FEW = 0.03                              # of all linears: "less than 3 percent" of the study


@dataclass(frozen=True)
class LinearReport:
    """What the module's docstring lists, of one linear."""

    block: int
    linear: str
    weight_ratio: float
    activation_ratio: float
    weights: float
    activations: float
    both: float
    grouped: float
    share: float = 0.0                  # of the sum of `both` over all linears

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
            {"blocks": blocks, "linears": list(names), "weight": {"group_size": self.group_size}, "activation": activation}
            for names, blocks in by_names.items()
        ]

    def record(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "overrides": self.overrides}


def diagnose(
    model: Model, folder: Path, windows: Tensor, *, bits: int = 8, group_size: int = 0, device: str = "cpu",
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
    for block, matrices, seen in survey(folder, model.dtype, windows, ("abs_max", "inputs"), device):
        for name, weight in matrices.items():
            of_input = seen[name]
            if not of_input.tokens:                     # an expert that no token chose has no error to speak of
                continue
            if not of_input.finite or not bool(torch.isfinite(weight).all()):
                raise MethodError(f"block {block}, {name}: NaN or infinity; load the model in a wider dtype (model.dtype=float32)")
            x = of_input.values["inputs"].flatten(0, 1)
            x = x[:: max(1, x.shape[0] // TOKENS)].to(weight.device).float()
            report, grouped = _linear(block, name, weight, of_input.values["abs_max"].to(weight.device), x, bits, sizes)
            found.append((report, grouped))
            if report.both > worst:
                worst = report.both
                channels = {"weights": weight.abs().amax(0).tolist(), "activations": of_input.values["abs_max"].tolist()}
        if progress is not None:
            progress(block + 1)
    return _judge(model.name, bits, found, sizes, channels)


def _linear(
    block: int, name: str, weight: Tensor, largest: Tensor, x: Tensor, bits: int, sizes: Sequence[int]
) -> tuple[LinearReport, dict[int, float]]:
    """One linear's report, and its error in groups of each size that divides its inputs."""
    exact = x @ weight.T

    def error(rounded_weight: Tensor, rounded_input: Tensor) -> float:
        reference = float(exact.double().square().sum())
        return float((rounded_input @ rounded_weight.T - exact).double().square().sum()) / reference if reference else 0.0

    rows, tokens = _round_weight(weight, bits, weight.shape[1]), _round_input(x, bits, -1)
    grouped = {
        size: error(_round_weight(weight, bits, size), _round_input(x, bits, size))
        for size in sizes if weight.shape[1] % size == 0 and size < weight.shape[1]
    }
    report = LinearReport(
        block, name, _ratio(weight.abs().amax(0)), _ratio(largest), error(rows, x), error(weight, tokens), error(rows, tokens), 0.0
    )
    return report, grouped


def _round_weight(weight: Tensor, bits: int, group_size: int) -> Tensor:
    groups = weight.reshape(weight.shape[0], -1, group_size)
    return fit(groups, bits, False, "awq").nearest(groups).reshape(weight.shape)


def _round_input(x: Tensor, bits: int, group_size: int) -> Tensor:
    granularity = "token" if group_size == -1 else "group"
    return round_dynamic(x, ActivationScheme(bits=bits, granularity=granularity, group_size=group_size, grid="llama_quant"))


def _ratio(channels: Tensor) -> float:
    return float(channels.max() / channels.median().clamp(min=1e-12))


def _judge(
    model: str, bits: int, found: Sequence[tuple[LinearReport, dict[int, float]]], sizes: Sequence[int],
    channels: dict[str, list[float]],
) -> Diagnosis:
    """Who stands out, and which group size repairs how many of them."""
    total = sum(report.both for report, _ in found) or 1.0
    healthy = sorted(report.both for report, _ in found)[len(found) // 10]
    bound = max(OUTLYING * healthy, min(1.0, WORTH_REPAIR * 4.0 ** (8 - bits)))
    stands_out = [report.both > bound for report, _ in found]

    def repaired(size: int) -> list[int]:
        return [
            index for index, (report, grouped) in enumerate(found)
            if stands_out[index] and report.cause == "weights" and grouped.get(size, report.both) < REPAIRED * report.both
        ]

    chosen = max(sizes, key=lambda size: (len(repaired(size)), size))
    reports = tuple(
        LinearReport(**{**asdict(report), "grouped": grouped.get(chosen, report.both), "share": report.both / total})
        for report, grouped in found
    )
    return Diagnosis(
        model, bits, chosen, reports, tuple(report for report, out in zip(reports, stands_out, strict=True) if out),
        tuple(reports[index] for index in repaired(chosen)), channels,
    )


def run(model: str, overrides: Sequence[str] = (), bits: int = 8, group_size: int = 0) -> str:
    """Diagnose a model by its name, write record and figures below <runs>/diagnoses/<model>/ and to MLflow, and return the text
    to print.

    overrides: of calibration (calibration=c4, calibration.samples=16; without any, 8 windows of wikitext2, or of the demo's own
    text for its models), runs, device, data.root, tracking (none writes to the folder alone).
    """
    from transformers import AutoTokenizer

    from harness import plots, sources
    from harness.config import load_sweep
    from harness.store import is_url, write_aside
    from harness.streaming.calibration import draw_windows

    stated = {override.partition("=")[0].lstrip("+") for override in overrides}
    text = [] if "calibration" in stated else [f"calibration={'demo' if model.startswith('demo') else 'wikitext2'}"]
    few = [] if "calibration.samples" in stated else ["calibration.samples=8"]
    grid = [f"model={model}", "method=bi_smoothing", "scheme=w8a8", *text, *few, *overrides]
    sweep = load_sweep(None, grid)
    cell = next(cell for cell in sweep.cells if not cell.method.is_baseline)
    assert cell.calibration is not None
    folder, wanted = sources.model_folder(cell.model), sweep.runtime.device
    device = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    windows = draw_windows(cell.calibration, AutoTokenizer.from_pretrained(folder))
    diagnosis = diagnose(cell.model, folder, windows, bits=bits, group_size=group_size, device=device)

    place = (Path("runs") if is_url(sweep.runtime.runs) else Path(sweep.runtime.runs)) / "diagnoses" / cell.model.name
    place.mkdir(parents=True, exist_ok=True)
    asked = {
        "model": to_json(cell.model), "calibration": to_json(cell.calibration), "bits": bits, "group_size": group_size or "any",
    }
    record = {**diagnosis.record(), "asked": asked}
    text_of = json.dumps(record, indent=1, sort_keys=True) + "\n"
    write_aside(place / "diagnosis.json", lambda path: path.write_text(text_of, encoding="utf-8"))
    rows = [asdict(report) for report in diagnosis.linears]
    listed = "\n".join(",".join(map(str, row)) for row in (list(rows[0]), *(row.values() for row in rows))) + "\n"
    write_aside(place / "linears.csv", lambda path: path.write_text(listed, encoding="utf-8"))
    for value in ("both", "weight_ratio", "activation_ratio"):
        plots.save(plots.diagnosis_map(rows, value, cell.model.name), place, value.replace("_", "-"))
    first = max(diagnosis.linears, key=lambda report: report.both)
    title = f"{cell.model.name} · block {first.block} · {first.linear}"
    plots.save(plots.channel_magnitudes(diagnosis.channels, title), place, "channels")
    return f"{render(diagnosis)}\n\nrecord and figures: {place}{track(sweep.runtime, diagnosis, record, place)}"


def track(runtime: Runtime, diagnosis: Diagnosis, record: Mapping[str, Any], place: Path) -> str:
    """Keep the diagnosis in MLflow, where that is on: what to print of it. A store that does not answer costs the line alone."""
    from harness import tracking

    if runtime.tracking.kind == "none":
        return ""
    curves: dict[str, dict[int, float]] = {}
    for report in diagnosis.linears:
        for value in ("both", "grouped", "weight_ratio", "activation_ratio"):
            curves.setdefault(f"{value}/{report.linear}", {})[report.block] = getattr(report, value)
    curves |= {
        "linears that stand out": {0: len(diagnosis.affected)}, "linears to group": {0: len(diagnosis.proposed)},
        "their share of all error": {0: sum(report.share for report in diagnosis.affected)},
    }
    name = f"{diagnosis.model} · {diagnosis.bits} bits"
    open_this = "*Artifacts*: figures, `linears.csv`, `diagnosis.json`. *Model metrics*: every matrix, the block as step."
    shown = render(diagnosis)
    outcome = shown.split("\n\n")[-1].splitlines()[0]               # first: MLflow folds what follows
    text = f"**{name}** — {outcome}\n\n{open_this}\n\n```\n{shown}\n```"
    try:
        return f"\nMLflow: {tracking.keep_diagnosis(runtime, name, record, curves, text, place)}"
    except TrackingError as error:
        return f"\nMLflow: {error}"


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis for a terminal: the worst linears, what they have in common, and what to do."""
    linears, affected, proposed = diagnosis.linears, diagnosis.affected, diagnosis.proposed
    shown = sorted(linears, key=lambda report: -report.both)[: max(8, min(len(affected), 20))]
    width = max(len(report.linear) for report in shown)
    head = f"block  {'linear':<{width}}  max/median |W|  max/median |x|    weights  activations       both    grouped  share"
    lines = [f"{diagnosis.model}: {len(linears)} linears, rounded to {diagnosis.bits} bits", "", head]
    lines += [
        f"{report.block:>5}  {report.linear:<{width}}  {report.weight_ratio:14.1f}  {report.activation_ratio:14.1f}  "
        f"{report.weights:9.2e}  {report.activations:11.2e}  {report.both:9.2e}  {report.grouped:9.2e}  {report.share:5.1%}"
        for report in shown
    ]
    share = sum(report.share for report in affected)
    lines.append("")
    if not affected:
        return "\n".join([*lines, "No linear stands out: plain rounding per output channel and token will do."])
    causes = [report.cause for report in affected]
    lines.append(
        f"{len(affected)} linears stand out with {share:.1%} of all error: {causes.count('weights')} by outliers of weights, "
        f"{causes.count('activations')} of activations."
    )
    if proposed:
        part = len(proposed) / len(linears)
        few = "" if part < FEW else f" (the study of LLaMA3-70B needed less than {FEW:.0%})"
        lines += [
            f"Groups of {diagnosis.group_size} in {len(proposed)} linears, {part:.1%} of all, repair them{few}. In a scheme:",
            "overrides:", *(f"  - {json.dumps(override)}" for override in diagnosis.overrides),
            "Or without groups: method=bi_smoothing.",
        ]
    if "activations" in causes:
        lines.append("Outliers of activations are for smoothing (method=smoothquant), or for keeping apart (method=llm_int8).")
    return "\n".join(lines)
