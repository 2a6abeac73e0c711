"""Tracking: one run per cell, found again after anything, and never a silent cut. A real MLflow on SQLite in a temporary folder."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import math
import shutil
import sqlite3
import zlib
from pathlib import Path
from typing import Any

import pytest
from synthetic_sweep import LINEARS, LLAMA, fill, make_sweep

from harness.core.cell import cell_key, score_key
from harness.core.errors import TrackingError
from harness.core.sweep import Sweep
from harness.reporting.drawing import save
from harness.reporting.figures import figures
from harness.reporting.tables import build_all
from harness.storage.store import Store
from harness.tracking.mlflow_runs import MLflowTracker, open_tracker, publish, tracked_page
from harness.tracking.run_contents import PARAM_LIMIT, cut_text, metric_key
from harness.tracking.serving import sweep_pages
from harness.tracking.views import BITS, CURVES, curve_metric


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Store, MLflowTracker]:
    """A small sweep that ran: a baseline, three cells (one diverged, one failed) and one that was never started."""
    sweep = make_sweep(tmp_path_factory.mktemp("study"), published=False)
    store = fill(sweep)
    wanted = {("none", 4), ("gptq", 4), ("rtn", 2), ("awq", 2)}
    small = tuple(
        cell for cell in sweep.cells if (cell.method.name, cell.scheme.weight.bits) in wanted
    )
    sweep = dataclasses.replace(sweep, cells=(*small, sweep.cells[-1]))
    tracker = open_tracker(sweep, "plan 5 cells")
    assert isinstance(tracker, MLflowTracker)
    for cell in sweep.cells[:-1]:
        record = store.record(cell)
        tracker.cell(record, "quantizing")
        tracker.cell(record, "failed" if record.failures else "done")
    tracker.cell(store.record(sweep.cells[-1]), "waiting")
    records = [store.record(cell) for cell in sweep.cells]
    folder = sweep.runtime.runs / "figures"
    drawn = [
        path
        for name, figure in figures(sweep, records).items()
        for path in save(figure, folder, name)
    ]
    tracker.finish(build_all(sweep, records, store), drawn, "done    3 of 5 cells")
    return sweep, store, tracker


@pytest.fixture(scope="module")
def schema(
    made: tuple[Sweep, Store, MLflowTracker], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A database with MLflow's tables and no runs: making them takes seconds, copying them does not."""
    path = tmp_path_factory.mktemp("schema") / "mlflow.db"
    shutil.copy(made[0].runtime.runs.parent / "mlflow.db", path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        for table in ("latest_metrics", "metrics", "params", "tags", "runs", "experiment_tags"):
            database.execute(f"DELETE FROM {table}")
        database.execute("DELETE FROM experiments WHERE experiment_id > 0")
        database.commit()
    return path


def view_of(experiment: Any, key: str) -> dict[str, Any]:
    """A view as MLflow's pages read it: deflated, then in base 64."""
    text = experiment.tags[f"mlflow.sharedViewState.{key}"]
    found: dict[str, Any] = json.loads(
        zlib.decompress(base64.b64decode(text.removeprefix("deflate;")))
    )
    return found


def runs_of(tracker: MLflowTracker) -> dict[str, Any]:
    runs = tracker.client.search_runs([tracker.experiment_id], max_results=1000)
    return {run.info.run_name: run for run in runs}


def points_of(tracker: MLflowTracker) -> list[tuple[str, str, int, float]]:
    """Every point of every metric history: what doubles when a run is repeated carelessly."""
    points = []
    for name, run in runs_of(tracker).items():
        for metric in run.data.metrics:
            points += [
                (name, metric, p.step, p.value)
                for p in tracker.client.get_metric_history(run.info.run_id, metric)
            ]
    return sorted(points)


def artifacts_of(tracker: MLflowTracker, run: Any, folder: str | None = None) -> set[str]:
    found: set[str] = set()
    for entry in tracker.client.list_artifacts(run.info.run_id, folder):
        found |= artifacts_of(tracker, run, entry.path) if entry.is_dir else {entry.path}
    return found


def test_one_child_per_cell_under_one_parent(made: tuple[Sweep, Store, MLflowTracker]) -> None:
    sweep, _, tracker = made
    runs = runs_of(tracker)
    assert set(runs) == {
        sweep.title,
        "full precision",
        "gptq · w4g128",
        "rtn · w2g128",
        "awq · w2g128",
        "rtn · w4a8",
    }
    parent = runs.pop(sweep.title)
    assert parent.data.tags["harness.sweep"] == sweep.name
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.data.tags["harness.key"] for run in runs.values()} == {
        cell_key(cell) for cell in sweep.cells
    }
    status = {name: run.info.status for name, run in runs.items()}
    assert (
        status["gptq · w4g128"] == "FINISHED"
        and status["awq · w2g128"] == "FAILED"
        and status["rtn · w4a8"] == "KILLED"
    )
    assert (
        parent.info.status == "FAILED"
        and parent.data.tags["harness.progress"] == "3 of 5 cells done, 1 failed"
    )


