"""`harness diff A B`: what two sweeps or two stores have in common, and in which configuration and scores they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.cli.arguments import load
from harness.core.cell import Cell, cell_key, to_json
from harness.core.errors import ConfigError
from harness.core.text import short_list
from harness.storage.places import is_url
from harness.storage.record import Record
from harness.storage.store import Store

SHOWN = 12  # differing metrics of one cell


def records_of(name: str, runs: str = "") -> list[Record]:
    """The records of a sweep (its name or file) or of a store (a folder with cells/, or a URL). Raises ConfigError for neither."""
    if is_url(name) or (Path(name) / "cells").is_dir():
        store = Store(name)
        return list(store.snapshot().records())
    if Path(name).is_dir():
        raise ConfigError(f"{name}: a folder without cells/ is no store; name a store or a sweep")
    sweep, store = load(name, None, runs)
    store = store.snapshot(sweep.cells)
    return [store.record(cell) for cell in sweep.cells]


def compare(ours: list[Record], theirs: list[Record]) -> dict[str, Any]:
    """Cells by key and by title: only in A, only in B, of one key, of one title and another key.

    {"only_a": titles, "only_b": titles, "same": number, "differing": [{"title", "config": {field: [a, b]}, "metrics": …}]}
    """
    by_key = {record.cell_key: record for record in theirs}
    by_title = {record.cell.title: record for record in theirs}
    matched: set[str] = set()
    only_a, differing, same = [], [], 0
    for record in ours:
        other = by_key.get(record.cell_key) or by_title.get(record.cell.title)
        if other is None:
            only_a.append(record.cell.title)
            continue
        matched.add(other.cell_key)
        config = dict(_changed(_flat(record.cell), _flat(other.cell)))
        metrics = dict(_changed(record.metrics(), other.metrics()))
        if config or metrics or record.cell_key != other.cell_key:
            differing.append({"title": record.cell.title, "config": config, "metrics": metrics})
        else:
            same += 1
    only_b = [record.cell.title for record in theirs if record.cell_key not in matched]
    return {"only_a": only_a, "only_b": only_b, "same": same, "differing": differing}


def diff_text(a: str, b: str, found: Mapping[str, Any]) -> str:
    """What `compare` found, for a terminal."""
    lines = [f"same    {found['same']} cells have equal configurations and scores"]
    for name, key in ((a, "only_a"), (b, "only_b")):
        if found[key]:
            lines.append(f"only in {name}: {len(found[key])} cells: {short_list(found[key], 8)}")
    for each in found["differing"]:
        lines.append(f"differ  {each['title']}")
        rows = [*each["config"].items(), *each["metrics"].items()]
        lines += [f"          {field}: {_shown(x)} → {_shown(y)}" for field, (x, y) in rows[:SHOWN]]
        lines += [f"          … and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return "\n".join(lines)


def _flat(cell: Cell) -> dict[str, Any]:
    """Dotted field -> value of what makes a cell's numbers; where things lie and what they are called is left out."""
    content = {
        name: value
        for name, value in to_json(cell).items()
        if name not in ("evaluations", "variant")
    }
    return {
        field: value
        for field, value in _leaves(content, "")
        if field.rpartition(".")[2] not in ("source", "name", "needs")
    } | {"key": cell_key(cell)}


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{prefix}.{name}".lstrip("."))
    else:
        yield prefix, value


def _changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """(name, [value, other value]) where two mappings differ; NaN equals NaN, and None stands for what is absent."""
    for name in dict.fromkeys((*ours, *theirs)):
        x, y = ours.get(name), theirs.get(name)
        both_nan = all(isinstance(v, float) and math.isnan(v) for v in (x, y))
        if x != y and not both_nan:
            yield name, [x, y]


def _shown(value: Any) -> str:
    if value is None:
        return "—"
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else str(value)[:12]
        if isinstance(value, str)
        else str(value)
    )
