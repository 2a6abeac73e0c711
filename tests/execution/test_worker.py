"""Tasks: what they leave in the store, that they can be given again, and that what fails fails alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.core import plugins
from harness.core.cell import cell_key, from_json, quantize_key, score_key, to_json
from harness.core.errors import HarnessError
from harness.core.events import Event, Failed, Progress, Quantized, Scored, TaskEnded, TaskStarted
from harness.core.failures import is_out_of_memory
from harness.core.sweep import Sweep
from harness.execution import provenance
from harness.execution.failures import failure
from harness.execution.logs import describe
from harness.execution.process import prepare
from harness.execution.tasks import EvaluateTask, QuantizeTask
from harness.execution.worker import run
from harness.storage.store import Store

Make = Callable[..., Sweep]
SMALL = ("evaluations=demo_perplexity", "evaluations.limit=4")


def quantize_task(sweep: Sweep) -> QuantizeTask:
    return QuantizeTask(
        sweep.cells, str(sweep.runtime.runs), device="cpu", command="harness run test"
    )


def evaluate_task(sweep: Sweep) -> EvaluateTask:
    return EvaluateTask(
        sweep.cells,
        tuple(cell.evaluations for cell in sweep.cells),
        str(sweep.runtime.runs),
        device="cpu",
    )


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events if not isinstance(event, Progress)]


def test_tasks_travel_as_json(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4", *SMALL)
    for task in (quantize_task(sweep), evaluate_task(sweep)):
        back = from_json(type(task), json.loads(json.dumps(to_json(task))))
        assert back == task
        assert [cell.evaluations for cell in back.cells] == [
            cell.evaluations for cell in task.cells
        ]


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


def test_a_fraction_of_a_gpu_is_a_cap_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card: what torch is asked. A process on the CPU asks no driver for anything."""
    import torch

    asked: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, index: asked.append((share, index)),
    )
    assert (
        prepare("auto", 0, 0.25) == "cuda"
        and prepare("cuda:1", 0, 0.5) == "cuda:1"
        and prepare("cuda", 0) == "cuda"
    )
    assert asked == [(0.25, 0), (0.5, 1), (1.0, 0)]
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: pytest.fail("a CPU task looked for GPUs")
    )
    assert prepare("cpu", 0, 0.25) == "cpu"


@pytest.mark.gpu
def test_the_cap_holds_on_a_card() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        prepare("cuda", 0, 0.1)
        with pytest.raises(torch.OutOfMemoryError) as full:
            torch.empty(int(total * 0.2), dtype=torch.uint8, device="cuda")
        assert is_out_of_memory(full.value)
        torch.empty(int(total * 0.05), dtype=torch.uint8, device="cuda")
    finally:
        prepare("cuda", 0, 1.0)
        torch.cuda.empty_cache()


def test_kinds_of_failure() -> None:
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(ValueError("out of memory of the question"))
    failed = failure(HarnessError("what, where\nmore"), ("k",), "stage")
    assert (failed.kind, failed.reason) == ("error", "what, where")
    assert failure(MemoryError(), ("k",), "s").kind == "out_of_memory"


def test_every_event_has_its_line() -> None:
    assert describe(Progress(0.0, ("k",), stage="block", step=1, steps=4)) == "block 1/4"
    assert "4.250 bits" in describe(
        Quantized(0.0, ("k",), record={"bits_per_weight": 4.25, "seconds": 1.0})
    )
    assert "a/b 2.5" in describe(Scored(0.0, ("k",), evaluation="a", metrics={"a/b": 2.5}))
    assert "out_of_memory" in describe(
        Failed(0.0, ("k",), stage="x", kind="out_of_memory", reason="r")
    )
    assert describe(TaskEnded(0.0)) == ""


def test_provenance_is_plain_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "changes", lambda: "- a line\n+ another")
    facts = provenance.collect("cpu", 2, "harness run x", Store(tmp_path))
    assert (tmp_path / facts["changes"]).read_text() == "- a line\n+ another\n"
    installed = (tmp_path / facts["packages"]).read_text().splitlines()
    assert any(line.startswith("torch==") for line in installed) and all(
        "==" in line for line in installed
    )
    assert (
        provenance.collect("cpu", 2, "harness run x", Store(tmp_path))["packages"]
        == facts["packages"]
    )  # kept once
    assert len(list((tmp_path / "provenance").iterdir())) == 2
    assert json.loads(json.dumps(facts)) == facts
    assert (
        facts["threads"] == 2
        and facts["versions"]["torch"]
        and facts["host"]
        and facts["python"].startswith("3.")
    )
