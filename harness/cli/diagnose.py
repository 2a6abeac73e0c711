"""`harness diagnose`: run the diagnosis of a model, send it to tracking, print it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.core.cell import to_json
from harness.core.errors import TrackingError
from harness.quantization.diagnosis import FEW, Diagnosis, diagnose

if TYPE_CHECKING:
    from harness.core.sweep import Runtime


def run(model: str, overrides: Sequence[str] = (), bits: int = 8, group_size: int = 0) -> str:
    """Diagnose a model by its name, write record and figures below <runs>/diagnoses/<model>/ and to MLflow, and return the text
    to print.

    overrides: of calibration (calibration=c4, calibration.samples=16; without any, 8 windows of wikitext2, or of the demo's own
    text for its models), runs, device, data.root, tracking (none writes to the folder alone).
    """
    from transformers import AutoTokenizer

    from harness.config.grid import load_sweep
    from harness.data import model_folders
    from harness.quantization.calibration import draw_windows
    from harness.reporting.drawing import save
    from harness.reporting.heat_maps import channel_magnitudes, diagnosis_map
    from harness.storage.atomic_write import write_aside
    from harness.storage.places import is_url

    stated = {override.partition("=")[0].lstrip("+") for override in overrides}
    text = (
        []
        if "calibration" in stated
        else [f"calibration={'demo' if model.startswith('demo') else 'wikitext2'}"]
    )
    few = [] if "calibration.samples" in stated else ["calibration.samples=8"]
    grid = [f"model={model}", "method=bi_smoothing", "scheme=w8a8", *text, *few, *overrides]
    sweep = load_sweep(None, grid)
    cell = next(cell for cell in sweep.cells if not cell.method.is_baseline)
    assert cell.calibration is not None
    folder, wanted = model_folders.model_folder(cell.model), sweep.runtime.device
    device = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    windows = draw_windows(cell.calibration, AutoTokenizer.from_pretrained(folder))
    diagnosis = diagnose(
        cell.model, folder, windows, bits=bits, group_size=group_size, device=device
    )

    place = (
        (Path("runs") if is_url(sweep.runtime.runs) else Path(sweep.runtime.runs))
        / "diagnoses"
        / cell.model.name
    )
    place.mkdir(parents=True, exist_ok=True)
    asked = {
        "model": to_json(cell.model),
        "calibration": to_json(cell.calibration),
        "bits": bits,
        "group_size": group_size or "any",
    }
    record = {**diagnosis.record(), "asked": asked}
    text_of = json.dumps(record, indent=1, sort_keys=True) + "\n"
    write_aside(place / "diagnosis.json", lambda path: path.write_text(text_of, encoding="utf-8"))
    rows = [asdict(report) for report in diagnosis.linears]
    listed = (
        "\n".join(
            ",".join(map(str, row)) for row in (list(rows[0]), *(row.values() for row in rows))
        )
        + "\n"
    )
    write_aside(place / "linears.csv", lambda path: path.write_text(listed, encoding="utf-8"))
    for value in ("both", "weight_ratio", "activation_ratio"):
        save(diagnosis_map(rows, value, cell.model.name), place, value.replace("_", "-"))
    first = max(diagnosis.linears, key=lambda report: report.both)
    title = f"{cell.model.name} · block {first.block} · {first.linear}"
    save(channel_magnitudes(diagnosis.channels, title), place, "channels")
    return f"{render(diagnosis)}\n\nrecord and figures: {place}{track(sweep.runtime, diagnosis, record, place)}"


def track(runtime: Runtime, diagnosis: Diagnosis, record: Mapping[str, Any], place: Path) -> str:
    """Record the diagnosis in MLflow, where tracking is on; returns the line to print, which says so where MLflow fails."""
    from harness.tracking.diagnoses import record_diagnosis

    if runtime.tracking.kind == "none":
        return ""
    curves: dict[str, dict[int, float]] = {}
    for report in diagnosis.linears:
        for value in ("both", "grouped", "weight_ratio", "activation_ratio"):
            curves.setdefault(f"{value}/{report.linear}", {})[report.block] = getattr(report, value)
    curves |= {
        "linears that stand out": {0: len(diagnosis.affected)},
        "linears to group": {0: len(diagnosis.proposed)},
        "their share of all error": {0: sum(report.share for report in diagnosis.affected)},
    }
    name = f"{diagnosis.model} · {diagnosis.bits} bits"
    open_this = "*Artifacts*: figures, `linears.csv`, `diagnosis.json`. *Model metrics*: every matrix, the block as step."
    shown = render(diagnosis)
    outcome = shown.split("\n\n")[-1].splitlines()[0]  # first: MLflow folds what follows
    text = f"**{name}** — {outcome}\n\n{open_this}\n\n```\n{shown}\n```"
    try:
        return f"\nMLflow: {record_diagnosis(runtime, name, record, curves, text, place)}"
    except TrackingError as error:
        return f"\nMLflow: {error}"


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis for a terminal: the worst linears, what they have in common, and what to do."""
    linears, affected, proposed = diagnosis.linears, diagnosis.affected, diagnosis.proposed
    shown = sorted(linears, key=lambda report: -report.both)[: max(8, min(len(affected), 20))]
    width = max(len(report.linear) for report in shown)
    head = f"block  {'linear':<{width}}  max/median |W|  max/median |x|    weights  activations       both    grouped  share"
    lines = [
        f"{diagnosis.model}: {len(linears)} linears, rounded to {diagnosis.bits} bits",
        "",
        head,
    ]
    lines += [
        f"{report.block:>5}  {report.linear:<{width}}  {report.weight_ratio:14.1f}  {report.activation_ratio:14.1f}  "
        f"{report.weights:9.2e}  {report.activations:11.2e}  {report.both:9.2e}  {report.grouped:9.2e}  {report.share:5.1%}"
        for report in shown
    ]
    share = sum(report.share for report in affected)
    lines.append("")
    if not affected:
        return "\n".join(
            [*lines, "No linear stands out: plain rounding per output channel and token will do."]
        )
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
            "overrides:",
            *(f"  - {json.dumps(override)}" for override in diagnosis.overrides),
            "Or without groups: method=bi_smoothing.",
        ]
    if "activations" in causes:
        lines.append(
            "Outliers of activations are for smoothing (method=smoothquant), or for keeping apart (method=llm_int8)."
        )
    return "\n".join(lines)
