"""Records into MLflow while a sweep runs, and again at any time from the store.

One experiment per study; in it one parent run per sweep (tag `harness.sweep`) with one child run per cell (tag `harness.key`). A
run is looked up by its tag before one is made, so that a sweep that was killed, repeated or published again completes its runs
and never doubles them; runs that somebody deleted are made again.

    child    params: the cell, flat. Metrics: every number under its full name, and the mean error of the layers of each kind with
             the block as step. Artifacts: cell, layer errors, each evaluation with its items, log, environment, failures.
    parent   one curve per method and score, "wikitext2/perplexity gptq", with the bit width as step; the plan, tables, figures, the
             report; a description that says what to open.

The charts page of MLflow 3.17 draws only the runs that are unfolded, under one heading per part of a metric's name before its last
slash, in the order of the alphabet. Its runs page nests children only while nothing is sorted or filtered. So the page of a sweep's
cells is a view that is kept as a tag of the experiment (`views.py`): filtered to the sweep, best first, with charts of its own.

MLflow would store an infinity as 1.8e308 and cut long values silently: here a value that is not finite becomes the tag `diverged`,
and a value that is cut says so. Nothing in this module may cost a result: the store has everything, and `publish` builds the runs
again from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.cell import Cell, cell_key
from harness.core.errors import TrackingError
from harness.core.labels import group_text
from harness.core.sweep import Runtime, Sweep, Tracking, command_line
from harness.core.text import without_password
from harness.evaluation.flips import with_flips
from harness.reporting.budgets import budget_rows, render_budgets
from harness.reporting.files import BUDGETS, REPORTS
from harness.reporting.gallery import draw_files
from harness.reporting.metrics import better_is_higher, quality_metrics
from harness.reporting.render import FORMATS, render
from harness.reporting.report import report_page
from harness.reporting.tables import build_all
from harness.storage.json_files import write_json
from harness.storage.places import is_url
from harness.storage.record import Record
from harness.storage.store import Store
from harness.tracking.connection import Connection
from harness.tracking.run_contents import (
    BATCH_METRICS,
    PARAM_LIMIT,
    TAG_LIMIT,
    cell_description,
    cell_params,
    cell_tags,
    cut_text,
    data_of_cell,
    item_tables,
    layer_curves,
    method_curves,
    metric_key,
    metric_name,
    origin_tags,
    record_fingerprint,
    run_names,
    sweep_json,
    sweep_params,
    write_artifacts,
    write_text,
)
from harness.tracking.tracker import STATUS, NullTracker, Tracker
from harness.tracking.views import (
    BITS,
    artifact_file,
    artifact_page,
    cells_view,
    curve_metric,
    curves_view,
    run_page,
    view_key,
    view_page,
    view_tag,
)

if TYPE_CHECKING:
    from harness.reporting.table_data import TableData


EXPERIMENT_TAG_LIMIT, DATASET_NAME_LIMIT, DATASET_DIGEST_LIMIT = 5000, 500, 36
BATCH_PARAMS = 100  # entries of one log_batch
FINGERPRINT = "mlflow.harness.artifacts"  # a tag that MLflow's pages do not show: its name begins with "mlflow."
SHORT_GUIDE = "open the run of a sweep for its tables, its figures and links to its cells"
OPEN_THIS = """\
**What to open**

- *cells, best first* above: one run per cell, with its scores as columns.
- *all methods over bits per weight* above: one chart per score with a curve per method.
- *Artifacts* of this run: `report.html` (everything on one page), `tables/` (HTML, Markdown, LaTeX, CSV), `figures/index.html`,
  `plan.txt`.
- *Model metrics* of this run: one curve per method and score, the bit width as step.
- A cell's run: parameters, every metric, layer errors by block, per-item results and log.
"""


def open_tracker(sweep: Sweep, plan_text: str = "") -> Tracker:
    """The tracker of a sweep's runtime. Raises TrackingError where the tracking store cannot be reached or refuses."""
    tracking = sweep.runtime.tracking
    if tracking.kind == "none":
        return NullTracker()
    return MLflowTracker(sweep, plan_text)


