"""Records into MLflow while a sweep runs, and again at any time from the store. The only importer of MLflow, loaded on use.

One experiment per study; in it one parent run per sweep (tag `harness.sweep`) with one child run per cell (tag `harness.key`). A
run is looked up by its tag before one is made, so that a sweep that was killed, repeated or published again completes its runs
and never doubles them.

    child    params: the cell, flat. Metrics: every number under its full name. Artifacts: cell, layer errors as table and figure,
             each evaluation with its items, log, environment, failures.
    parent   one curve per method and score, "wikitext2/perplexity gptq", with the bit width as step; the plan, tables, figures; a
             description that says what to open.

The charts page of MLflow 3.17 draws only the runs that are unfolded, under one heading per part of a metric's name before its last
slash. So the curves share the headings of the cells' metrics, and none stands empty. The runs page unfolds the parents of runs of
type "evaluation" when it is first seen, and takes its columns from a view that is kept as a tag of the experiment.

MLflow would store an infinity as 1.8e308 and cut long values without a word: here what is not finite becomes the tag `diverged`,
and what is cut says so. Nothing in this module may cost a result: the store has everything, and `publish` builds the runs again
from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import sweep as sweep_module
from harness.core import text as text_module
from harness.core.cell import Cell, digest
from harness.core.errors import TrackingError
from harness.core.sweep import Runtime, Sweep, Tracking
from harness.evaluation.flips import with_flips
from harness.reporting import figures as plots
from harness.reporting import metrics as metrics_module
from harness.reporting import render, tables
from harness.storage.json_files import write_json
from harness.storage.places import is_url
from harness.storage.record import Record
from harness.storage.store import Store
from harness.tracking.run_contents import (
    PARAM_LIMIT,
    TAG_LIMIT,
    cell_description,
    cell_params,
    cut_text,
    data_of_cell,
    flat_facts,
    item_tables,
    method_curves,
    metric_key,
    metric_name,
    origin_tags,
    record_fingerprint,
    run_names,
    sweep_json,
    sweep_params,
    user_name,
    write_artifacts,
    write_text,
)
from harness.tracking.tracker import STATUS, NullTracker, Tracker
from harness.tracking.ui import ENVIRONMENT, MODEL_TRAINING, artifact_folder, tracking_uri

if TYPE_CHECKING:
    from harness.reporting.table_data import TableData


EXPERIMENT_TAG_LIMIT, DATASET_NAME_LIMIT, DATASET_DIGEST_LIMIT = 5000, 500, 36
VIEW = "cells"  # a view of the runs page that MLflow reads from an experiment's tag
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
VIEW_PARAMS, VIEW_METRICS = ("method", "bits", "group"), 8
BATCH_PARAMS, BATCH_METRICS = 100, 1000  # entries of one log_batch
DIAGNOSES = "which linears of a model low-bit weights and activations ruin, and why; open a run for its text, curves and figures"
SHORT_GUIDE = "open the run for its tables, its + for one run per cell, the chart icon for curves"
OPEN_THIS = """\
**What to open**

- *Model metrics* of this run, or the chart icon above the runs table: one curve per method, the bit width as step.
- *Artifacts* of this run: `tables/` (HTML, Markdown, LaTeX, CSV), `figures/`, `plan.txt`.
- The **+** before this run's name in the runs table: its cells, one run each, with parameters, every metric, layer errors,
  per-item results and log. *Columns* above the table shows their metrics side by side.
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
        drawn = plots.figures(sweep, records).items()
        figures = [
            path for name, figure in drawn for path in plots.save(figure, Path(folder), name)
        ]
        tracker.finish(tables.build_all(sweep, records, store), figures, "")
    left = f"; {len(records) - len(known)} have no results yet" if len(known) < len(records) else ""
    place = text_module.without_password(tracker.uri)
    return f'published {len(known)} cells as experiment "{tracker.experiment}" in {place}{left}'


