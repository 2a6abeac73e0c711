"""`harness status`: counts, failures with what a person can do about them, every sweep of a store, watching."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from harness.cli.status import resume_command, status_text, store_facts, store_text, sweep_facts
from harness.cli.status import watch as watch_status
from harness.core.cell import cell_key
from harness.core.failures import FailureKind
from harness.core.sweep import Sweep, command_line
from harness.storage.store import Store
from harness.storage.sweep_state import SweepState


def test_a_failure_has_its_reason_and_its_remedy(demo_sweep: Callable[..., Sweep]) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4,w3", "baseline=false")
    store = Store(sweep.runtime.runs)
    store.open_cells(sweep.cells)
    first, second = map(cell_key, sweep.cells)
    kind = FailureKind.NO_NODE
    store.write_failure(first, {"stage": "evaluate", "kind": kind, "reason": kind.sentence})
    store.write_failure(second, {"stage": "evaluate", "kind": "error", "reason": "it broke"})
    facts = sweep_facts(store, sweep.name, sweep.cells)
    text = status_text(facts)
    assert f"{kind.sentence}; {kind.remedy}    harness show {first[:8]}" in text
    assert f"it broke    harness show {second[:8]}" in text
    assert "0 of 2 cells done · 2 failed" in text
    assert facts["failed"] == 2 and not facts["running"] and facts["failures"][0]["key"] == first


def test_every_sweep_of_a_store_with_how_to_go_on(
    demo_sweep: Callable[..., Sweep], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4,w3", "baseline=false")
    store = Store(sweep.runtime.runs)
    assert "start with: harness run demo" in store_text("runs", store_facts(store))
    titles = {cell_key(cell): cell.title for cell in sweep.cells}
    states = {
        name: SweepState(store, name, titles, command=command_line(sweep))
        for name in ("runs_now", "is_done", "has_failed", "was_stopped", "has_died")
    }
    first, second = titles
    for name, state in states.items():
        state.update(first, "done")
        if name == "is_done":
            state.update(second, "done")
        if name == "has_failed":
            state.update(second, "failed", reason="it broke")
        if name == "runs_now":
            state.content["seconds_left"] = 240.0
            state.save()
        elif name == "has_died":  # a process that is no more, of a boot that is long over
            state.content["owner"] = {**state.content["owner"], "pid": 2**22 + 1}
            state.save()
        else:
            state.end()
    found = {each["sweep"]: each for each in store_facts(store)}
    assert {name: each["state"] for name, each in found.items()} == {
        "runs_now": "running",
        "is_done": "done",
        "has_failed": "failed",
        "was_stopped": "stopped",
        "has_died": "died",
    }
    assert {name for name, each in found.items() if each["resume"]} == {
        "has_failed",
        "was_stopped",
        "has_died",
    }
    assert found["has_died"]["resume"] == command_line(sweep)
    text = store_text("runs", list(found.values()))
    assert "≈ 4.0 min left" in text and "last seen" in text and "1 of 2 cells, 1 failed" in text
    assert resume_command("demo", {}) == "harness run demo" and not resume_command("grid-x", {})
    looks = iter([("first", True), ("second", False)])
    watch_status(lambda: next(looks), clear=True, seconds=0.0)
    assert capsys.readouterr().out == "\x1b[H\x1b[2Jfirst\n\x1b[H\x1b[2Jsecond\n"
    assert time.time() >= found["runs_now"]["updated"]
