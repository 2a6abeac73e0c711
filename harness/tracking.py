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
import csv
import dataclasses
import getpass
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness import naming, plots, tables
from harness.cell import Cell, cell_key, digest, score_key, to_json
from harness.errors import TrackingError
from harness.flips import with_flips
from harness.store import Record, Store, is_url, write_json
from harness.sweep import Runtime, Sweep, Tracking

if TYPE_CHECKING:
    from harness.tables import TableData

PARAM_LIMIT, TAG_LIMIT, KEY_LIMIT = 6000, 8000, 250             # characters; MLflow cuts beyond them silently
EXPERIMENT_TAG_LIMIT, DATASET_NAME_LIMIT, DATASET_DIGEST_LIMIT = 5000, 500, 36
VIEW = "cells"                                                  # a view of the runs page that MLflow reads from an experiment's tag
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
VIEW_PARAMS, VIEW_METRICS = ("method", "bits", "group"), 8
BATCH_PARAMS, BATCH_METRICS = 100, 1000                         # entries of one log_batch
ITEM_ROWS_SHOWN = 1000                                          # of per-item results; the Parquet file has all
STATUS = {                                                      # state of a cell -> status of its run
    "waiting": "SCHEDULED",
    "quantizing": "RUNNING",
    "evaluating": "RUNNING",
    "done": "FINISHED",
    "failed": "FAILED",
    "refused": "FAILED",
    "unfinished": "KILLED",
}
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",                         # with it on, one of 200 runs failed
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",           # two lines per cell into our display otherwise
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",              # saves eight processes and 1.8 GB
}
MODEL_TRAINING = "workflowType=machine_learning"                # MLflow's pages start in the mode for traces of agents otherwise
DIAGNOSES = "which linears of a model low-bit weights and activations ruin, and why; open a run for its text, curves and figures"
SHORT_GUIDE = "open the run for its tables, its + for one run per cell, the chart icon for curves"
OPEN_THIS = """\
**What to open**

- *Model metrics* of this run, or the chart icon above the runs table: one curve per method, the bit width as step.
- *Artifacts* of this run: `tables/` (HTML, Markdown, LaTeX, CSV), `figures/`, `plan.txt`.
- The **+** before this run's name in the runs table: its cells, one run each, with parameters, every metric, layer errors,
  per-item results and log. *Columns* above the table shows their metrics side by side.
"""


class Tracker(Protocol):
    """Where a sweep's records go while it runs."""

    def cell(self, record: Record, state: str) -> None:
        """Note what is known of a cell now. state: a key of STATUS."""

    def progress(self, text: str) -> None:
        """How far the sweep is, in words."""

    def usage(self, cell_key: str, facts: Mapping[str, float]) -> None:
        """What the process that works on a cell takes now."""

    def finish(self, made: Mapping[str, TableData], figures: Sequence[Path], summary: str) -> None:
        """Close the sweep. made: its tables by name; figures: their files; summary: the last lines that the run printed."""


class NullTracker:
    """Tracking is off."""

    def progress(self, text: str) -> None:
        pass

    def usage(self, cell_key: str, facts: Mapping[str, float]) -> None:
        pass

    def cell(self, record: Record, state: str) -> None:
        pass

    def finish(self, made: Mapping[str, TableData], figures: Sequence[Path], summary: str) -> None:
        pass


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
        sweep = Sweep("store", f"Everything in {name}", "All cells of the store.", cells, (), (), runtime)
    elif tracking is not None:
        sweep = dataclasses.replace(sweep, runtime=dataclasses.replace(sweep.runtime, tracking=tracking))
    if sweep.runtime.tracking.kind == "none":
        raise TrackingError("tracking=none keeps no runs; publish with tracking=sqlite or tracking=server tracking.uri=http://…")
    store = store.snapshot(sweep.cells)
    records = [with_flips(store.record(cell), store) for cell in sweep.cells]
    known = [record for record in records if record.manifest or record.scores or record.failures]
    tracker = MLflowTracker(sweep, "", rebuild=True)
    for record in known:
        tracker.cell(record, _state(record))
    with tempfile.TemporaryDirectory() as folder:
        drawn = plots.figures(sweep, records).items()
        figures = [path for name, figure in drawn for path in plots.save(figure, Path(folder), name)]
        tracker.finish(tables.build_all(sweep, records, store), figures, "")
    left = f"; {len(records) - len(known)} have no results yet" if len(known) < len(records) else ""
    place = tables.without_password(tracker.uri)
    return f'published {len(known)} cells as experiment "{tracker.experiment}" in {place}{left}'