def keep_diagnosis(
    runtime: Runtime,
    name: str,
    record: Mapping[str, Any],
    curves: Mapping[str, Mapping[int, float]],
    text: str,
    folder: Path,
) -> str:
    """One MLflow run for a diagnosis in the experiment "diagnoses", with the files of its folder; returns where it is, one line.

    name    what a person calls it
    record  JSON values: its entry "asked" (what was diagnosed, and how) identifies the run, which is found again, completed where
            the record changed, and never doubled
    curves  metric -> block -> value, which MLflow draws over the blocks
    text    Markdown for the run's page
    Raises TrackingError.
    """
    key, shown = digest(record["asked"]), digest(record)
    experiment = runtime.tracking.experiment or "diagnoses"
    sweep = Sweep(
        experiment,
        "Diagnoses",
        DIAGNOSES,
        (),
        (),
        (),
        dataclasses.replace(
            runtime, tracking=dataclasses.replace(runtime.tracking, experiment=experiment)
        ),
    )
    tracker = _Connection(sweep)
    with tracker.writing(f"record the diagnosis of {name} in {tracker.uri}"):
        client, experiment_id = tracker.client, tracker.find_experiment(f"Diagnoses: {DIAGNOSES}")
        found = client.search_runs([experiment_id], f"tags.`harness.diagnosis` = '{key}'")
        run = (
            found[0]
            if found
            else client.create_run(
                experiment_id,
                run_name=name,
                tags={
                    "harness.diagnosis": key,
                    "mlflow.user": user_name(),
                    "mlflow.source.type": "JOB",
                },
            )
        )
        if run.data.tags.get("harness.record") != shown:
            entities, now = tracker.mlflow.entities, int(1000 * time.time())
            points = [
                entities.Metric(metric_name(metric), value, now, step)
                for metric, values in curves.items()
                for step, value in values.items()
                if math.isfinite(value)
            ]
            params = [
                entities.Param(metric_key(entry), cut_text(str(value), PARAM_LIMIT))
                for entry, value in flat_facts(record["asked"]).items()
                if entry not in run.data.params
            ]
            for begin in range(0, max(len(points), 1), BATCH_METRICS // 2):
                client.log_batch(
                    run.info.run_id,
                    points[begin : begin + BATCH_METRICS // 2],
                    params if begin == 0 else [],
                    [],
                )
            client.log_artifacts(run.info.run_id, str(folder))
            client.set_tag(run.info.run_id, "mlflow.note.content", cut_text(text, TAG_LIMIT))
            client.set_tag(
                run.info.run_id, "harness.record", shown
            )  # last: what was interrupted is done again
            client.set_terminated(run.info.run_id, "FINISHED")
    return f'experiment "{experiment}" in {text_module.without_password(tracker.uri)}'


def _state(record: Record) -> str:
    return "done" if record.complete else "failed" if record.failures else "unfinished"


class _Connection:
    """A tracking server, or mlflow.db beside runs/, for one experiment."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.store = Store(sweep.runtime.runs)
        self.uri = tracking_uri(sweep.runtime.tracking, sweep.runtime.runs)
        self.experiment = sweep.runtime.tracking.experiment or sweep.name or "sweeps"
        with self.writing(f"open {self.uri}"):
            if self.uri.startswith("http"):
                _check_server(self.uri)
            self.mlflow = _import_mlflow()
            if self.uri.startswith("sqlite:///"):
                _make_database(self.mlflow, Path(self.uri.removeprefix("sqlite:///")))
            self.client = self.mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def find_experiment(self, note: str) -> str:
        """Its number; made, with this description, where it does not exist yet."""
        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                raise TrackingError(
                    f'experiment "{self.experiment}" was deleted in {self.uri}; restore it there (mlflow experiments restore '
                    f"-x {found.experiment_id}) or name another with tracking.experiment=NAME"
                )
            return str(found.experiment_id)
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.note.content": cut_text(note, TAG_LIMIT),
        }
        place = (
            None
            if self.uri.startswith("http")
            else artifact_folder(self.sweep.runtime.runs).as_uri()
        )
        return str(
            self.client.create_experiment(self.experiment, artifact_location=place, tags=tags)
        )

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Errors translated; writers of SQLite one after the other."""
        lock = (
            contextlib.nullcontext()
            if self.uri.startswith("http")
            else Store(self.store.root).lock("tracking")
        )
        with _translated(what), lock:
            yield


class MLflowTracker(_Connection):
    """One parent run per sweep, one child run per cell, in a tracking server or in mlflow.db beside runs/.

    Writes to SQLite are serialised over processes by a lock of the store.
    """

    def __init__(self, sweep: Sweep, plan_text: str, rebuild: bool = False) -> None:
        """rebuild: send artifacts even where MLflow has those of the same results."""
        super().__init__(sweep)
        self.rebuild = rebuild
        self.states: dict[str, str] = {}
        self._names = run_names(sweep.cells)
        self._curves = method_curves(sweep.cells)
        self._children: dict[str, Any] = {}
        self._readings: dict[str, int] = {}
        self._parent_metrics: dict[tuple[str, int], float] = {}
        with self.writing(f"open {self.uri}"):
            note = f"{sweep.title}: {SHORT_GUIDE}\n\n{sweep.description}\n\n{OPEN_THIS}".strip()
            self.experiment_id = self.find_experiment(note)
            self._page, self.parent_id = f"#/experiments/{self.experiment_id}", ""
            self.parent_id = self._find_parent(plan_text)

    # -- the three calls -----------------------------------------------------------------------------------------------

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
            tags = {
                "harness.state": state,
                "harness.evaluations": ", ".join(sorted(record.scores)) or "none yet",
            }
            tags["mlflow.note.content"] = cell_description(record, state)
            diverged = [
                f"{name} = {value}"
                for name, value in sorted(metrics.items())
                if not math.isfinite(value)
            ]
            if diverged or "diverged" in run.data.tags:
                tags["diverged"] = ", ".join(diverged) or "no"
            if record.failures and state == "failed":
                tags["failure"] = str(record.failures[-1].get("reason", ""))
            if record.smoke:
                tags["smoke"] = "stands on a part of the data only"
            for name, value in flat_facts(record.provenance).items():
                if isinstance(value, str | int | float | bool):
                    tags[f"environment.{name}"] = str(value)
            fingerprint = record_fingerprint(record)
            is_new = self.rebuild or run.data.tags.get("harness.artifacts") != fingerprint
            if is_new and state in ("done", "failed", "unfinished"):
                with tempfile.TemporaryDirectory() as folder:
                    write_artifacts(Path(folder), record, self.store)
                    self.client.log_artifacts(run.info.run_id, folder)
                tags["harness.artifacts"] = fingerprint  # last: an interrupted upload is done again
                tags["mlflow.loggedArtifacts"] = json.dumps(item_tables(record, self.store))
            if state == "done" and not run.inputs.dataset_inputs:
                self.client.log_inputs(run.info.run_id, datasets=self._data_sets(record.cell))
            tags = {
                name: value
                for name, value in tags.items()
                if run.data.tags.get(name) != cut_text(value, TAG_LIMIT)
            }
            self._log(run.info.run_id, new, params, tags)
            self._set_status(run.info.run_id, run.info.status, STATUS[state])
            self._children[key] = self.client.get_run(run.info.run_id)
            self._log_curve(record)

    def finish(self, made: Mapping[str, TableData], figures: Sequence[Path], summary: str) -> None:
        """Keep tables and figures with the parent, describe it, end it. Raises TrackingError."""
        with self.writing(f'close sweep "{self.sweep.name}" in {self.uri}'):
            for key, state in self.states.items():
                if STATUS[state] in ("SCHEDULED", "RUNNING"):
                    self._set_status(
                        self._children[key].info.run_id, STATUS[state], STATUS["unfinished"]
                    )
            self._keep_view()
            inputs = {
                each.dataset.digest: each
                for cell in self.sweep.cells
                for each in self._data_sets(cell)
            }
            if inputs and not self.client.get_run(self.parent_id).inputs.dataset_inputs:
                self.client.log_inputs(self.parent_id, datasets=list(inputs.values()))
            links = {
                key: f"{self._page}/runs/{run.info.run_id}" for key, run in self._children.items()
            }
            absolute = (
                {key: f"{self.uri}/{link}" for key, link in links.items()}
                if self.uri.startswith("http")
                else {}
            )
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                for name, data in made.items():
                    for form, suffix in render.FORMATS.items():
                        text = render.render(data, form, absolute if form == "html" else None)
                        write_text(root / "tables" / f"{name}{suffix}", text)
                for path in figures:
                    (root / "figures").mkdir(exist_ok=True)
                    content = path.read_bytes() if path.is_file() else self.store.files.read(path)
                    (root / "figures" / path.name).write_bytes(content)
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
                [render.render(first, "md", addresses) for addresses in (links, None)]
                if first is not None
                else [""]
            )
            tags = {
                "harness.progress": progress,
                "mlflow.note.content": self._description(progress, *shown),
            }
            self._log(self.parent_id, {}, {}, tags)
            status = (
                "FAILED" if failed else "FINISHED" if done == len(self.sweep.cells) else "KILLED"
            )
            self.client.set_terminated(self.parent_id, status)

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
        quote = '"' if "'" in self.sweep.name else "'"
        named = f"tags.`harness.sweep` = {quote}{self.sweep.name}{quote}"
        runs = self.client.search_runs(
            [self.experiment_id], named, order_by=["attributes.start_time ASC"]
        )
        parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        tags = {
            "mlflow.note.content": self._description("running", ""),
            "harness.command": sweep_module.command_line(self.sweep),
        }
        if parents:
            parent = parents[0]
            self._parent_metrics = self._curve_points(parent)
            for run in self._search(f"tags.mlflow.parentRunId = '{parent.info.run_id}'"):
                self._children[run.data.tags.get("harness.key", "")] = run
            if not self.rebuild:
                self.client.update_run(parent.info.run_id, "RUNNING")
        else:
            marks = {"harness.sweep": self.sweep.name, **origin_tags(self.sweep)}
            parent = self.client.create_run(
                self.experiment_id, run_name=self.sweep.title or self.sweep.name, tags=marks
            )
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
                write_text(root / "plan.txt", text_module.without_password(plan_text))
            write_json(root / "sweep.json", sweep_json(self.sweep), durable=False)
            if self.sweep.path is not None and self.sweep.path.is_file():
                write_text(
                    root / self.sweep.path.name,
                    text_module.without_password(self.sweep.path.read_text(encoding="utf-8")),
                )
            self.client.log_artifacts(run_id, folder)
        return run_id

    def _child(self, record: Record) -> Any:
        """The run of a cell: the one it had, or a new one."""
        key = record.cell_key
        if key not in self._children:
            found = self._search(
                f"tags.`harness.key` = '{key}' and tags.mlflow.parentRunId = '{self.parent_id}'"
            )
            if found:
                self._children[key] = found[0]
            else:
                name = self._names.get(key, record.cell.title)
                tags = {
                    "mlflow.parentRunId": self.parent_id,
                    "harness.key": key,
                    "harness.checkpoint": record.quantize_key,
                }
                tags["mlflow.runType"] = (
                    "evaluation"  # MLflow's runs page unfolds the parents of such runs at first
                )
                tags |= {**origin_tags(self.sweep), "harness.command": f"harness show {key[:12]}"}
                self._children[key] = self.client.create_run(
                    self.experiment_id, run_name=name, tags=tags
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
                text_module.without_password(json.dumps(source)),
            )
            made.append(
                entities.DatasetInput(own, [entities.InputTag("mlflow.data.context", context)])
            )
        return made

    def _search(self, filter: str) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], filter, max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found

    def _log_curve(self, record: Record) -> None:
        """A cell's scores as points of the parent's curves."""
        metrics, points = record.metrics(), {}
        curve, step = self._curves.get(record.cell_key, ("", 0))
        drawn = (
            *metrics_module.quality_metrics(self.sweep, [record]),
            "checkpoint/bits_per_weight",
            "quantize/seconds",
        )
        for metric in drawn if curve else []:
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
                run_id, measured[: BATCH_METRICS // 2], facts[:BATCH_PARAMS], marks[:BATCH_PARAMS]
            )
            measured, facts, marks = (
                measured[BATCH_METRICS // 2 :],
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
        command = f"Run again, or complete: `{sweep_module.command_line(self.sweep)}`"
        for table in (*forms, "The table is too long for this page; it is in *Artifacts*."):
            pieces = (*parts, table, self.sweep.description, OPEN_THIS, command)
            text = "\n\n".join(part.strip() for part in pieces if part.strip())
            if len(text) <= TAG_LIMIT:
                return text
        return text

    def _shortcuts(self) -> str:
        """Links for the first lines of the parent's page; MLflow folds the rest of a description."""
        words = [
            f"[cells side by side]({self._page}/runs?viewStateShareKey={VIEW}&{MODEL_TRAINING})"
        ]
        if self.parent_id:
            places = {
                f"table {table.name}": f"tables/{table.name}.html"
                for table in self.sweep.shown_tables[:8]
            }
            places["figures"] = "figures"
            words += [
                f"[{name}]({self._page}/runs/{self.parent_id}/artifacts/{place})"
                for name, place in places.items()
            ]
        return "Open: " + " · ".join(words)

    def _keep_view(self) -> None:
        """A view of the runs page with the columns that this sweep is about; its runs page unfolds by the tag of the cells."""
        cells = self.sweep.cells
        metrics = [
            metric
            for metric in metrics_module.quality_metrics(self.sweep, map(self.store.record, cells))
            if "/" in metric
        ]
        columns = [f"params.`{name}`" for name in VIEW_PARAMS]
        columns += [
            f"metrics.`{metric_name(name)}`"
            for name in ("checkpoint/bits_per_weight", *metrics[:VIEW_METRICS])
        ]
        text = json.dumps({"selectedColumns": columns})
        if len(text) <= EXPERIMENT_TAG_LIMIT:
            self.client.set_experiment_tag(self.experiment_id, VIEW_TAG, text)


def _check_server(uri: str) -> None:
    """MLflow retries for minutes; this asks once."""
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=10):
            pass
    except urllib.error.HTTPError as error:
        way_out = (
            "; start the server with --allowed-hosts naming this host" if error.code == 403 else ""
        )
        raise TrackingError(
            f"the tracking server at {uri} answers {error.code} {error.reason}{way_out}"
        ) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"no tracking server at {uri} ({reason}); start it, or run with tracking=sqlite"
        ) from error