def test_what_a_child_holds(made: tuple[Sweep, Store, MLflowTracker]) -> None:
    sweep, store, tracker = made
    run = runs_of(tracker)["gptq · w4g128"]
    cell = next(cell for cell in sweep.cells if cell.method.name == "gptq")
    record = store.record(cell)
    layers = {name: value for name, value in run.data.metrics.items() if name.startswith("layers/")}
    metrics = {name: value for name, value in run.data.metrics.items() if CURVES not in name}
    assert metrics == record.metrics() | layers
    assert set(layers) == {f"layers/output_error/{name.rpartition('.')[2]}" for name in LINEARS}
    history = tracker.client.get_metric_history(run.info.run_id, "layers/output_error/q_proj")
    errors = {
        row["block"]: row["output_error"]
        for row in record.layer_errors
        if "q_proj" in row["linear"]
    }
    assert {point.step: point.value for point in history} == errors
    params = run.data.params
    assert (params["model"], params["method"], params["bits"], params["group"]) == (
        "llama3_8b",
        "gptq",
        "4",
        "128",
    )
    assert params["rounding.damping_fraction"] == "0.01" and params["calibration.samples"] == "128"
    assert run.data.tags["environment.device"] == "CPU"
    assert artifacts_of(tracker, run) == {
        "cell.json",
        "environment.json",
        "layer_errors.csv",
        "log.txt",
        "evaluations/arc_easy.json",
        "evaluations/wikitext2.json",
        "items/arc_easy.json",
        "items/arc_easy.parquet",
        "items/wikitext2.json",
        "items/wikitext2.parquet",
    }
    listed = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert [each["path"] for each in listed] == [
        "items/wikitext2.json",
        "items/arc_easy.json",
    ] and listed[0]["type"] == "table"
    items = json.loads(
        Path(tracker.client.download_artifacts(run.info.run_id, "items/arc_easy.json")).read_text()
    )
    assert items["columns"] == ["id", "acc"] and len(items["data"]) == 400
    inputs = {
        each.dataset.name: (each.dataset.digest, each.tags[0].value)
        for each in run.inputs.dataset_inputs
    }
    assert inputs == {
        "c4_128x2048": ("c", "calibration"),
        "wikitext2": ("w", "evaluation"),
        "arc_easy": ("a", "evaluation"),
    }
    failed = runs_of(tracker)["awq · w2g128"]
    assert "singular" in failed.data.tags["failure"] and "failures.txt" in artifacts_of(
        tracker, failed
    )


def test_infinities_are_tagged_not_stored(made: tuple[Sweep, Store, MLflowTracker]) -> None:
    run = runs_of(made[2])["rtn · w2g128"]
    assert "wikitext2/perplexity" not in run.data.metrics and "arc_easy/acc" in run.data.metrics
    assert run.data.tags["diverged"] == "wikitext2/perplexity = inf"
    assert all(
        abs(value) < 1e300
        for run in runs_of(made[2]).values()
        for value in run.data.metrics.values()
    )