def keep_diagnosis(
    runtime: Runtime, name: str, record: Mapping[str, Any], curves: Mapping[str, Mapping[int, float]], text: str, folder: Path
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
    sweep = Sweep(experiment, "Diagnoses", DIAGNOSES, (), (), (), dataclasses.replace(
        runtime, tracking=dataclasses.replace(runtime.tracking, experiment=experiment)
    ))
    tracker = _Connection(sweep)
    with tracker.writing(f"record the diagnosis of {name} in {tracker.uri}"):
        client, experiment_id = tracker.client, tracker.find_experiment(f"Diagnoses: {DIAGNOSES}")
        found = client.search_runs([experiment_id], f"tags.`harness.diagnosis` = '{key}'")
        run = found[0] if found else client.create_run(
            experiment_id, run_name=name, tags={"harness.diagnosis": key, "mlflow.user": _user(), "mlflow.source.type": "JOB"}
        )
        if run.data.tags.get("harness.record") != shown:
            entities, now = tracker.mlflow.entities, int(1000 * time.time())
            points = [
                entities.Metric(_metric_name(metric), value, now, step)
                for metric, values in curves.items() for step, value in values.items() if math.isfinite(value)
            ]
            params = [
                entities.Param(_key(entry), _cut(str(value), PARAM_LIMIT)) for entry, value in _flat(record["asked"]).items()
                if entry not in run.data.params
            ]
            for begin in range(0, max(len(points), 1), BATCH_METRICS // 2):
                client.log_batch(run.info.run_id, points[begin : begin + BATCH_METRICS // 2], params if begin == 0 else [], [])
            client.log_artifacts(run.info.run_id, str(folder))
            client.set_tag(run.info.run_id, "mlflow.note.content", _cut(text, TAG_LIMIT))
            client.set_tag(run.info.run_id, "harness.record", shown)            # last: what was interrupted is done again
            client.set_terminated(run.info.run_id, "FINISHED")
    return f'experiment "{experiment}" in {tables.without_password(tracker.uri)}'


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
        tags = {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": _cut(note, TAG_LIMIT)}
        place = None if self.uri.startswith("http") else _artifact_folder(self.sweep.runtime.runs).as_uri()
        return str(self.client.create_experiment(self.experiment, artifact_location=place, tags=tags))

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Errors translated; writers of SQLite one after the other."""
        lock = contextlib.nullcontext() if self.uri.startswith("http") else Store(self.store.root).lock("tracking")
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
        self._names = _run_names(sweep.cells)
        self._curves = _curves(sweep.cells)
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
            new = {name: value for name, value in finite.items() if run.data.metrics.get(_metric_name(name)) != value}
            params = {name: value for name, value in _params(record).items() if name not in run.data.params}
            tags = {"harness.state": state, "harness.evaluations": ", ".join(sorted(record.scores)) or "none yet"}
            tags["mlflow.note.content"] = _cell_description(record, state)
            diverged = [f"{name} = {value}" for name, value in sorted(metrics.items()) if not math.isfinite(value)]
            if diverged or "diverged" in run.data.tags:
                tags["diverged"] = ", ".join(diverged) or "no"
            if record.failures and state == "failed":
                tags["failure"] = str(record.failures[-1].get("reason", ""))
            if record.smoke:
                tags["smoke"] = "stands on a part of the data only"
            for name, value in _flat(record.provenance).items():
                if isinstance(value, str | int | float | bool):
                    tags[f"environment.{name}"] = str(value)
            fingerprint = _fingerprint(record)
            is_new = self.rebuild or run.data.tags.get("harness.artifacts") != fingerprint
            if is_new and state in ("done", "failed", "unfinished"):
                with tempfile.TemporaryDirectory() as folder:
                    _write_artifacts(Path(folder), record, self.store)
                    self.client.log_artifacts(run.info.run_id, folder)
                tags["harness.artifacts"] = fingerprint             # last: an interrupted upload is done again
                tags["mlflow.loggedArtifacts"] = json.dumps(_item_tables(record, self.store))
            if state == "done" and not run.inputs.dataset_inputs:
                self.client.log_inputs(run.info.run_id, datasets=self._data_sets(record.cell))
            tags = {name: value for name, value in tags.items() if run.data.tags.get(name) != _cut(value, TAG_LIMIT)}
            self._log(run.info.run_id, new, params, tags)
            self._set_status(run.info.run_id, run.info.status, STATUS[state])
            self._children[key] = self.client.get_run(run.info.run_id)
            self._log_curve(record)

    def finish(self, made: Mapping[str, TableData], figures: Sequence[Path], summary: str) -> None:
        """Keep tables and figures with the parent, describe it, end it. Raises TrackingError."""
        with self.writing(f'close sweep "{self.sweep.name}" in {self.uri}'):
            for key, state in self.states.items():
                if STATUS[state] in ("SCHEDULED", "RUNNING"):
                    self._set_status(self._children[key].info.run_id, STATUS[state], STATUS["unfinished"])
            self._keep_view()
            inputs = {each.dataset.digest: each for cell in self.sweep.cells for each in self._data_sets(cell)}
            if inputs and not self.client.get_run(self.parent_id).inputs.dataset_inputs:
                self.client.log_inputs(self.parent_id, datasets=list(inputs.values()))
            links = {key: f"{self._page}/runs/{run.info.run_id}" for key, run in self._children.items()}
            absolute = {key: f"{self.uri}/{link}" for key, link in links.items()} if self.uri.startswith("http") else {}
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                for name, data in made.items():
                    for form, suffix in tables.FORMATS.items():
                        text = tables.render(data, form, absolute if form == "html" else None)
                        _write(root / "tables" / f"{name}{suffix}", text)
                for path in figures:
                    (root / "figures").mkdir(exist_ok=True)
                    content = path.read_bytes() if path.is_file() else self.store.files.read(path)
                    (root / "figures" / path.name).write_bytes(content)
                if summary:
                    _write(root / "summary.txt", summary)
                self.client.log_artifacts(self.parent_id, folder)
            done = sum(state == "done" for state in self.states.values())
            failed = sum(state in ("failed", "refused") for state in self.states.values())
            progress = f"{done} of {len(self.sweep.cells)} cells done" + (f", {failed} failed" if failed else "")
            first = next(iter(made.values()), None)
            shown = [tables.render(first, "md", addresses) for addresses in (links, None)] if first is not None else [""]
            tags = {"harness.progress": progress, "mlflow.note.content": self._description(progress, *shown)}
            self._log(self.parent_id, {}, {}, tags)
            status = "FAILED" if failed else "FINISHED" if done == len(self.sweep.cells) else "KILLED"
            self.client.set_terminated(self.parent_id, status)

    def progress(self, text: str) -> None:
        """How far the sweep is, on its parent run. Raises TrackingError."""
        with self.writing(f"record progress in {self.uri}"):
            self._log(self.parent_id, {}, {}, {"harness.progress": text, "mlflow.note.content": self._description(text, "")})

    def usage(self, cell_key: str, facts: Mapping[str, float]) -> None:
        """Points of a cell's system metrics, as MLflow shows them over time. Raises TrackingError."""
        run = self._children.get(cell_key)
        if run is None:
            return
        now, step = int(time.time() * 1000), self._readings.get(cell_key, 0)
        self._readings[cell_key] = step + 1
        points = [self.mlflow.entities.Metric(f"system/worker_{name}", value, now, step) for name, value in facts.items()]
        with self.writing(f"record system metrics in {self.uri}"):
            self.client.log_batch(run.info.run_id, metrics=points)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _find_parent(self, plan_text: str) -> str:
        quote = '"' if "'" in self.sweep.name else "'"
        named = f"tags.`harness.sweep` = {quote}{self.sweep.name}{quote}"
        runs = self.client.search_runs([self.experiment_id], named, order_by=["attributes.start_time ASC"])
        parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        tags = {"mlflow.note.content": self._description("running", ""), "harness.command": tables.command_line(self.sweep)}
        if parents:
            parent = parents[0]
            self._parent_metrics = self._curve_points(parent)
            for run in self._search(f"tags.mlflow.parentRunId = '{parent.info.run_id}'"):
                self._children[run.data.tags.get("harness.key", "")] = run
            if not self.rebuild:
                self.client.update_run(parent.info.run_id, "RUNNING")
        else:
            marks = {"harness.sweep": self.sweep.name, **_origin(self.sweep)}
            parent = self.client.create_run(self.experiment_id, run_name=self.sweep.title or self.sweep.name, tags=marks)
        run_id = str(parent.info.run_id)
        params = {name: value for name, value in _sweep_params(self.sweep).items() if name not in parent.data.params}
        self._log(run_id, {}, params, tags)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            if plan_text:
                _write(root / "plan.txt", tables.without_password(plan_text))
            write_json(root / "sweep.json", _sweep_json(self.sweep), durable=False)
            if self.sweep.path is not None and self.sweep.path.is_file():
                _write(root / self.sweep.path.name, tables.without_password(self.sweep.path.read_text(encoding="utf-8")))
            self.client.log_artifacts(run_id, folder)
        return run_id

    def _child(self, record: Record) -> Any:
        """The run of a cell: the one it had, or a new one."""
        key = record.cell_key
        if key not in self._children:
            found = self._search(f"tags.`harness.key` = '{key}' and tags.mlflow.parentRunId = '{self.parent_id}'")
            if found:
                self._children[key] = found[0]
            else:
                name = self._names.get(key, record.cell.title)
                tags = {"mlflow.parentRunId": self.parent_id, "harness.key": key, "harness.checkpoint": record.quantize_key}
                tags["mlflow.runType"] = "evaluation"               # MLflow's runs page unfolds the parents of such runs at first
                tags |= {**_origin(self.sweep), "harness.command": f"harness show {key[:12]}"}
                self._children[key] = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        return self._children[key]

    def _data_sets(self, cell: Cell) -> list[Any]:
        """What a cell was calibrated and scored on, as MLflow's data sets: name, digest, where it lies."""
        entities, made = self.mlflow.entities, []
        for context, name, identity, source in _data_of(cell):
            own = entities.Dataset(
                name[:DATASET_NAME_LIMIT], identity[:DATASET_DIGEST_LIMIT], "local", tables.without_password(json.dumps(source)),
            )
            made.append(entities.DatasetInput(own, [entities.InputTag("mlflow.data.context", context)]))
        return made

    def _search(self, filter: str) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], filter, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _log_curve(self, record: Record) -> None:
        """A cell's scores as points of the parent's curves."""
        metrics, points = record.metrics(), {}
        curve, step = self._curves.get(record.cell_key, ("", 0))
        drawn = (*tables.quality_metrics(self.sweep, [record]), "checkpoint/bits_per_weight", "quantize/seconds")
        for metric in drawn if curve else []:
            value = metrics.get(metric, math.nan)
            name = _metric_name(f"{metric} {curve}")
            if math.isfinite(value) and self._parent_metrics.get((name, step)) != value:
                points[name, step] = value
        if points:
            now = int(time.time() * 1000)
            batch = [self.mlflow.entities.Metric(name, value, now, at) for (name, at), value in points.items()]
            self.client.log_batch(self.parent_id, metrics=batch)
            self._parent_metrics |= points

    def _curve_points(self, parent: Any) -> dict[tuple[str, int], float]:
        """(metric, step) -> the value last written, so that repeating a sweep adds no second point."""
        points: dict[tuple[str, int], float] = {}
        for name in parent.data.metrics:
            for metric in sorted(self.client.get_metric_history(parent.info.run_id, name), key=lambda m: m.timestamp):
                points[name, metric.step] = metric.value
        return points

    def _log(self, run_id: str, metrics: Mapping[str, float], params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        entities, now = self.mlflow.entities, int(time.time() * 1000)
        measured = [entities.Metric(_metric_name(name), value, now, 0) for name, value in metrics.items()]
        facts = [entities.Param(_key(name), _cut(str(value), PARAM_LIMIT)) for name, value in params.items()]
        marks = [entities.RunTag(_key(name), _cut(value, TAG_LIMIT)) for name, value in tags.items()]
        while measured or facts or marks:       # one batch for any ordinary cell
            self.client.log_batch(run_id, measured[: BATCH_METRICS // 2], facts[:BATCH_PARAMS], marks[:BATCH_PARAMS])
            measured, facts, marks = measured[BATCH_METRICS // 2 :], facts[BATCH_PARAMS:], marks[BATCH_PARAMS:]

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
        command = f"Run again, or complete: `{tables.command_line(self.sweep)}`"
        for table in (*forms, "The table is too long for this page; it is in *Artifacts*."):
            pieces = (*parts, table, self.sweep.description, OPEN_THIS, command)
            text = "\n\n".join(part.strip() for part in pieces if part.strip())
            if len(text) <= TAG_LIMIT:
                return text
        return text

    def _shortcuts(self) -> str:
        """Links for the first lines of the parent's page; MLflow folds the rest of a description."""
        words = [f"[cells side by side]({self._page}/runs?viewStateShareKey={VIEW}&{MODEL_TRAINING})"]
        if self.parent_id:
            places = {f"table {table.name}": f"tables/{table.name}.html" for table in self.sweep.shown_tables[:8]}
            places["figures"] = "figures"
            words += [f"[{name}]({self._page}/runs/{self.parent_id}/artifacts/{place})" for name, place in places.items()]
        return "Open: " + " · ".join(words)

    def _keep_view(self) -> None:
        """A view of the runs page with the columns that this sweep is about; its runs page unfolds by the tag of the cells."""
        cells = self.sweep.cells
        metrics = [metric for metric in tables.quality_metrics(self.sweep, map(self.store.record, cells)) if "/" in metric]
        columns = [f"params.`{name}`" for name in VIEW_PARAMS]
        columns += [f"metrics.`{_metric_name(name)}`" for name in ("checkpoint/bits_per_weight", *metrics[:VIEW_METRICS])]
        text = json.dumps({"selectedColumns": columns})
        if len(text) <= EXPERIMENT_TAG_LIMIT:
            self.client.set_experiment_tag(self.experiment_id, VIEW_TAG, text)

# -- where it is, and how to look at it --------------------------------------------------------------------------------


def tracking_uri(tracking: Tracking, runs: Path | str) -> str:
    """What MLflow is told: the database beside runs/ (of an object store: in the working directory), or the server.

    Raises TrackingError for a kind that does not exist.
    """
    if tracking.kind == "server":
        if not re.match(r"https?://", tracking.uri):
            raise TrackingError(f'tracking=server needs tracking.uri=http://HOST:PORT, not "{tracking.uri}"')
        return tracking.uri.rstrip("/")
    if tracking.kind == "sqlite":
        return tracking.uri or f"sqlite:///{_beside(runs) / 'mlflow.db'}"
    raise TrackingError(f'no tracking "{tracking.kind}"; known: none, server, sqlite')


@dataclass(frozen=True)
class Command:
    """A program to start: its words, what its environment adds, where its pages will be."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    url: str


def ui_command(tracking: Tracking, runs: Path | str, port: int = 5000) -> Command:
    """The command that serves MLflow's pages on the loopback interface. Raises TrackingError where there is nothing to show, or
    the port is taken."""
    uri = tracking_uri(tracking, runs)
    if tracking.kind == "server":
        raise TrackingError(f"the tracking server shows its own pages: open {uri}")
    database = Path(uri.removeprefix("sqlite:///"))
    if not database.exists():
        raise TrackingError(f"{database} does not exist: nothing was tracked here yet. Run a sweep, or `harness publish SWEEP`")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise TrackingError(f"port {port} is taken ({error.strerror}); choose another with --port") from error
    stores = ("--backend-store-uri", uri, "--default-artifact-root", _artifact_folder(runs).as_uri())
    words = (sys.executable, "-m", "mlflow", "server", *stores, "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    return Command(words, ENVIRONMENT, f"http://127.0.0.1:{port}/#/experiments?{MODEL_TRAINING}")


def serve(runtime: Runtime, port: int = 5000) -> int:
    """Serve MLflow's pages until Ctrl-C; returns the exit status. With a tracking server, say where it is."""
    if runtime.tracking.kind == "server":
        print(f"MLflow  {tracking_uri(runtime.tracking, runtime.runs)}/#/experiments?{MODEL_TRAINING}")
        return 0
    command = ui_command(runtime.tracking, runtime.runs, port)
    print(f"MLflow  {command.url}   (Ctrl-C ends it)", flush=True)
    process = subprocess.Popen(command.words, env={**os.environ, **command.environment})
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)    # a terminated command takes its server with it
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)


def _artifact_folder(runs: Path | str) -> Path:
    return _beside(runs) / "mlruns"


def _beside(runs: Path | str) -> Path:
    return Path.cwd() if is_url(runs) else Path(runs).resolve().parent


def _check_server(uri: str) -> None:
    """MLflow retries for minutes; this asks once."""
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=10):
            pass
    except urllib.error.HTTPError as error:
        way_out = "; start the server with --allowed-hosts naming this host" if error.code == 403 else ""
        raise TrackingError(f"the tracking server at {uri} answers {error.code} {error.reason}{way_out}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(f"no tracking server at {uri} ({reason}); start it, or run with tracking=sqlite") from error


def _import_mlflow() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")          # seconds; a slow server must not hold a sweep for minutes
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
    for left in database.parent.glob(f".{database.name}-*"):                # of one that was killed; the caller holds the lock
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
        raise TrackingError(tables.without_password(str(error))) from error.__cause__
    except Exception as error:
        foreign = (type(error).__module__ or "").split(".")[0]
        if isinstance(error, OSError) or foreign in ("mlflow", "sqlalchemy", "requests", "urllib3", "alembic", "sqlite3"):
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise TrackingError(tables.without_password(f"could not {what}: {first}")) from error
        raise


# -- what is written ---------------------------------------------------------------------------------------------------


def _run_names(cells: Sequence[Cell]) -> dict[str, str]:
    """cell_key -> "gptq · w4g32", with the model where there are several, and the key where that is not enough."""
    several = len({cell.model.name for cell in cells}) > 1
    names = {}
    for cell in cells:
        own = "full precision" if cell.method.is_baseline else f"{cell.method.name} · {cell.scheme.name}"
        names[cell_key(cell)] = f"{cell.model.name} · {own}" if several else own
    listed = list(names.values())
    return {key: name if listed.count(name) == 1 else f"{name} · {key[:6]}" for key, name in names.items()}


def _curves(cells: Sequence[Cell]) -> dict[str, tuple[str, int]]:
    """cell_key -> (curve, step): "gptq" at its bit width; model, group, activation and KV bits join where they tell cells apart.

    A fractional width is a curve of its own, since steps are whole numbers.
    """
    models = {cell.model.name for cell in cells}
    groups = {naming.group_text(cell) for cell in cells if not cell.method.is_baseline}
    curves: dict[str, tuple[str, int]] = {}
    taken: set[tuple[str, int]] = set()
    for cell in cells:
        scheme, words = cell.scheme, [cell.method.name if not cell.method.is_baseline else "full_precision"]
        bits = naming.BITS_OF_DTYPE.get(cell.model.dtype, 16) if cell.method.is_baseline else scheme.weight.bits
        if not cell.method.is_baseline:
            words += [f"g{naming.group_text(cell)}".replace("grow", "row")] if len(groups) > 1 else []
            words += [f"A{scheme.activation.bits}"] if scheme.activation else []
            words += [f"KV{scheme.kv.bits}"] if scheme.kv else []
            words += [f"{bits:g}bit"] if bits != int(bits) else []
        name = " ".join(words if len(models) == 1 else [cell.model.name, *words])
        if (name, round(bits)) in taken:
            name = f"{name} {cell_key(cell)[:6]}"
        taken.add((name, round(bits)))
        curves[cell_key(cell)] = (name, round(bits))
    return curves


def _params(record: Record) -> dict[str, Any]:
    """The cell, flat, under the names that its YAML has; what a reader filters by stands first.

    The bits of a baseline are those of its weights as stored, and not said before they are known: a param is written once.
    """
    cell = record.cell
    flat = naming.flatten(cell)
    first = {
        "model": flat.pop("model.name"),
        "method": flat.pop("method.name"),
        "scheme": flat.pop("scheme.name"),
        "bits": naming.bits_text(cell),
        "group": naming.group_text(cell) or "none",
        "calibration": flat.pop("calibration.name", "none"),
    }
    for slot in ("transform", "rounding", "tuning"):
        if f"{slot}.name" in flat:
            first[slot] = flat.pop(f"{slot}.name")
    if cell.method.is_baseline and not (cell.scheme.activation or cell.scheme.kv):
        stored = record.metrics().get("checkpoint/bits_per_weight")
        first.pop("bits") if stored is None else first.update(bits=f"{stored:g}")
    renamed = {name.removeprefix("scheme."): value for name, value in flat.items()}
    return {**first, **{name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in renamed.items()}}


def _cell_description(record: Record, state: str) -> str:
    metrics = record.metrics()
    shown = {metric: metrics[metric] for metric in tables.headline([record]) if metric in metrics}
    lines = [f"**{record.cell.title}** — {state}", ""]
    lines += [f"- {name}: {value:.4g}" if math.isfinite(value) else f"- {name}: diverged" for name, value in shown.items()]
    if record.failures and state == "failed":
        lines += [f"- failed in {record.failures[-1].get('stage', '')}: {record.failures[-1].get('reason', '')}"]
    files = (
        "`layer_errors.svg`, `evaluations/`, `items/` (per-item results, as tables), `provenance/` (uncommitted changes of the "
        "code, installed packages), `log.txt`, `cell.json` (all settings)"
    )
    lines += ["", f"Its full ancestry, and the command that makes it again: `harness show {record.cell_key[:12]}`"]
    return "\n".join([*lines, "", f"*Artifacts*: {files}."])


def _sweep_params(sweep: Sweep) -> dict[str, Any]:
    names = {
        "models": [cell.model.name for cell in sweep.cells],
        "methods": [cell.method.name for cell in sweep.cells],
        "schemes": [cell.scheme.name for cell in sweep.cells],
        "evaluations": [evaluation.name for cell in sweep.cells for evaluation in cell.evaluations],
    }
    return {name: ", ".join(dict.fromkeys(values)) for name, values in names.items()} | {"cells": len(sweep.cells)}


def _sweep_json(sweep: Sweep) -> dict[str, Any]:
    return {
        "name": sweep.name,
        "title": sweep.title,
        "overrides": [tables.without_password(override) for override in sweep.overrides],
        "cells": [{"title": cell.title, "cell_key": cell_key(cell), "cell": to_json(cell)} for cell in sweep.cells],
        "skips": [{"titles": list(skip.titles), "reason": skip.reason} for skip in sweep.skips],
    }


def _origin(sweep: Sweep) -> dict[str, str]:
    return {"mlflow.source.name": tables.command_line(sweep), "mlflow.source.type": "JOB", "mlflow.user": _user()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _fingerprint(record: Record) -> str:
    """Changes when anything does that a cell's artifacts show."""
    scores = {name: score["metrics"] for name, score in record.scores.items()}
    shown = [record.layer_errors, scores, record.failures, record.provenance]
    return digest(json.loads(json.dumps(shown, default=str), parse_constant=str))


def _write_artifacts(folder: Path, record: Record, store: Store) -> None:
    cell = record.cell
    identity = {"title": cell.title, "cell_key": record.cell_key, "quantize_key": record.quantize_key}
    write_json(folder / "cell.json", {**identity, "cell": to_json(cell)}, durable=False)
    facts = json.loads(tables.without_password(json.dumps(record.provenance, default=str)))
    write_json(folder / "environment.json", facts, durable=False)
    for facts in record.provenance.values():
        for kept in (facts.get("changes"), facts.get("packages")) if isinstance(facts, Mapping) else ():
            if kept and store.files.exists(store.root / kept):
                _write(folder / kept, store.files.read(store.root / kept).decode("utf-8", "replace"))
    _write_layer_errors(folder, record)
    for evaluation in cell.evaluations:
        if evaluation.name not in record.scores:
            continue
        name = _file_name(evaluation.name)
        write_json(folder / "evaluations" / f"{name}.json", record.scores[evaluation.name], durable=False)
        items = store.evaluation_items(record, evaluation)
        if items is not None:
            (folder / "items").mkdir(exist_ok=True)
            path = store.items_path(record.cell_key, score_key(cell, evaluation))
            (folder / "items" / f"{name}.parquet").write_bytes(store.files.read(path))
            first = items.head(ITEM_ROWS_SHOWN)             # in the form that MLflow's pages show as a table
            first.to_json(folder / _item_table(name, len(items)), orient="split", index=False, date_format="iso", force_ascii=False)
    with contextlib.suppress(FileNotFoundError):
        _write(folder / "log.txt", store.files.read(store.log_path(record.cell_key)).decode(errors="replace"))
    if record.failures:
        parts = [[str(failure.get(name, "")) for name in ("stage", "kind", "reason", "detail")] for failure in record.failures]
        texts = [f"{stage}: {kind}: {reason}\n\n{detail}\n" for stage, kind, reason, detail in parts]
        _write(folder / "failures.txt", "\n".join(texts))


def _item_table(name: str, rows: int) -> str:
    """Where the table of an evaluation's items lies among a run's artifacts."""
    return f"items/{name}.json" if rows <= ITEM_ROWS_SHOWN else f"items/{name}-first-{ITEM_ROWS_SHOWN}.json"


def _item_tables(record: Record, store: Store) -> list[dict[str, str]]:
    """The items of a cell's evaluations as MLflow lists tables, so that its pages show them as such."""
    found = []
    for evaluation in record.cell.evaluations:
        rows = record.scores.get(evaluation.name, {}).get("items", 0)
        if rows and store.items_path(record.cell_key, score_key(record.cell, evaluation)).exists():
            found.append({"path": _item_table(_file_name(evaluation.name), rows), "type": "table"})
    return found


def _data_of(cell: Cell) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(context, name, digest, source) of the texts and benchmarks of a cell."""
    text = cell.calibration
    if text is not None:
        yield "calibration", text.name, text.digest or "unknown", {"source": text.source, "split": text.split}
    for evaluation in {evaluation.name: evaluation for evaluation in cell.evaluations}.values():
        settings = dict(evaluation.settings)
        source = {name: settings[name] for name in ("source", "split", "task", "include", "data_root") if settings.get(name)}
        yield "evaluation", evaluation.name, evaluation.data_digest or "unknown", source


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def _write_layer_errors(folder: Path, record: Record) -> None:
    rows = record.layer_errors
    if not rows:
        return
    with (folder / "layer_errors.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    figure = plots.layer_errors(record)
    if figure is not None:
        _write(folder / "layer_errors.svg", figure)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _metric_name(name: str) -> str:
    """MLflow takes letters, digits and _ - . space / : only."""
    return _key(re.sub(r"[^\w\-. /:]", "_", name))


def _key(name: str) -> str:
    return name if len(name) <= KEY_LIMIT else f"{name[: KEY_LIMIT - 9]}~{digest(name)[:8]}"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _cut(text: str, limit: int) -> str:
    """Text within MLflow's limit and without passwords; what is cut says so."""
    text = tables.without_password(text)
    if len(text) <= limit:
        return text
    note = f" … [cut: {len(text)} characters in all; see the artifacts]"
    return text[: limit - len(note)] + note
