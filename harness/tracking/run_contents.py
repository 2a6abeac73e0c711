"""What a run in MLflow holds: names, params, tags, metrics, artifacts of a cell and of a sweep."""

from __future__ import annotations

import contextlib
import csv
import getpass
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.cell import Cell, cell_key, digest, score_key, to_json
from harness.core.labels import BITS_OF_DTYPE, bits_text, flatten, group_text, method_title
from harness.core.sweep import Sweep, command_line
from harness.core.text import file_name, without_password
from harness.reporting.metrics import headline, layer_error_name, problems_of
from harness.storage.json_files import write_json
from harness.storage.record import Record
from harness.storage.store import Store

PARAM_LIMIT, TAG_LIMIT, KEY_LIMIT = 6000, 8000, 250  # characters; MLflow cuts beyond them silently
BATCH_METRICS = 500  # of one log_batch
ENVIRONMENT_TAGS = ("commit", "device", "host")  # of provenance, by the last part of a name
ITEM_ROWS_SHOWN = 1000  # of per-item results; the Parquet file has all


# -- what is written ---------------------------------------------------------------------------------------------------


def run_names(cells: Sequence[Cell], titles: Mapping[str, str] | None = None) -> dict[str, str]:
    """cell_key -> "GPTQ · w4g32", with the model where there are several, and the key where that is not enough.

    MLflow sorts names by the alphabet: a model's cells stand together, in them a method's, in these the widths in order.

    titles: name of a method -> what papers call it
    """
    several = len({cell.model.name for cell in cells}) > 1
    names = {}
    for cell in cells:
        own = (
            "full precision"
            if cell.method.is_baseline
            else f"{method_title(cell.method.name, titles or {})} · {cell.scheme.name}"
        )
        names[cell_key(cell)] = f"{cell.model.name} · {own}" if several else own
    listed = list(names.values())
    return {
        key: name if listed.count(name) == 1 else f"{name} · {key[:6]}"
        for key, name in names.items()
    }


def method_curves(cells: Sequence[Cell]) -> dict[str, tuple[str, int]]:
    """cell_key -> (curve, step): "gptq" at its bit width; model, group, activation and KV bits join where they tell cells apart.

    A fractional width is a curve of its own, since steps are whole numbers.
    """
    models = {cell.model.name for cell in cells}
    groups = {group_text(cell) for cell in cells if not cell.method.is_baseline}
    curves: dict[str, tuple[str, int]] = {}
    taken: set[tuple[str, int]] = set()
    for cell in cells:
        scheme, words = (
            cell.scheme,
            [cell.method.name if not cell.method.is_baseline else "full_precision"],
        )
        bits = (
            BITS_OF_DTYPE.get(cell.model.dtype, 16)
            if cell.method.is_baseline
            else scheme.weight.bits
        )
        if not cell.method.is_baseline:
            words += [f"g{group_text(cell)}".replace("grow", "row")] if len(groups) > 1 else []
            words += [f"A{scheme.activation.bits}"] if scheme.activation else []
            words += [scheme.kv.text] if scheme.kv else []
            words += [f"{bits:g}bit"] if bits != int(bits) else []
        name = " ".join(words if len(models) == 1 else [cell.model.name, *words])
        if (name, round(bits)) in taken:
            name = f"{name} {cell_key(cell)[:6]}"
        taken.add((name, round(bits)))
        curves[cell_key(cell)] = (name, round(bits))
    return curves


def cell_params(record: Record) -> dict[str, Any]:
    """The cell, flat, under the names that its YAML has; what a reader filters by stands first.

    The bits of a baseline are those of its weights as stored, and not said before they are known: a param is written once.
    """
    cell = record.cell
    flat = flatten(cell)
    first = {
        "model": flat.pop("model.name"),
        "method": flat.pop("method.name"),
        "scheme": flat.pop("scheme.name"),
        "bits": bits_text(cell),
        "group": group_text(cell) or "none",
        "calibration": flat.pop("calibration.name", "none"),
    }
    for slot in ("reduction", "transform", "rounding", "tuning"):
        if f"{slot}.name" in flat:
            first[slot] = flat.pop(f"{slot}.name")
    if cell.method.is_baseline and not (cell.scheme.activation or cell.scheme.kv):
        stored = record.metrics().get("checkpoint/bits_per_weight")
        first.pop("bits") if stored is None else first.update(bits=f"{stored:g}")
    renamed = {name.removeprefix("scheme."): value for name, value in flat.items()}
    return {
        **first,
        **{
            name: json.dumps(value) if isinstance(value, list | dict) else value
            for name, value in renamed.items()
        },
    }