def test_what_the_parent_holds(made: tuple[Sweep, Store, MLflowTracker]) -> None:
    sweep, store, tracker = made
    parent = runs_of(tracker)[sweep.title]
    history = tracker.client.get_metric_history(parent.info.run_id, "wikitext2/perplexity gptq")
    cell = next(cell for cell in sweep.cells if cell.method.name == "gptq")
    assert [(point.step, point.value) for point in history] == [
        (4, store.record(cell).metrics()["wikitext2/perplexity"])
    ]
    assert "wikitext2/perplexity full_precision" in parent.data.metrics
    note = parent.data.tags["mlflow.note.content"]
    assert "What to open" in note and "harness run llama3_8b_ptq" in note
    child = runs_of(tracker)["gptq · w4g128"].info.run_id
    # a row leads to its cell
    assert f"| [gptq](#/experiments/{tracker.experiment_id}/runs/{child}) | 4    |" in note
    files = artifacts_of(tracker, parent)
    assert {"plan.txt", "summary.txt", "sweep.json", "tables/table1.md"} <= files
    assert "figures/layer-errors.png" in files and "figures/arc_easy-acc-against-bits.svg" in files
    experiment = tracker.client.get_experiment(tracker.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    view = view_of(experiment, "cells")
    assert view["searchFilter"] == f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    assert view["orderByKey"] == "metrics.`wikitext2/perplexity`" and view["orderByAsc"]
    curves = view_of(experiment, "curves")
    assert curves["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "method"}]
    chart, run = curves["compareRunCharts"][0], runs_of(tracker)["gptq · w4g128"]
    assert chart["metricKey"] == curve_metric("wikitext2/perplexity")
    metrics = store.record(cell).metrics()
    for name, metric in (
        (chart["metricKey"], "wikitext2/perplexity"),
        (chart["selectedXAxisMetricKey"], BITS),
    ):
        points = tracker.client.get_metric_history(run.info.run_id, name)
        assert [(each.step, each.value) for each in points] == [(425, metrics[metric])]
    baseline = runs_of(tracker)["full precision"].data.metrics
    assert not any(name.startswith(CURVES) for name in baseline)  # a line of its own in the figures
    assert not any(name.startswith(("checkpoint/", "quantize/")) for name in parent.data.metrics)
    assert (
        "viewStateShareKey=cells" in note
        and f"/runs/{parent.info.run_id}/artifacts/tables/table1.html" in note
    )
    assert {each.dataset.name for each in parent.inputs.dataset_inputs} == {
        "c4_128x2048",
        "wikitext2",
        "arc_easy",
    }
    assert {"params.`method`", "metrics.`wikitext2/perplexity`", "metrics.`arc_easy/acc`"} <= set(
        view["selectedColumns"]
    )
    assert {
        "figures/layer-errors.pdf",
        "figures/wikitext2-perplexity-bits-needed.svg",
        "tables/table1.html",
    } <= files


def test_publishing_again_changes_nothing(made: tuple[Sweep, Store, MLflowTracker]) -> None:
    sweep, store, tracker = made
    runs, points = runs_of(tracker), points_of(tracker)
    assert publish(store, sweep).startswith('published 5 cells as experiment "llama3_8b_ptq"')
    again = runs_of(tracker)
    assert {name: run.info.run_id for name, run in runs.items()} == {
        name: run.info.run_id for name, run in again.items()
    }
    assert points_of(tracker) == points
    assert {n: r.data.params for n, r in runs.items()} == {
        n: r.data.params for n, r in again.items()
    }


def test_a_killed_sweep_is_completed_not_doubled(tmp_path: Path, schema: Path) -> None:
    shutil.copy(schema, tmp_path / "mlflow.db")
    sweep = make_sweep(tmp_path, published=False)
    store = fill(sweep)
    sweep = dataclasses.replace(sweep, cells=sweep.cells[:3])
    first = open_tracker(sweep, "")
    assert isinstance(first, MLflowTracker)
    first.cell(store.record(sweep.cells[0]), "done")
    # then the process is killed
    first.cell(dataclasses.replace(store.record(sweep.cells[1]), scores={}), "evaluating")
    second = open_tracker(sweep, "")
    assert isinstance(second, MLflowTracker)
    for cell in sweep.cells:
        second.cell(store.record(cell), "done")
    second.finish({}, (), "")
    runs = runs_of(second)
    assert len(runs) == 4 and len(second.client.search_runs([second.experiment_id])) == 4
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert (
        store.record(sweep.cells[1]).metrics().items() <= runs["rtn · w8g128"].data.metrics.items()
    )
    points = points_of(second)
    assert len(points) == len(set(points))
    assert tracked_page(sweep)
    second.client.delete_experiment(second.experiment_id)
    assert tracked_page(sweep) is None
    with pytest.raises(TrackingError, match="was deleted"):
        open_tracker(sweep, "")


def test_deleted_runs_are_made_again_once(tmp_path: Path, schema: Path) -> None:
    """Whatever somebody deletes, the next run leaves one live run per cell under one parent."""
    shutil.copy(schema, tmp_path / "mlflow.db")
    sweep = make_sweep(tmp_path, published=False)
    store = fill(sweep)
    sweep = dataclasses.replace(sweep, cells=sweep.cells[:3])
    keys = set(map(cell_key, sweep.cells))

    def complete() -> MLflowTracker:
        tracker = open_tracker(sweep, "")
        assert isinstance(tracker, MLflowTracker)
        for cell in sweep.cells:
            tracker.cell(store.record(cell), "done")
        page = tracker.finish({}, (), "")
        runs = tracker.client.search_runs([tracker.experiment_id])
        parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
        assert [run.info.run_id for run in parents] == [tracker.parent_id]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {tracker.parent_id}
        assert len(children) == 3 and {run.data.tags["harness.key"] for run in children} == keys
        assert tracked_page(sweep) == page
        assert [page for _, page in sweep_pages(sweep.runtime)] == [
            f"#/experiments/{tracker.experiment_id}/runs/{tracker.parent_id}?workflowType=machine_learning"
        ]
        return tracker

    first = complete()
    child = next(iter(first._children.values())).info.run_id
    first.client.delete_run(child)  # a cell's run
    assert tracked_page(sweep) is None
    second = complete()
    assert second.parent_id == first.parent_id and child not in {
        run.info.run_id for run in second._children.values()
    }
    second.client.delete_run(second.parent_id)  # the sweep's run, whose children stay
    assert tracked_page(sweep) is None
    third = complete()
    assert third.parent_id != second.parent_id
    assert {run.info.run_id for run in third._children.values()} == {
        run.info.run_id for run in second._children.values()
    }
    history = third.client.get_metric_history(third.parent_id, "wikitext2/perplexity rtn")
    assert {point.step for point in history} == {8, 4}
    # and the sweep's first run comes back with a second run of a cell
    third.client.restore_run(child)
    third.client.restore_run(second.parent_id)
    complete()


def test_nothing_is_cut_silently(made: tuple[Sweep, Store, MLflowTracker], tmp_path: Path) -> None:
    sweep, store, tracker = made
    long = dataclasses.replace(LLAMA, source="x" * (PARAM_LIMIT + 500), digest="long")
    cell = dataclasses.replace(sweep.cells[1], model=long)
    tracker.cell(store.record(cell), "unfinished")
    run = tracker.client.get_run(tracker._children[cell_key(cell)].info.run_id)
    assert len(run.data.params["model.source"]) == PARAM_LIMIT
    assert run.data.params["model.source"].endswith(
        f"[cut: {PARAM_LIMIT + 500} characters in all; see the artifacts]"
    )
    assert cut_text("short", 10) == "short"
    assert (
        cut_text("harness run x tracking.uri=http://me:secret@host:5000", 99)
        == "harness run x tracking.uri=http://host:5000"
    )
    assert len(metric_key("a" * 300)) == 250 and metric_key("a" * 300) != metric_key(
        "a" * 299 + "b"
    )


def test_a_later_evaluation_joins_the_same_run(tmp_path: Path, schema: Path) -> None:
    shutil.copy(schema, tmp_path / "mlflow.db")
    sweep = make_sweep(tmp_path, published=False)
    store = fill(sweep)
    sweep = dataclasses.replace(sweep, cells=sweep.cells[1:2])
    cell, key = sweep.cells[0], cell_key(sweep.cells[0])
    publish(store, sweep)
    store.write_score(
        key, score_key(cell, cell.evaluations[0]), {"metrics": {"wikitext2/perplexity": 9.5}}
    )
    publish(store, sweep)
    tracker = open_tracker(sweep)
    assert isinstance(tracker, MLflowTracker)
    run = runs_of(tracker)["rtn · w8g128"]
    assert run.data.metrics["wikitext2/perplexity"] == 9.5 and math.isfinite(
        run.data.metrics["arc_easy/acc"]
    )
    parent = tracker.client.get_metric_history(tracker.parent_id, "wikitext2/perplexity rtn")
    assert parent[-1].value == 9.5 and {point.step for point in parent} == {8}
