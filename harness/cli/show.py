"""`harness show`: everything known of one cell, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harness.core.cell import Cell, baseline_of, cell_key, quantize_key, to_json, untuned
from harness.core.labels import budget_of
from harness.data import kept
from harness.storage.budgets import budgets_of_cell
from harness.storage.places import is_url
from harness.storage.record import Record
from harness.storage.store import Store


def cell_text(cell: Cell, store: Store) -> str:
    """Everything known of a cell, with the command that reproduces it; kept until a file of the cell changes."""
    command = again(cell, store)
    if is_url(store.place):
        return record_text(store.record(cell), store, command)
    cells = (cell, baseline_of(cell))
    checkpoints = (quantize_key(each) for each in (*cells, untuned(cell)))
    stamp = kept.stamp_of(
        [
            *(store.cell_folder(cell_key(each)) for each in cells),
            *(store.checkpoint_folder(key) / "manifest.json" for key in checkpoints),
            store.root / "provenance",
            store.root / "budgets",
        ]
    )
    question = [kept.code_stamp().text, stamp.text, str(store.place), to_json(cell), command]
    return str(
        kept.answered(
            "show", question, [stamp], lambda: record_text(store.record(cell), store, command)
        )
    )


def again(cell: Cell, store: Store) -> str:
    """The command that reproduces a cell; of one that a bit budget chose, the command of its sweep."""
    from harness.config.reproduce import command_for

    mixed = list(budgets_of_cell(store, cell)) if budget_of(cell)[0] else []
    return str(mixed[0][2]["command"]) if mixed else command_for(cell)


def cell_facts(cell: Cell, store: Store) -> dict[str, Any]:
    """What is known of a cell as JSON: keys, configuration, scores with their problems, failures, provenance, the command."""
    from harness.evaluation.flips import with_flips
    from harness.reporting.metrics import problems_of

    record = with_flips(store.record(cell), store)
    return {
        "key": record.cell_key,
        "checkpoint": quantize_key(cell),
        "title": cell.title,
        "config": to_json(cell),
        "metrics": record.metrics(),
        "missing": list(record.missing),
        "problems": list(problems_of(record)),
        "layer_errors": list(record.layer_errors),
        "failures": [dict(failure) for failure in record.failures],
        "provenance": dict(record.provenance),
        "log": store.where(store.log_path(record.cell_key)),
        "command": again(cell, store),
    }


def record_text(record: Record, store: Store, command: str) -> str:
    """Everything known of a cell: what it is, what it scored, how its layers fared, how it was made and how to make it again."""
    import yaml

    from harness.evaluation.flips import with_flips

    cell = record.cell
    sections = [
        f"{cell.title}\n  cell        {record.cell_key}\n  checkpoint  {quantize_key(cell)}"
    ]
    config = {
        name: value
        for name, value in to_json(cell).items()
        if name not in ("evaluations", "variant")
    }
    sections.append(
        "config\n" + _indent(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    )
    chosen = _budgets(record, store)
    if chosen:
        sections.append("bit budgets\n" + _indent(chosen))
    sections.append("scores\n" + _indent(_scores(with_flips(record, store)) or "none yet"))
    delta = _delta(record)
    if delta:
        sections.append("difference from the base\n" + _indent(delta))
    if record.layer_errors:
        sections.append("layer errors (largest first)\n" + _indent(_layer_errors(record)))
    unseen = _unseen_experts(record)
    if unseen:
        sections.append("experts that too few calibration tokens reached\n" + _indent(unseen))
    for failure in record.failures:
        text = (
            f"{failure.get('stage', '')}: {failure.get('reason', '')}\n{failure.get('detail', '')}"
        )
        sections.append(f"failure ({failure.get('kind', '')})\n" + _indent(text))
    sections.append("ancestry\n" + _indent(_ancestry(record, store)))
    if record.provenance:
        sections.append(
            "made by\n"
            + _indent(yaml.safe_dump(record.provenance, sort_keys=False, allow_unicode=True))
        )
    sections.append(f"log     {store.where(store.log_path(record.cell_key))}\nagain   {command}")
    return "\n\n".join(sections)


def _budgets(record: Record, store: Store) -> str:
    """The budgets that chose the cell: of which sweep, how large, and what the comparison with the uniform cell gave."""
    lines = []
    for sweep, name, content in budgets_of_cell(store, record.cell):
        bits = content["bits"] / content["weights"]
        measured = content["divergence"]
        kl = "not measured" if measured is None else f"KL {measured:.4g} nats per token"
        verdict = (content.get("verdict") or {}).get("verdict", "no verdict yet")
        lines.append(f"{name} of sweep {sweep}: {bits:.3f} bits per weight, {kl}, {verdict}")
        lines += [
            f"  from {each['title']}  {each['cell_key'][:12]}" for each in content["candidates"]
        ]
    return "\n".join(lines)


def _ancestry(record: Record, store: Store) -> str:
    """All that the numbers descend from: model, texts, data, seeds, code, packages, devices, and the cells behind them."""
    cell = record.cell
    model = cell.model
    revision = f"@{model.revision}" if model.revision else ""
    lines = [
        (
            "model",
            f"{model.name}: {model.source}{revision}, {model.dtype}, weights {model.digest or 'not known'}",
        )
    ]
    if model.base:
        lines.append(("base", f"{model.base}, weights {model.base_digest}"))
    if cell.calibration is not None:
        text = cell.calibration
        windows = f"{text.samples} windows of {text.length} tokens by seed {text.seed}"
        place = f"{text.source}, split {text.split}, digest {text.digest or 'not known'}"
        lines.append(("calibration", f"{text.name}: {windows} from {place}"))
    random = any(part.stochastic for part in cell.method.parts)
    lines.append(
        ("seed", f"{cell.seed}" if random else f"{cell.seed}, which the method does not draw from")
    )
    for evaluation in cell.evaluations:
        limit = f", the first {evaluation.limit} items" if evaluation.limit is not None else ""
        scorer = f"{evaluation.name}: {evaluation.evaluator}, version {evaluation.version}{limit}"
        lines.append(("data", f"{scorer}, data {evaluation.data_digest or 'without a digest'}"))
    made: dict[str, Mapping[str, Any]] = {
        name: facts for name, facts in record.provenance.items() if isinstance(facts, Mapping)
    }
    scored = {name: score.get("provenance") for name, score in record.scores.items()}
    made |= {
        name: facts
        for name, facts in scored.items()
        if isinstance(facts, Mapping) and facts not in made.values()
    }
    for name, facts in made.items():
        changed = _place(store, facts.get("changes", ""))
        commit = facts.get("commit") or "an installed package"
        lines.append(("code", f"{name}: {commit}" + (f", changes {changed}" if changed else "")))
        if facts.get("packages"):
            lines.append(("packages", f"{name}: {_place(store, facts['packages'])}"))
        device, host, threads = (
            facts.get(fact) or "not known" for fact in ("device", "host", "threads")
        )
        lines.append(("device", f"{name}: {device} on host {host}, threads {threads}"))
    if cell.method.tuning is not None:
        lines.append(("tuned from", f"checkpoint {quantize_key(untuned(cell))}"))
    if not cell.method.is_baseline:
        lines.append(("compared", f"with cell {cell_key(baseline_of(cell))}"))
    return "\n".join(f"{name:<11} {text}" for name, text in dict.fromkeys(lines))


def _place(store: Store, name: str) -> str:
    if not name:
        return ""
    return f"{store.root / name}" + ("" if store.files.exists(store.root / name) else " (not here)")


def _scores(record: Record) -> str:
    from harness.reporting.metrics import problems_of

    metrics = record.metrics()
    width = max(map(len, metrics), default=0)
    lines = []
    for name, value in metrics.items():
        if not name.endswith("_stderr"):
            error = metrics.get(f"{name}_stderr")
            lines.append(
                f"{name:<{width}}  diverged ({value})"
                if not math.isfinite(value)
                else f"{name:<{width}}  {value:.6g}"
                + (f" ± {error:.2g}" if error is not None and math.isfinite(error) else "")
            )
    lines += [f"{name}  (missing)" for name in record.missing]
    lines += problems_of(record)
    return "\n".join(lines)


def _delta(record: Record) -> str:
    """What one more fine-tune of the same base costs; empty for a cell that stores no difference."""
    manifest = record.manifest or {}
    base, delta = manifest.get("base"), manifest.get("delta")
    if not base or not delta:
        return ""
    metrics = record.metrics()
    from harness.reporting.metrics import number_of

    shared = {k: number_of(metrics, f"delta/bits_with_base({k})") or 0.0 for k in (1, 2, 4, 16)}
    total = delta["bytes"] + delta["ends_bytes"]
    return "\n".join(
        (
            f"base              {base['source']}, {base['dtype']}, weights {base['digest']}",
            f"bytes             {total:,}: {delta['bytes']:,} of matrices, {delta['ends_bytes']:,} of other tensors that differ",
            f"fine-tune         {delta['fine_tune_bytes']:,} bytes, {delta['ratio']:.2f} times as many",
            "bits per weight   with the base, by the number of models that share it: "
            + ", ".join(f"{bits:.3f} for {k}" for k, bits in shared.items()),
        )
    )


def _layer_errors(record: Record) -> str:
    def relative(row: Mapping[str, Any]) -> float:
        return next(
            (
                float(row[name])
                for name in ("output_error", "weight_error")
                if isinstance(row.get(name), int | float)
            ),
            0.0,
        )

    rows = sorted(record.layer_errors, key=relative, reverse=True)
    lines = []
    for row in rows[:10]:
        facts = "  ".join(
            f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, int | float) and k != "block"
        )
        lines.append(f"block {row.get('block')}  {row.get('linear')}  {facts}")
    return "\n".join(lines + ([f"… and {len(rows) - 10} more"] if len(rows) > 10 else []))


def _unseen_experts(record: Record) -> str:
    """Which matrices were rounded to nearest, and where scales were not searched, for want of calibration tokens."""
    notes = (record.manifest or {}).get("notes", {})
    rounded = {
        block: found for block, each in notes.items() if (found := each.get("rounded_to_nearest"))
    }
    unscaled = sum(len(each.get("pairs_without_calibration", ())) for each in notes.values())
    lines = []
    if rounded:
        lines.append(f"{sum(map(len, rounded.values()))} matrices were rounded to nearest instead")
        for block, found in rounded.items():
            none = sum(tokens == 0 for tokens in found.values())
            first = ", ".join(
                f"{name} ({tokens} tokens)" for name, tokens in list(found.items())[:3]
            )
            more = f" … and {len(found) - 3} more" if len(found) > 3 else ""
            lines.append(
                f"block {block}  {len(found)}, of them {none} without any token: {first}{more}"
            )
    if unscaled:
        lines.append(f"{unscaled} scales inside experts were left at 1")
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.rstrip().splitlines())
