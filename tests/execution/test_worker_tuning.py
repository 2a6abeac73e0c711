"""Tuned cells in a task: one base for tuned and untuned, events of the cells that were asked for, failures that stay alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core.cell import cell_key, quantize_key, untuned
from harness.core.errors import MethodError
from harness.core.events import Failed, Progress, Quantized
from harness.core.sweep import Sweep
from harness.execution import driver
from harness.execution.tasks import QuantizeTask
from harness.execution.worker import run
from harness.planning.planner import make
from harness.storage.store import Store

Make = Callable[..., Sweep]
SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")
SHORT = ("calibration=demo", "calibration.samples=3", "calibration.length=24")


def task(sweep: Sweep) -> QuantizeTask:
    return QuantizeTask(sweep.cells, str(sweep.runtime.runs), device="cpu")


def by_name(sweep: Sweep) -> dict[str, Any]:
    return {cell.method.name: cell for cell in sweep.cells}


def test_a_tuned_cell_makes_its_base_on_the_way(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=db_llm", "scheme=w2g32", *SHORT, *SMALL)
    store, c = Store(sweep.runtime.runs), by_name(sweep)["db_llm"]
    events = list(run(task(sweep)))
    assert not [event for event in events if isinstance(event, Failed)]
    stages = [
        event.stage
        for event in events
        if isinstance(event, Progress) and cell_key(c) in event.cell_keys
    ]
    assert stages[0] == "block" and stages[-1] == "tuning", (
        "the walk of the base is progress of the tuned cell"
    )
    assert (
        store.manifest(quantize_key(c)) is not None
        and store.manifest(quantize_key(untuned(c))) is not None
    )
    asked = {cell_key(cell) for cell in sweep.cells}
    assert all(set(event.cell_keys) <= asked for event in events), "nobody asked for the base"
    manifest = store.manifest(quantize_key(c))
    assert manifest is not None and manifest["tuning"]["base"] == quantize_key(untuned(c))


def test_tuned_and_untuned_share_a_base(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=db_llm,db_llm_untrained", "scheme=w2g32", *SHORT, *SMALL)
    cells = by_name(sweep)
    assert quantize_key(untuned(cells["db_llm"])) == quantize_key(cells["db_llm_untrained"])
    summary = driver.run(sweep)
    assert summary.exit_code == 0
    scores = {
        r.cell.method.name: r.metrics()["demo_perplexity/perplexity"] for r in summary.records
    }
    assert scores["none"] < scores["db_llm"] < scores["db_llm_untrained"], scores
    assert len(list((Store(sweep.runtime.runs).root / "checkpoints").iterdir())) == 3
    assert driver.run(sweep).exit_code == 0


def test_a_base_that_is_there_is_not_made_again(demo_sweep: Make) -> None:
    list(run(task(demo_sweep("method=db_llm_untrained", "scheme=w2g32", *SHORT, *SMALL))))
    sweep = demo_sweep("method=db_llm", "scheme=w2g32", *SHORT, *SMALL)
    c = by_name(sweep)["db_llm"]
    events = [event for event in run(task(sweep)) if cell_key(c) in event.cell_keys]
    assert not [event for event in events if isinstance(event, Progress) and event.stage == "block"]
    assert [event for event in events if isinstance(event, Quantized)]


def test_a_tuning_that_fails_leaves_the_others(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.quantization.methods.db_llm import Tuning

    def broken(*_: Any) -> Any:
        raise MethodError("the loss of epoch 1 is nan")
        yield

    monkeypatch.setattr(Tuning, "tune", broken)
    sweep = demo_sweep("method=db_llm,db_llm_untrained", "scheme=w2g32", *SHORT, *SMALL)
    cells, store = by_name(sweep), Store(sweep.runtime.runs)
    events = list(run(task(sweep)))
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert (
        failed.cell_keys == (cell_key(cells["db_llm"]),)
        and failed.stage == "tuning"
        and "nan" in failed.reason
    )
    assert store.manifest(quantize_key(cells["db_llm_untrained"])) is not None
    assert store.manifest(quantize_key(cells["db_llm"])) is None


def test_a_base_that_fails_fails_its_tuned_cells(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.quantization.methods.db_llm import Rounding

    def broken(*_: Any) -> Any:
        raise MethodError("no numbers")

    monkeypatch.setattr(Rounding, "round_layer", broken)
    sweep = demo_sweep("method=db_llm", "scheme=w2g32", *SHORT, *SMALL)
    c = by_name(sweep)["db_llm"]
    (failed,) = [event for event in run(task(sweep)) if isinstance(event, Failed)]
    assert failed.cell_keys == (cell_key(c),) and "no numbers" in failed.reason


def test_the_plan_accepts_tunings_and_refuses_what_cannot_be_tuned(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=db_llm", "scheme=w2g32,w3g32", *SHORT, *SMALL)
    plan = make(sweep, Store(sweep.runtime.runs))
    assert {cell.scheme.name for cell in plan.missing} == {"full", "w2g32"}
    (refusal,) = plan.refused
    assert "3 bits" in " ".join(refusal.reasons)
    c = by_name(demo_sweep("method=db_llm", "scheme=w2g32", *SHORT, *SMALL))["db_llm"]
    bare = dataclasses.replace(
        sweep, cells=(dataclasses.replace(c, method=dataclasses.replace(c.method, rounding=None)),)
    )
    (refusal,) = make(bare, Store(bare.runtime.runs)).refused
    assert "choose a rounding" in " ".join(refusal.reasons)


def test_fused_matrices_are_refused_before_anything_starts(
    demo_sweep: Make, tiny_model: Callable[..., Path]
) -> None:
    sweep = demo_sweep("method=peqa", f"model={tiny_model('phi3')}", "scheme=w4g32", *SHORT, *SMALL)
    reasons = {
        refusal.cell.method.name: " ".join(refusal.reasons)
        for refusal in make(sweep, Store(sweep.runtime.runs)).refused
    }
    assert "self_attn.q_proj" in reasons["peqa"] and "fused" in reasons["peqa"]