def publish(store: Store, sweep: Sweep | None = None, tracking: Tracking | None = None) -> str:
    """Build the MLflow runs of a sweep, or of everything in the store, again from the records. Returns what was done, one line.

    Runs that are there are completed; doing it twice changes nothing. Cells of which nothing is known yet are left out.
    """
    if sweep is None:
        now = store.snapshot()
        cells = tuple(cell for key in now.cell_keys() if (cell := now.cell(key)) is not None)
        runtime = Runtime(store.place, tracking=tracking or Tracking())
        name = str(store.place) if is_url(store.place) else store.root.name
        sweep = Sweep(
            "store", f"Everything in {name}", "All cells of the store.", cells, (), (), runtime
        )
    elif tracking is not None:
        sweep = dataclasses.replace(
            sweep, runtime=dataclasses.replace(sweep.runtime, tracking=tracking)
        )
    if sweep.runtime.tracking.kind == "none":
        raise TrackingError(
            "tracking=none keeps no runs; publish with tracking=sqlite or tracking=server tracking.uri=http://…"
        )
    store = store.snapshot(sweep.cells)
    records = [with_flips(store.record(cell), store) for cell in sweep.cells]
    known = [record for record in records if record.manifest or record.scores or record.failures]
    tracker = MLflowTracker(sweep, "", rebuild=True)
    for record in known:
        tracker.cell(record, _state(record))
    with tempfile.TemporaryDirectory() as folder:
        made, files = build_all(sweep, records, store), draw_files(sweep, records, Path(folder))
        images = {path.stem: path.read_bytes() for path in files if path.suffix == ".svg"}
        files.append(Path(folder) / REPORTS / f"{sweep.name}.html")
        write_text(files[-1], report_page(sweep, records, made, images, store))
        tracker.finish(made, files, "")
    left = f"; {len(records) - len(known)} have no results yet" if len(known) < len(records) else ""
    place = without_password(tracker.uri)
    return f'published {len(known)} cells as experiment "{tracker.experiment}" in {place}{left}'


def tracked_page(sweep: Sweep) -> str | None:
    """The page of a sweep of which MLflow has a live run, and of each of its cells; None where it lacks one.

    "" with tracking=none. Reads alone. Raises TrackingError.
    """
    if sweep.runtime.tracking.kind == "none":
        return ""
    connection = Connection(sweep)
    with connection.writing(f"read {connection.uri}"):
        experiment = connection.client.get_experiment_by_name(connection.experiment)
        if experiment is None or experiment.lifecycle_stage == "deleted":
            return None
        runs = connection.search(str(experiment.experiment_id), "")
    tags = {run.info.run_id: run.data.tags for run in runs}
    parents = {
        run_id
        for run_id, own in tags.items()
        if own.get("harness.sweep") == sweep.name and "mlflow.parentRunId" not in own
    }
    known = {
        own.get("harness.key") for own in tags.values() if own.get("mlflow.parentRunId") in parents
    }
    if len(parents) != 1 or not known >= set(map(cell_key, sweep.cells)):
        return None
    return run_page(str(experiment.experiment_id), parents.pop())


def _state(record: Record) -> str:
    return "done" if record.complete else "failed" if record.failures else "unfinished"


