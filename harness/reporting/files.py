"""Tables, figures and the report of a sweep as files of its store: runs/tables/, runs/figures/ and runs/reports/."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.core.cell import cell_key
from harness.core.sweep import Sweep
from harness.reporting.budgets import budget_rows, render_budgets
from harness.reporting.gallery import draw_files
from harness.reporting.render import FORMATS, render
from harness.reporting.report import report_page
from harness.reporting.table_data import TableData
from harness.reporting.tables import build_all
from harness.storage.record import Record
from harness.storage.store import Store

REPORTS = "reports"
BUDGETS = "budgets.md"


def write_tables(sweep: Sweep, made: Mapping[str, TableData], store: Store) -> tuple[Path, ...]:
    """The sweep's tables in every format, and that of its bit budgets; in HTML a number links to the cell that made it."""
    links = {cell_key(cell): f"../../cells/{cell_key(cell)}/cell.json" for cell in sweep.cells}
    paths = []
    for name, data in made.items():
        for form, suffix in FORMATS.items():
            path = store.root / "tables" / sweep.name / f"{name}{suffix}"
            store.write_file(path, render(data, form, links if form == "html" else None).encode())
            paths.append(path)
    rows = budget_rows(sweep, store)
    if rows:
        paths.append(store.root / "tables" / sweep.name / BUDGETS)
        store.write_file(paths[-1], render_budgets(rows).encode())
    return tuple(paths)


def write_figures(sweep: Sweep, records: Sequence[Record], store: Store) -> tuple[Path, ...]:
    """The sweep's figures as SVG, PDF and PNG, with a page that shows all of them."""
    written = []
    with tempfile.TemporaryDirectory() as folder:
        for file in draw_files(sweep, records, Path(folder)):
            written.append(store.root / "figures" / sweep.name / file.name)
            store.write_file(written[-1], file.read_bytes())
    return tuple(written)


def write_report(
    sweep: Sweep,
    records: Sequence[Record],
    made: Mapping[str, TableData],
    store: Store,
    progress: str = "",
) -> Path:
    """The sweep's report, with the figures that the store has; returns its path.

    progress: how far a running sweep is; the page then says so, and loads itself again.
    """
    folder = store.root / "figures" / sweep.name
    names = sorted(name for name in store.files.names(folder) if name.endswith(".svg"))
    images = {name.removesuffix(".svg"): store.files.read(folder / name) for name in names}
    path = report_path(sweep, store)
    store.write_file(path, report_page(sweep, records, made, images, store, progress).encode())
    return path


def report_path(sweep: Sweep, store: Store) -> Path:
    """Where the report of a sweep lies."""
    return store.root / REPORTS / f"{sweep.name}.html"


def refresh(sweep: Sweep, store: Store) -> Path:
    """Write tables, figures and the report again from the store; returns the path of the report."""
    known = store.snapshot(sweep.cells)
    records = [known.record(cell) for cell in sweep.cells]
    made = build_all(sweep, records, known)
    write_tables(sweep, made, store)
    write_figures(sweep, records, store)
    return write_report(sweep, records, made, store)
