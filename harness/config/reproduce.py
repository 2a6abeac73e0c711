"""The command that reproduces a cell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness.config.renamed import current_name
from harness.core.cell import Cell, cell_key, score_key, to_json
from harness.core.errors import HarnessError
from harness.core.labels import without_settings

# fields without an override of their own: they follow from the others
NOT_TYPED = ("name", "digest", "base_digest", "overrides", "base_version")


def command_for(cell: Cell) -> str:
    """The command that computes one cell and its scores: names, and overrides where the cell differs from today's files.

    The command is checked by loading it: it leads to the same keys. If no such command exists (a configuration was renamed,
    a version raised, a corpus changed), the text states that and gives the nearest command; the record still describes the cell.
    """
    import shlex

    from harness.config.kept_sweeps import load_sweep

    words = _names(cell)
    for _ in range(3):  # with names alone, with what differs, and to see that nothing is left
        try:
            made = next(c for c in load_sweep(None, [*words, "baseline=false"]).cells)
        except (HarnessError, StopIteration):
            break
        different = _differences(cell, made)
        if cell_key(made) == cell_key(cell) and not any(
            word.startswith("evaluations=") for word in different
        ):
            return shlex.join(["harness", "run", *words])
        new = {word.partition("=")[0] for word in different}
        if not set(different) - set(words):
            break
        words = [word for word in words if word.partition("=")[0] not in new] + different
    return f"the configuration has changed since; nearest: {shlex.join(['harness', 'run', *words])}"


def _names(cell: Cell) -> list[str]:
    """Overrides that name the parts of a cell, without the settings that its sweep varied."""
    words = [
        f"model={without_settings(cell.model.name)}",
        f"method={current_name('method', without_settings(cell.method.name))}",
    ]
    words += [] if not cell.method.quantizes else [f"scheme={without_settings(cell.scheme.name)}"]
    if cell.calibration is not None:
        words.append(f"calibration={without_settings(cell.calibration.name)}")
    if cell.seed:
        words.append(f"seed={cell.seed}")
    latest = {evaluation.name: evaluation for evaluation in cell.evaluations}
    if latest:
        words.append(f"evaluations=[{','.join(latest)}]")
        limits = {evaluation.limit for evaluation in latest.values()}
        words += (
            [f"evaluations.limit={limits.pop()}"] if len(limits) == 1 and limits != {None} else []
        )
    return words


def _differences(cell: Cell, made: Cell) -> list[str]:
    """Overrides for the fields in which the cell `made` from names alone differs from the wanted cell."""
    found = []
    parts = {
        slot: (getattr(cell.method, slot), getattr(made.method, slot))
        for slot in ("reduction", "transform", "rounding", "tuning")
    }
    groups = {
        name: (getattr(cell, name), getattr(made, name))
        for name in ("calibration", "scheme", "model")
    }
    for slot, (wanted, given) in parts.items():
        if wanted is not None and given is not None:
            found += _changed(slot, to_json(wanted)["settings"], to_json(given)["settings"])
    for group, (wanted, given) in groups.items():
        found += _changed(group, to_json(wanted) or {}, to_json(given) or {})
    if cell.calibration is not None and cell.inputs != made.inputs:
        found.append(f"inputs={cell.inputs}")
    latest = {evaluation.name: evaluation for evaluation in cell.evaluations}
    others = {evaluation.name: evaluation for evaluation in made.evaluations}
    missing = [
        name
        for name in latest
        if name not in others or score_key(cell, latest[name]) != score_key(cell, others[name])
    ]
    if missing:
        entries = []
        for name, evaluation in latest.items():
            own, theirs = (
                to_json(evaluation)["settings"],
                to_json(others[name])["settings"] if name in others else {},
            )
            changed = {key: value for key, value in own.items() if value != theirs.get(key)}
            entries.append(
                f"{{{name}: {_literal(changed)}}}" if name in missing and changed else name
            )
        found.append(f"evaluations=[{','.join(entries)}]")
    return found


def _changed(prefix: str, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in wanted.items():
        if name in NOT_TYPED or value == given.get(name):
            continue
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            found += _changed(f"{prefix}.{name}", value, given[name])
        else:
            found.append(f"{prefix}.{name}={_literal(value)}")
    return found


def _literal(value: Any) -> str:
    """A JSON value in the grammar of overrides."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_literal, value)) + "]"
    if isinstance(value, str):
        return (
            value
            if re.fullmatch(r"[A-Za-z_][\w./-]*", value)
            else "'" + value.replace("'", "\\'") + "'"
        )
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