def _import_mlflow() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault(
        "MLFLOW_HTTP_REQUEST_TIMEOUT", "20"
    )  # seconds; a slow server must not hold a sweep for minutes
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow
    import mlflow.entities

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow


def _make_database(mlflow: Any, database: Path) -> None:
    """MLflow's tables in a new file, whole or not at all.

    MLflow makes them step by step, and a database whose maker was killed between two steps never opens again.
    """
    if database.exists():
        return
    for left in database.parent.glob(
        f".{database.name}-*"
    ):  # of one that was killed; the caller holds the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{database.name}-", dir=database.parent) as folder:
        aside = Path(folder) / database.name
        uri = f"sqlite:///{aside}"
        mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
        os.replace(aside, database)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """What MLflow, its database or the network raise, as TrackingError."""
    try:
        yield
    except TrackingError as error:
        raise TrackingError(text_module.without_password(str(error))) from error.__cause__
    except Exception as error:
        foreign = (type(error).__module__ or "").split(".")[0]
        if isinstance(error, OSError) or foreign in (
            "mlflow",
            "sqlalchemy",
            "requests",
            "urllib3",
            "alembic",
            "sqlite3",
        ):
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise TrackingError(
                text_module.without_password(f"could not {what}: {first}")
            ) from error
        raise
