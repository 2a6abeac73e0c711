"""Tasks: what they leave in the store, that they can be given again, and that what fails fails alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from worker_tasks import evaluate_task, quantize_task

from harness.core import plugins
from harness.core.cell import cell_key, quantize_key, score_key
from harness.core.events import Event, Failed, Progress, Quantized, Scored, TaskEnded, TaskStarted
from harness.core.sweep import Sweep
from harness.execution.process import prepare
from harness.execution.tasks import QuantizeTask
from harness.execution.worker import run
from harness.storage.store import Store

Make = Callable[..., Sweep]


SMALL = ("evaluations=demo_perplexity", "evaluations.limit=4")


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events if not isinstance(event, Progress)]


def test_a_pass_then_its_scores(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn,gptq", "scheme=w4", *SMALL)
    store = Store(sweep.runtime.runs)
    events = list(run(quantize_task(sweep)))
    assert isinstance(events[0], TaskStarted) and isinstance(events[-1], TaskEnded)
    assert events[-1].peak_memory_bytes > 0 and events[-1].seconds > 0
    assert {
        key for event in events if isinstance(event, Quantized) for key in event.cell_keys
    } == set(map(cell_key, sweep.cells))
    events = list(run(evaluate_task(sweep)))
    assert kinds(events) == ["TaskStarted", *["Scored"] * 3, "TaskEnded"]
    for cell in sweep.cells:
        record = store.record(cell)
        assert record.complete and not record.problems
        assert record.metrics()["demo_perplexity/perplexity"] > 1
        assert record.provenance["quantize"]["command"] == "harness run test"
        assert record.provenance["quantize"]["versions"]["torch"]
        score = record.scores["demo_perplexity"]
        assert score["seconds"] > 0 and score["provenance"]["device"] == "cpu"
        log = store.log_path(cell_key(cell)).read_text()
        assert "quantized" in log and "scored" in log


def test_given_again_nothing_is_done_again(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    store = Store(sweep.runtime.runs)
    for task in (quantize_task(sweep), evaluate_task(sweep)):
        list(run(task))
    files = {path: path.stat().st_mtime_ns for path in store.root.rglob("*.safetensors")}
    files |= {path: path.stat().st_mtime_ns for path in store.root.rglob("scores/*.json")}
    assert kinds(list(run(quantize_task(sweep)))).count("Quantized") == len(sweep.cells)
    assert kinds(list(run(evaluate_task(sweep)))).count("Scored") == len(sweep.cells)
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_one_checkpoint_for_cells_that_share_it(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w8,w8a8", *SMALL)
    events = list(run(quantize_task(sweep)))
    shared = [set(event.cell_keys) for event in events if isinstance(event, Quantized)]
    assert {cell_key(cell) for cell in sweep.cells if cell.method.name == "rtn"} in shared
    scored = {
        event.cell_keys[0]: event.metrics
        for event in run(evaluate_task(sweep))
        if isinstance(event, Scored)
    }
    assert len(scored) == 3
    assert (
        len({metrics["demo_perplexity/perplexity"] for metrics in scored.values()}) == 3
    )  # executed differently


def test_a_failing_evaluation_fails_alone(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = demo_sweep(
        "method=rtn", "scheme=w4", "evaluations=[demo_perplexity,demo_facts]", "evaluations.limit=4"
    )
    list(run(quantize_task(sweep)))
    evaluator = plugins.load("evaluator", "lm_eval_tasks")

    def broken(self: Any, subject: Any, evaluation: Any) -> Iterator[Any]:
        raise RuntimeError("no such thing")
        yield

    monkeypatch.setattr(evaluator, "score", broken)
    events = list(run(evaluate_task(sweep)))
    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.stage for event in failed] == ["demo_facts"] * 2
    assert failed[0].reason == "RuntimeError: no such thing" and "Traceback" in failed[0].detail
    assert sum(isinstance(event, Scored) for event in events) == 2


def test_a_killed_evaluation_loses_the_one_in_progress_at_most(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = demo_sweep(
        "method=none",
        "scheme=full",
        "evaluations=[demo_perplexity,demo_divergence]",
        "evaluations.limit=2",
    )
    list(run(quantize_task(sweep)))
    (cell,) = sweep.cells
    store, asked = Store(sweep.runtime.runs), []
    evaluator = plugins.load("evaluator", "perplexity")
    score = evaluator.score
    monkeypatch.setattr(
        evaluator,
        "score",
        lambda self, *arguments: asked.append("again") or score(self, *arguments),
    )
    events = run(evaluate_task(sweep))
    for event in events:
        if isinstance(event, Progress) and event.stage == "demo_divergence":
            break  # the process ends here, in the middle of the second
    events.close()
    assert set(store.record(cell).scores) == {"demo_perplexity"} and asked == ["again"]
    list(run(evaluate_task(sweep)))
    assert set(store.record(cell).scores) == {"demo_perplexity", "demo_divergence"} and asked == [
        "again"
    ]


def test_out_of_memory_is_tried_once_more_with_batches_of_one(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = demo_sweep("method=none", "scheme=full", *SMALL)
    list(run(quantize_task(sweep)))
    evaluator = plugins.load("evaluator", "perplexity")
    score, sizes = evaluator.score, []

    def large(self: Any, subject: Any, evaluation: Any) -> Iterator[Any]:
        sizes.append(subject.batch_size)
        if subject.batch_size != 1:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
            )
        yield from score(self, subject, evaluation)

    monkeypatch.setattr(evaluator, "score", large)
    events = list(run(evaluate_task(sweep)))
    assert sizes == [0, 1]
    assert sum(isinstance(event, Scored) for event in events) == 1
    cell = sweep.cells[0]
    content = Store(sweep.runtime.runs).score(cell_key(cell), score_key(cell, cell.evaluations[0]))
    assert (
        content is not None and content["batch_size"] == 1
    )  # what it was scored with is in the record


def test_a_missing_checkpoint_fails_its_cell_and_no_other(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4,w3", *SMALL)
    list(run(quantize_task(sweep)))
    store = Store(sweep.runtime.runs)
    (store.checkpoint_folder(quantize_key(sweep.cells[1])) / "manifest.json").unlink()
    events = list(run(evaluate_task(sweep)))
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert (
        failed.cell_keys == (cell_key(sweep.cells[1]),) and "run the sweep again" in failed.reason
    )
    assert sum(isinstance(event, Scored) for event in events) == len(sweep.cells) - 1


def test_two_drivers_share_the_work(demo_sweep: Make) -> None:
    """The second waits for the first one's lock, then finds the checkpoints made."""
    sweep = demo_sweep("method=rtn", "scheme=w4,w3")
    store, first = Store(sweep.runtime.runs), run(quantize_task(sweep))
    assert isinstance(next(first), TaskStarted)
    assert not isinstance(next(first), TaskEnded)  # it holds the locks now
    second: list[Event] = []
    thread = threading.Thread(target=lambda: second.extend(run(quantize_task(sweep))))
    thread.start()
    made = {
        path: path.stat().st_mtime_ns
        for _ in first
        for path in store.root.rglob("block-*.safetensors")
    }
    thread.join(600)
    assert not thread.is_alive()
    assert {
        key for event in second if isinstance(event, Quantized) for key in event.cell_keys
    } == set(map(cell_key, sweep.cells))
    assert not any(isinstance(event, Progress) for event in second)
    assert made == {
        path: path.stat().st_mtime_ns for path in store.root.rglob("block-*.safetensors")
    }


def test_an_interrupted_pass_goes_on(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4", "baseline=false")
    store, events = Store(sweep.runtime.runs), run(quantize_task(sweep))
    next(event for event in events if isinstance(event, Progress) and event.step == 2)
    events.close()  # type: ignore[attr-defined]
    folder = store.checkpoint_folder(quantize_key(sweep.cells[0]))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("block-*.safetensors")}
    assert len(before) == 2
    assert "Quantized" in kinds(list(run(quantize_task(sweep))))
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}


def test_a_device_that_is_not_there_fails_all_cells(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sweep = demo_sweep("method=rtn", "scheme=w4")
    (failed,) = list(run(QuantizeTask(sweep.cells, str(sweep.runtime.runs), device="cuda")))
    assert (
        isinstance(failed, Failed) and len(failed.cell_keys) == 2 and "device=cpu" in failed.reason
    )
    assert prepare("auto", 0) == "cpu"