def cell_tags(record: Record, state: str, known: Mapping[str, str]) -> dict[str, str]:
    """The tags of a cell's run that a reader looks for; versions and all else of the environment are in `environment.json`.

    known: the tags that the run has; one that no longer applies is overwritten.
    """
    metrics = record.metrics()
    tags = {
        "harness.state": state,
        "harness.evaluations": ", ".join(sorted(record.scores)) or "none yet",
    }
    diverged = [
        f"{name} = {value}" for name, value in sorted(metrics.items()) if not math.isfinite(value)
    ]
    if diverged or "diverged" in known:
        tags["diverged"] = ", ".join(diverged) or "no"
    if record.failures and state == "failed":
        tags["failure"] = str(record.failures[-1].get("reason", ""))
    if record.smoke:
        tags["smoke"] = "stands on a part of the data only"
    problems = problems_of(record)
    if problems or "problems" in known:
        tags["problems"] = " ".join(problems) or "none"
    for name, value in flat_facts(record.provenance).items():
        if name.rpartition(".")[2] in ENVIRONMENT_TAGS and value not in ("", None):
            tags[f"environment.{name}"] = str(value)
    return tags


def layer_curves(record: Record) -> dict[str, dict[int, float]]:
    """Metric -> block -> the mean relative error of the matrices of one kind, such as all q_proj, or all experts' up_proj."""
    name = layer_error_name(record)
    found: dict[str, dict[int, list[float]]] = {}
    for row in record.layer_errors:
        value = None if name is None else row.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            kind = f"layers/{name}/{str(row['linear']).rsplit('.', 1)[-1]}"
            found.setdefault(kind, {}).setdefault(int(row["block"]), []).append(float(value))
    return {
        kind: {block: math.fsum(values) / len(values) for block, values in sorted(blocks.items())}
        for kind, blocks in found.items()
    }


def cell_description(record: Record, state: str) -> str:
    """The description of a cell's run."""
    metrics = record.metrics()
    shown = {metric: metrics[metric] for metric in headline([record]) if metric in metrics}
    lines = [f"**{record.cell.title}** — {state}", ""]
    lines += [
        f"- {name}: {value:.4g}" if math.isfinite(value) else f"- {name}: diverged"
        for name, value in shown.items()
    ]
    if record.failures and state == "failed":
        lines += [
            f"- failed in {record.failures[-1].get('stage', '')}: {record.failures[-1].get('reason', '')}"
        ]
    files = (
        "`layer_errors.csv`, `evaluations/`, `items/` (per-item results, as tables), `provenance/` (uncommitted changes of the "
        "code, installed packages), `log.txt`, `cell.json` (all settings)"
    )
    lines += [
        "",
        f"Its full ancestry, and the command that makes it again: `harness show {record.cell_key[:12]}`",
    ]
    return "\n".join([*lines, "", f"*Artifacts*: {files}."])


def sweep_params(sweep: Sweep) -> dict[str, Any]:
    """The parameters of a sweep's run."""
    names = {
        "models": [cell.model.name for cell in sweep.cells],
        "methods": [cell.method.name for cell in sweep.cells],
        "schemes": [cell.scheme.name for cell in sweep.cells],
        "evaluations": [evaluation.name for cell in sweep.cells for evaluation in cell.evaluations],
    }
    return {name: ", ".join(dict.fromkeys(values)) for name, values in names.items()} | {
        "cells": len(sweep.cells)
    }


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    """A sweep as JSON values."""
    return {
        "name": sweep.name,
        "title": sweep.title,
        "overrides": [without_password(override) for override in sweep.overrides],
        "cells": [
            {"title": cell.title, "cell_key": cell_key(cell), "cell": to_json(cell)}
            for cell in sweep.cells
        ],
        "skips": [{"titles": list(skip.titles), "reason": skip.reason} for skip in sweep.skips],
    }


def origin_tags(sweep: Sweep) -> dict[str, str]:
    """Tags that say which file a sweep came from."""
    return {
        "mlflow.source.name": command_line(sweep),
        "mlflow.source.type": "JOB",
        "mlflow.user": user_name(),
    }


def user_name() -> str:
    """The name of the user, or ""."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def record_fingerprint(record: Record) -> str:
    """Changes when anything does that a cell's artifacts show."""
    scores = {name: score["metrics"] for name, score in record.scores.items()}
    shown = [record.layer_errors, scores, record.failures, record.provenance]
    return digest(json.loads(json.dumps(shown, default=str), parse_constant=str))


