"""Sweeps as they were read before: reading takes one to two seconds, looking whether anything changed some milliseconds.

A sweep is read again when anything that it was read from has changed: its file, the conf/ folders, published tables, plugins, the
code, the working directory, the environment, or the models, texts and tasks whose digests it holds. A sweep that asked the hub
for a commit is always read again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.locations import config_roots
from harness.core.cell import (
    Calibration,
    Cell,
    Evaluation,
    Method,
    Model,
    Scheme,
    from_json,
    to_json,
)
from harness.core.package import PACKAGE, project_folder, published_folders
from harness.core.sweep import (
    Cluster,
    Finding,
    First,
    Runtime,
    Skip,
    StoreLimits,
    Sweep,
    Table,
    Tracking,
)
from harness.core.text import texts_in
from harness.data import hub, kept, task_files

ENVIRONMENT = ("HARNESS_", "HF_", "HOME", "XDG_")  # prefixes of variables that reading looks at
INTERPOLATED = re.compile(r"\$\{(oc\.|now:|hydra:|env:)")  # in a YAML: its value is not in the file
MOST_CELLS = 20_000
PARTS: dict[str, type] = {
    "model": Model,
    "method": Method,
    "scheme": Scheme,
    "calibration": Calibration,
}


def load_sweep(name: str | None, overrides: Sequence[str] = ()) -> Sweep:
    """`grid.load_sweep`, or its result of an earlier process where nothing that it depends on has changed since."""
    folders = [*config_roots(), *(root / "sweeps" for root in (Path.cwd(), project_folder()))]
    file = None if name is None else Path(name).expanduser().absolute()
    own = [file] if file is not None and file.is_file() else []
    beside = published_folders(own[0] if own else None)
    stamp = kept.stamp_of([*folders, *own, *beside])
    question = [
        kept.code_stamp().text,
        stamp.text,
        name,
        list(overrides),
        os.getcwd(),
        sorted(pair for pair in os.environ.items() if pair[0].startswith(ENVIRONMENT)),
    ]
    found = kept.find("sweep", question)
    if found is not None and _unchanged(found["sources"]):
        return unpacked(found["sweep"])

    from harness.config.grid import load_sweep as read_sweep

    asked = hub.asked_commits()
    sweep = read_sweep(name, overrides)
    sources = {str(path): kept.stamp_of([path]) for path in _sources(sweep)}
    stamps = (kept.code_stamp(), stamp, *sources.values())
    if (
        asked == hub.asked_commits()
        and len(sweep.cells) <= MOST_CELLS
        and all(each.is_settled for each in stamps)
        and not _interpolates([*folders, *own])
    ):
        content = json.loads(json.dumps(packed(sweep)))
        if unpacked(content) == sweep and packed(unpacked(content)) == content:
            answer = {"sources": {p: s.text for p, s in sources.items()}, "sweep": content}
            kept.keep("sweep", question, answer)
    return sweep


def packed(sweep: Sweep) -> dict[str, Any]:
    """A sweep as JSON values, each part that cells share once."""
    pools: dict[str, dict[int, int]] = {name: {} for name in (*PARTS, "evaluations")}
    values: dict[str, list[Any]] = {name: [] for name in pools}

    def place(pool: str, value: Any) -> int | None:
        if value is None:
            return None
        number = pools[pool].setdefault(id(value), len(values[pool]))
        if number == len(values[pool]):
            values[pool].append(to_json(value))
        return number

    rows = [
        [
            *(place(name, getattr(cell, name)) for name in PARTS),
            place("evaluations", cell.evaluations),
            cell.inputs,
            cell.seed,
            cell.variant,
        ]
        for cell in sweep.cells
    ]
    plain = {
        field.name: to_json(getattr(sweep, field.name))
        for field in dataclasses.fields(Sweep)
        if field.name not in ("cells", "runtime", "path", "first")
    }
    runtime = to_json(sweep.runtime)
    for name in ("runs", "data_root"):
        runtime[name] = _packed_path(getattr(sweep.runtime, name))
    first = [[each.text, sorted(each.keys)] for each in sweep.first]
    return {
        **plain,
        "parts": values,
        "cells": rows,
        "runtime": runtime,
        "path": _packed_path(sweep.path),
        "first": first,
    }


def unpacked(content: Mapping[str, Any]) -> Sweep:
    """The inverse of `packed`."""
    pools: dict[str, list[Any]] = {
        name: [from_json(kind, each) for each in content["parts"][name]]
        for name, kind in PARTS.items()
    }
    pools["evaluations"] = [
        tuple(from_json(Evaluation, each) for each in several)
        for several in content["parts"]["evaluations"]
    ]
    cells = []
    for *numbers, evaluations, inputs, seed, variant in content["cells"]:
        parts: dict[str, Any] = {
            name: None if number is None else pools[name][number]
            for name, number in zip(PARTS, numbers, strict=True)
        }
        wanted = pools["evaluations"][evaluations]
        cells.append(Cell(**parts, evaluations=wanted, inputs=inputs, seed=seed, variant=variant))
    runtime = content["runtime"]
    given = {
        **runtime,
        "runs": _unpacked_path(runtime["runs"]),
        "data_root": _unpacked_path(runtime["data_root"]),
        "store": from_json(StoreLimits, runtime["store"]),
        "cluster": from_json(Cluster, runtime["cluster"]),
        "tracking": from_json(Tracking, runtime["tracking"]),
    }
    return Sweep(
        name=content["name"],
        title=content["title"],
        description=content["description"],
        cells=tuple(cells),
        skips=tuple(from_json(Skip, each) for each in content["skips"]),
        tables=tuple(from_json(Table, each) for each in content["tables"]),
        runtime=Runtime(**given),
        path=_unpacked_path(content["path"]),
        overrides=tuple(content["overrides"]),
        findings=tuple(from_json(Finding, each) for each in content["findings"]),
        method_titles=dict(content["method_titles"]),
        first=tuple(First(text, frozenset(keys)) for text, keys in content["first"]),
    )


def _packed_path(path: Path | str | None) -> list[str] | str | None:
    return [str(path)] if isinstance(path, Path) else path


def _unpacked_path(content: Any) -> Any:
    return Path(content[0]) if isinstance(content, list) else content


def _unchanged(sources: Mapping[str, str]) -> bool:
    return all(kept.stamp_of([Path(path)]).text == text for path, text in sources.items())


def _sources(sweep: Sweep) -> Iterator[Path]:
    """The files and folders outside conf/ and sweeps/ whose digests or contents a sweep holds."""
    if sweep.runtime.data_root is not None:
        yield sweep.runtime.data_root
    places: dict[str, None] = {}
    for cell in sweep.cells:
        places |= {cell.model.source: None, cell.model.base: None}
        if cell.calibration is not None:
            places[cell.calibration.source] = None
    for evaluation in dict.fromkeys(each for cell in sweep.cells[:1] for each in cell.evaluations):
        settings = to_json(evaluation)["settings"]
        places |= dict.fromkeys(texts_in(settings))
        if isinstance(settings.get("task"), str) and settings.get("include"):
            members = task_files.members(settings["task"], settings["include"])
            places |= dict.fromkeys(map(str, task_files.folders(members)))
    for place in places:
        if os.path.isabs(place) and not Path(place).is_relative_to(PACKAGE):
            yield Path(place)


def _interpolates(places: Sequence[Path]) -> bool:
    """Whether a YAML of these places takes a value from the environment or the clock."""
    for place in places:
        for path in place.rglob("*.yaml") if place.is_dir() else [place]:
            if path.is_file() and INTERPOLATED.search(path.read_text("utf-8", errors="replace")):
                return True
    return False
