"""Whether what a finished sweep wrote is as new as its results: tables, figures, report, and its runs in MLflow.

A run that finds everything done compares stamps with those that the last run left in the sweep's state, and writes nothing again
while they are equal. A stamp costs a look at the files; none is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core.cell import baseline_of, cell_key, digest, quantize_key, to_json
from harness.core.package import published_folders
from harness.core.sweep import Sweep
from harness.data import kept
from harness.data.kept import Stamp
from harness.storage.places import is_url
from harness.storage.store import Store
from harness.tracking.ui import database_of


def results_stamp(sweep: Sweep, store: Store) -> Stamp | None:
    """The stamp of all files that tables of a sweep are made from; None for an object store, which has no cheap one."""
    if is_url(store.place):
        return None
    cells = dict.fromkeys(made for cell in sweep.cells for made in (cell, baseline_of(cell)))
    folders = [store.cell_folder(cell_key(cell)) for cell in cells]
    manifests = [store.checkpoint_folder(quantize_key(c)) / "manifest.json" for c in cells]
    chosen = [store.root / "budgets" / sweep.name] if sweep.budgets else []
    return kept.stamp_of([*folders, *manifests, *chosen, *published_folders(sweep.path)])


def tables_question(sweep: Sweep, results: Stamp) -> list[Any]:
    """All that the tables and the report of a sweep follow from, as JSON: code, results, cells, and what the sweep states."""
    cells = [[cell_key(cell), cell.title, *map(to_json, cell.evaluations)] for cell in sweep.cells]
    texts = [sweep.name, sweep.title, sweep.description, *sweep.overrides]
    titles = sorted(sweep.method_titles.items())
    stated = [*map(to_json, sweep.tables), *map(to_json, sweep.findings)]
    place = str(sweep.path)
    return [kept.code_stamp().text, results.text, digest(cells), texts, titles, stated, place]


def written(sweep: Sweep, store: Store) -> dict[str, Any]:
    """What a run leaves in the sweep's state once its outputs are written; {} where there is no cheap stamp.

    outputs: a digest of all that they follow from; database: size and time of change of MLflow's database, where one is used.
    """
    results = results_stamp(sweep, store)
    if results is None:
        return {}
    database = database_of(sweep.runtime.tracking, sweep.runtime.runs)
    return {"outputs": digest(tables_question(sweep, results)), "database": _changed(database)}


def is_current(state: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether tables, figures and report of the last run show the results of now."""
    return bool(now) and state.get("outputs") == now["outputs"]


def is_untouched(state: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether MLflow's database is as the last run left it, so that it need not be opened to see that the runs are there."""
    return bool(now) and now["database"] is not None and state.get("database") == now["database"]


def _changed(path: Path | None) -> list[int] | None:
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return None if status is None else [status.st_size, status.st_mtime_ns]