def write_artifacts(folder: Path, record: Record, store: Store) -> None:
    """Write the artifacts of a cell's run into a folder."""
    cell = record.cell
    identity = {
        "title": cell.title,
        "cell_key": record.cell_key,
        "quantize_key": record.quantize_key,
    }
    write_json(folder / "cell.json", {**identity, "cell": to_json(cell)}, durable=False)
    facts = json.loads(without_password(json.dumps(record.provenance, default=str)))
    write_json(folder / "environment.json", facts, durable=False)
    for facts in record.provenance.values():
        for kept in (
            (facts.get("changes"), facts.get("packages")) if isinstance(facts, Mapping) else ()
        ):
            if kept and store.files.exists(store.root / kept):
                write_text(
                    folder / kept, store.files.read(store.root / kept).decode("utf-8", "replace")
                )
    _write_layer_errors(folder, record)
    for evaluation in cell.evaluations:
        if evaluation.name not in record.scores:
            continue
        name = file_name(evaluation.name)
        write_json(
            folder / "evaluations" / f"{name}.json", record.scores[evaluation.name], durable=False
        )
        items = store.evaluation_items(record, evaluation)
        if items is not None:
            (folder / "items").mkdir(exist_ok=True)
            path = store.items_path(record.cell_key, score_key(cell, evaluation))
            (folder / "items" / f"{name}.parquet").write_bytes(store.files.read(path))
            first = items.head(ITEM_ROWS_SHOWN)  # in the form that MLflow's pages show as a table
            first.to_json(
                folder / _item_table(name, len(items)),
                orient="split",
                index=False,
                date_format="iso",
                force_ascii=False,
            )
    with contextlib.suppress(FileNotFoundError):
        write_text(
            folder / "log.txt",
            store.files.read(store.log_path(record.cell_key)).decode(errors="replace"),
        )
    if record.failures:
        parts = [
            [str(failure.get(name, "")) for name in ("stage", "kind", "reason", "detail")]
            for failure in record.failures
        ]
        texts = [
            f"{stage}: {kind}: {reason}\n\n{detail}\n" for stage, kind, reason, detail in parts
        ]
        write_text(folder / "failures.txt", "\n".join(texts))


def _item_table(name: str, rows: int) -> str:
    """Where the table of an evaluation's items lies among a run's artifacts."""
    return (
        f"items/{name}.json"
        if rows <= ITEM_ROWS_SHOWN
        else f"items/{name}-first-{ITEM_ROWS_SHOWN}.json"
    )


def item_tables(record: Record, store: Store) -> list[dict[str, str]]:
    """The items of a cell's evaluations as MLflow lists tables, so that its pages show them as such."""
    found = []
    for evaluation in record.cell.evaluations:
        rows = record.scores.get(evaluation.name, {}).get("items", 0)
        if rows and store.items_path(record.cell_key, score_key(record.cell, evaluation)).exists():
            found.append({"path": _item_table(file_name(evaluation.name), rows), "type": "table"})
    return found


def data_of_cell(cell: Cell) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(context, name, digest, source) of the texts and benchmarks of a cell."""
    text = cell.calibration
    if text is not None:
        yield (
            "calibration",
            text.name,
            text.digest or "unknown",
            {"source": text.source, "split": text.split},
        )
    for evaluation in {evaluation.name: evaluation for evaluation in cell.evaluations}.values():
        settings = dict(evaluation.settings)
        source = {
            name: settings[name]
            for name in ("source", "split", "task", "include", "data_root")
            if settings.get(name)
        }
        yield "evaluation", evaluation.name, evaluation.data_digest or "unknown", source


def _write_layer_errors(folder: Path, record: Record) -> None:
    rows = record.layer_errors
    if not rows:
        return
    with (folder / "layer_errors.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(
            file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
        )
        table.writeheader()
        table.writerows(rows)


def write_text(path: Path, text: str) -> None:
    """Write a text file, its folders too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def metric_name(name: str) -> str:
    """MLflow takes letters, digits and _ - . space / : only."""
    return metric_key(re.sub(r"[^\w\-. /:]", "_", name))


def metric_key(name: str) -> str:
    """A name that MLflow accepts: characters it refuses become _, and a long name keeps a digest of its end."""
    return name if len(name) <= KEY_LIMIT else f"{name[: KEY_LIMIT - 9]}~{digest(name)[:8]}"


def flat_facts(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts as one level, names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= (
            flat_facts(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return flat


def cut_text(text: str, limit: int) -> str:
    """Text within MLflow's limit and without passwords; what is cut says so."""
    text = without_password(text)
    if len(text) <= limit:
        return text
    note = f" … [cut: {len(text)} characters in all; see the artifacts]"
    return text[: limit - len(note)] + note