class MLflowTracker(Connection):
    """One parent run per sweep, one child run per cell, in a tracking server or in mlflow.db beside runs/.

    Writes to SQLite are serialised over processes by a lock of the store.
    """

    def __init__(self, sweep: Sweep, plan_text: str, rebuild: bool = False) -> None:
        """rebuild: send artifacts even where MLflow has those of the same results."""
        super().__init__(sweep)
        self.rebuild = rebuild
        self.states: dict[str, str] = {}
        self._views = tuple(
            view_key(kind, sweep.name, self.experiment) for kind in ("cells", "curves")
        )
        self._names = run_names(sweep.cells, sweep.method_titles)
        self._curves = method_curves(sweep.cells)
        self._children: dict[str, Any] = {}
        self._readings: dict[str, int] = {}
        self._parent_metrics: dict[tuple[str, int], float] = {}
        with self.writing(f"open {self.uri}"):
            note = f"{sweep.title}: {SHORT_GUIDE}\n\n{sweep.description}\n\n{OPEN_THIS}".strip()
            self.experiment_id = self.find_experiment(note)
            self.parent_id = ""
            self.parent_id = self._find_parent(plan_text)
            self._write_views()

    # -- the calls of a tracker -----------------------------------------------------------------------------------------------

    def cell(self, record: Record, state: str) -> None:
        """Note what is known of a cell now; new numbers, params and artifacts only. Raises TrackingError."""
        key = record.cell_key
        self.states[key] = state
        with self.writing(f"record {record.cell.title} in {self.uri}"):
            run = self._child(record)
            metrics = record.metrics()
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            new = {
                name: value
                for name, value in finite.items()
                if run.data.metrics.get(metric_name(name)) != value
            }
            params = {
                name: value
                for name, value in cell_params(record).items()
                if name not in run.data.params
            }
            tags = cell_tags(record, state, run.data.tags)
            tags["mlflow.note.content"] = cell_description(record, state)
            fingerprint = record_fingerprint(record)
            is_new = self.rebuild or run.data.tags.get(FINGERPRINT) != fingerprint
            if is_new and state in ("done", "failed", "unfinished"):
                with tempfile.TemporaryDirectory() as folder:
                    write_artifacts(Path(folder), record, self.store)
                    self.client.log_artifacts(run.info.run_id, folder)
                tags[FINGERPRINT] = fingerprint  # last: an interrupted upload is done again
                tags["mlflow.loggedArtifacts"] = json.dumps(item_tables(record, self.store))
            if state == "done" and not run.inputs.dataset_inputs:
                self.client.log_inputs(run.info.run_id, datasets=self._data_sets(record.cell))
            tags = {
                name: value
                for name, value in tags.items()
                if run.data.tags.get(name) != cut_text(value, TAG_LIMIT)
            }
            self._log(run.info.run_id, new, params, tags)
            self._log_layers(run, record)
            self._log_curve_points(run, record)
            self._set_status(run.info.run_id, run.info.status, STATUS[state])
            self._children[key] = self.client.get_run(run.info.run_id)
            self._log_curve(record)

    def finish(self, made: Mapping[str, TableData], files: Sequence[Path], summary: str) -> str:
        """Store tables and figures with the parent, describe it, end it; returns its page. Raises TrackingError."""
        with self.writing(f'close sweep "{self.sweep.name}" in {self.uri}'):
            for key, state in self.states.items():
                if STATUS[state] in ("SCHEDULED", "RUNNING"):
                    self._set_status(
                        self._children[key].info.run_id, STATUS[state], STATUS["unfinished"]
                    )
            self._write_views()
            inputs = {
                each.dataset.digest: each
                for cell in self.sweep.cells
                for each in self._data_sets(cell)
            }
            if inputs and not self.client.get_run(self.parent_id).inputs.dataset_inputs:
                self.client.log_inputs(self.parent_id, datasets=list(inputs.values()))
            links = {
                key: f"#/experiments/{self.experiment_id}/runs/{run.info.run_id}"
                for key, run in self._children.items()
            }
            absolute = (
                {key: f"{self.uri}/{link}" for key, link in links.items()}
                if self.uri.startswith("http")
                else {}
            )
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                for name, data in made.items():
                    for form, suffix in FORMATS.items():
                        text = render(data, form, absolute if form == "html" else None)
                        write_text(root / "tables" / f"{name}{suffix}", text)
                if rows := budget_rows(self.sweep, self.store):
                    write_text(root / "tables" / BUDGETS, render_budgets(rows))
                for path in files:
                    is_report = path.parent.name == REPORTS
                    target = root / ("report.html" if is_report else f"figures/{path.name}")
                    target.parent.mkdir(exist_ok=True)
                    content = path.read_bytes() if path.is_file() else self.store.files.read(path)
                    target.write_bytes(content)
                if summary:
                    write_text(root / "summary.txt", summary)
                self.client.log_artifacts(self.parent_id, folder)
            done = sum(state == "done" for state in self.states.values())
            failed = sum(state in ("failed", "refused") for state in self.states.values())
            progress = f"{done} of {len(self.sweep.cells)} cells done" + (
                f", {failed} failed" if failed else ""
            )
            first = next(iter(made.values()), None)
            shown = (
                [render(first, "md", addresses) for addresses in (links, None)]
                if first is not None
                else [""]
            )
            scores = [path.name for path in files if path.name.endswith("-against-bits.png")]
            picture = (
                f"![scores by bits]({artifact_file(self.parent_id, f'figures/{scores[0]}')})"
                if scores
                else ""
            )
            tags = {
                "harness.progress": progress,
                "mlflow.note.content": self._description(
                    progress, *(f"{picture}\n\n{table}" for table in shown)
                ),
            }
            self._log(self.parent_id, {}, {}, tags)
            status = (
                "FAILED" if failed else "FINISHED" if done == len(self.sweep.cells) else "KILLED"
            )
            self.client.set_terminated(self.parent_id, status)
        return run_page(self.experiment_id, self.parent_id)

    def progress(self, text: str) -> None:
        """How far the sweep is, on its parent run. Raises TrackingError."""
        with self.writing(f"record progress in {self.uri}"):
            self._log(
                self.parent_id,
                {},
                {},
                {"harness.progress": text, "mlflow.note.content": self._description(text, "")},
            )

    def usage(self, cell_key: str, facts: Mapping[str, float]) -> None:
        """Points of a cell's system metrics, as MLflow shows them over time. Raises TrackingError."""
        run = self._children.get(cell_key)
        if run is None:
            return
        now, step = int(time.time() * 1000), self._readings.get(cell_key, 0)
        self._readings[cell_key] = step + 1
        points = [
            self.mlflow.entities.Metric(f"system/worker_{name}", value, now, step)
            for name, value in facts.items()
        ]
        with self.writing(f"record system metrics in {self.uri}"):
            self.client.log_batch(run.info.run_id, metrics=points)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _find_parent(self, plan_text: str) -> str:
        """The run of the sweep, with the children that belong to it; made where there is none."""
        parents = self._parents(deleted=False)
        if parents:
            parent = parents[0]
            self._parent_metrics = self._curve_points(parent)
            if not self.rebuild:
                self.client.update_run(parent.info.run_id, "RUNNING")
        else:
            marks = {"harness.sweep": self.sweep.name, **origin_tags(self.sweep)}
            parent = self.client.create_run(
                self.experiment_id, run_name=self.sweep.title or self.sweep.name, tags=marks
            )
        self._collect_children(parent.info.run_id, parents[1:])
        tags = {
            "mlflow.note.content": self._description("running", ""),
            "harness.command": command_line(self.sweep),
        }
        run_id = str(parent.info.run_id)
        params = {
            name: value
            for name, value in sweep_params(self.sweep).items()
            if name not in parent.data.params
        }
        self._log(run_id, {}, params, tags)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            if plan_text:
                write_text(root / "plan.txt", without_password(plan_text))
            write_json(root / "sweep.json", sweep_json(self.sweep), durable=False)
            if self.sweep.path is not None and self.sweep.path.is_file():
                write_text(
                    root / self.sweep.path.name,
                    without_password(self.sweep.path.read_text(encoding="utf-8")),
                )
            self.client.log_artifacts(run_id, folder)
        return run_id

    def _parents(self, deleted: bool) -> list[Any]:
        """Runs of this sweep, the oldest first."""
        quote = '"' if "'" in self.sweep.name else "'"
        named = f"tags.`harness.sweep` = {quote}{self.sweep.name}{quote}"
        runs = self._search(named, deleted)
        return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]

    def _collect_children(self, parent_id: str, others: Sequence[Any]) -> None:
        """Gather one live run per cell under the parent.

        others: further live runs of this sweep. Their children, and those that a deleted run of this sweep left behind, move to the
        parent, unless it has a run of the same cell: then, as with two runs of one cell, the later one is deleted, which
        MLflow can undo until its own `gc`.
        """
        strays = [*others, *self._parents(deleted=True)]
        for place in (parent_id, *(run.info.run_id for run in strays)):
            for run in self._search(f"tags.mlflow.parentRunId = '{place}'"):
                key = run.data.tags.get("harness.key", "")
                if key in self._children:
                    self.client.delete_run(run.info.run_id)
                    continue
                if place != parent_id:
                    self.client.set_tag(run.info.run_id, "mlflow.parentRunId", parent_id)
                self._children[key] = run
        for run in others:
            self.client.delete_run(run.info.run_id)

    def _child(self, record: Record) -> Any:
        """The run of a cell: the one it had, or a new one."""
        key = record.cell_key
        if key not in self._children:
            found = self._search(
                f"tags.`harness.key` = '{key}' and tags.mlflow.parentRunId = '{self.parent_id}'"
            )
            tags = {
                "mlflow.parentRunId": self.parent_id,
                "mlflow.runType": "evaluation",  # MLflow's runs page unfolds the parents of such runs
                "harness.key": key,
                "harness.checkpoint": record.quantize_key,
                "harness.command": f"harness show {key[:12]}",
                **origin_tags(self.sweep),
            }
            self._children[key] = (
                found[0]
                if found
                else self.client.create_run(
                    self.experiment_id, run_name=self._names.get(key, record.cell.title), tags=tags
                )
            )
        return self._children[key]

    def _data_sets(self, cell: Cell) -> list[Any]:
        """What a cell was calibrated and scored on, as MLflow's data sets: name, digest, where it lies."""
        entities, made = self.mlflow.entities, []
        for context, name, identity, source in data_of_cell(cell):
            own = entities.Dataset(
                name[:DATASET_NAME_LIMIT],
                identity[:DATASET_DIGEST_LIMIT],
                "local",
                without_password(json.dumps(source)),
            )
            made.append(
                entities.DatasetInput(own, [entities.InputTag("mlflow.data.context", context)])
            )
        return made

    def _search(self, filter: str, deleted: bool = False) -> list[Any]:
        return self.search(self.experiment_id, filter, deleted)

    def _log_layers(self, run: Any, record: Record) -> None:
        """The layer errors of a cell as curves over its blocks, once."""
        now = int(time.time() * 1000)
        for name, curve in layer_curves(record).items():
            if metric_name(name) not in run.data.metrics:
                points = [
                    self.mlflow.entities.Metric(metric_name(name), value, now, block)
                    for block, value in curve.items()
                ]
                self.client.log_batch(run.info.run_id, metrics=points)

    def _log_curve_points(self, run: Any, record: Record) -> None:
        """A quantized cell's bits per weight and scores as the points of its method's curves.

        MLflow joins the two by their step, and a curve the cells of its method: so the step is the cell's own, a hundred times
        its bits per weight.
        """
        metrics = record.metrics()
        bits = metrics.get(BITS, math.nan)
        if record.cell.method.is_baseline or not math.isfinite(bits):
            return
        names = (BITS, *quality_metrics(self.sweep, [record]))
        points = {
            metric_name(curve_metric(name)): metrics[name]
            for name in names
            if math.isfinite(metrics.get(name, math.nan))
        }
        now, step = int(time.time() * 1000), round(100 * bits)
        batch = [
            self.mlflow.entities.Metric(name, value, now, step)
            for name, value in points.items()
            if run.data.metrics.get(name) != value
        ]
        if batch:
            self.client.log_batch(run.info.run_id, metrics=batch)

    def _log_curve(self, record: Record) -> None:
        """A cell's scores as points of the parent's curves."""
        metrics, points = record.metrics(), {}
        curve, step = self._curves.get(record.cell_key, ("", 0))
        for metric in quality_metrics(self.sweep, [record]) if curve else []:
            value = metrics.get(metric, math.nan)
            name = metric_name(f"{metric} {curve}")
            if math.isfinite(value) and self._parent_metrics.get((name, step)) != value:
                points[name, step] = value
        if points:
            now = int(time.time() * 1000)
            batch = [
                self.mlflow.entities.Metric(name, value, now, at)
                for (name, at), value in points.items()
            ]
            self.client.log_batch(self.parent_id, metrics=batch)
            self._parent_metrics |= points

    def _curve_points(self, parent: Any) -> dict[tuple[str, int], float]:
        """(metric, step) -> the value last written, so that repeating a sweep adds no second point."""
        points: dict[tuple[str, int], float] = {}
        for name in parent.data.metrics:
            for metric in sorted(
                self.client.get_metric_history(parent.info.run_id, name), key=lambda m: m.timestamp
            ):
                points[name, metric.step] = metric.value
        return points

    def _log(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        entities, now = self.mlflow.entities, int(time.time() * 1000)
        measured = [
            entities.Metric(metric_name(name), value, now, 0) for name, value in metrics.items()
        ]
        facts = [
            entities.Param(metric_key(name), cut_text(str(value), PARAM_LIMIT))
            for name, value in params.items()
        ]
        marks = [
            entities.RunTag(metric_key(name), cut_text(value, TAG_LIMIT))
            for name, value in tags.items()
        ]
        while measured or facts or marks:  # one batch for any ordinary cell
            self.client.log_batch(
                run_id, measured[:BATCH_METRICS], facts[:BATCH_PARAMS], marks[:BATCH_PARAMS]
            )
            measured, facts, marks = (
                measured[BATCH_METRICS:],
                facts[BATCH_PARAMS:],
                marks[BATCH_PARAMS:],
            )

    def _set_status(self, run_id: str, now: str, wanted: str) -> None:
        if now == wanted:
            return
        if wanted in ("SCHEDULED", "RUNNING"):
            self.client.update_run(run_id, wanted)
        else:
            self.client.set_terminated(run_id, wanted)

    def _description(self, progress: str, *forms: str) -> str:
        """forms: the table, the best form first; the first that fits is shown."""
        parts = [f"**{self.sweep.title or self.sweep.name}** — {progress}", self._shortcuts()]
        command = f"Run again, or complete: `{command_line(self.sweep)}`"
        for table in (*forms, "The table is too long for this page; it is in *Artifacts*."):
            pieces = (*parts, table, self.sweep.description, OPEN_THIS, command)
            text = "\n\n".join(part.strip() for part in pieces if part.strip())
            if len(text) <= TAG_LIMIT:
                return text
        return text

    def _shortcuts(self) -> str:
        """Links for the first lines of the parent's page; MLflow folds the rest of a description."""
        cells, curves = self._views
        places = {
            "cells, best first": view_page(self.experiment_id, cells),
            "all methods over bits per weight": view_page(self.experiment_id, curves, charts=True),
        }
        if self.parent_id:
            files = {"report": "report.html"}
            files |= {
                f"table {table.name.removeprefix('table')}": f"tables/{table.name}.html"
                for table in self.sweep.shown_tables[:8]
            }
            files["figures"] = "figures/index.html"
            places |= {
                name: artifact_page(self.experiment_id, self.parent_id, path)
                for name, path in files.items()
            }
        return "Open: " + " · ".join(f"[{name}]({place})" for name, place in places.items())

    def _groups(self) -> list[str]:
        """The params that tell the curves of methods apart."""
        cells = [cell for cell in self.sweep.cells if not cell.method.is_baseline]
        varied = {
            "model": {cell.model.name for cell in cells},
            "group": {group_text(cell) for cell in cells},
        }
        return ["method", *(name for name, values in varied.items() if len(values) > 1)]

    def _write_views(self) -> None:
        """The cells of the sweep with the columns and the order that it is about, and the curves of its methods."""
        records = [self.store.record(cell) for cell in self.sweep.cells]
        scores = [name for name in quality_metrics(self.sweep, records) if "/" in name]
        lower = bool(scores) and better_is_higher(scores[0], self.sweep.cells) is False
        texts = (
            cells_view(self.parent_id, list(map(metric_name, scores)), lower),
            curves_view(self.parent_id, list(map(metric_name, scores)), self._groups()),
        )
        for key, text in zip(self._views, texts, strict=True):
            if len(text) <= EXPERIMENT_TAG_LIMIT:
                self.client.set_experiment_tag(self.experiment_id, view_tag(key), text)
