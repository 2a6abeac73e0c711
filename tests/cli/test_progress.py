"""The output of a running sweep: the live view and the lines of events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from harness.cli.progress import Live, news
from harness.core.cell import cell_key
from harness.core.events import Failed, Progress, Quantized, Turn
from harness.core.failures import FailureKind
from harness.core.sweep import Sweep
from harness.execution.progress import Tally
from harness.planning.planner import make
from harness.storage.store import Store

Make = Callable[..., Sweep]


SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")


def test_the_live_view_draws_every_event(
    demo_sweep: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    tally, live = Tally(make(sweep, Store(sweep.runtime.runs))), Live()
    key = cell_key(sweep.cells[0])
    failed = Failed(0.0, (key,), stage="load", reason="[bad] thing")
    for event in (Progress(0.0, (key,), "block", 1, 4), Quantized(0.0, (key,)), failed):
        live.event(event, tally, tally.add(event))
    live.close()
    assert "[bad] thing" in capsys.readouterr().out


@pytest.mark.parametrize("kind", list(FailureKind))
def test_a_failure_says_what_is_retried_or_what_to_do(kind: FailureKind) -> None:
    tally: Any = SimpleNamespace(cells={}, metrics={})
    failed = Failed(0.0, ("abcdef0123456789",), "evaluate", kind, "reason")
    (final,) = news(failed, tally, ())
    assert final.startswith("FAIL") and "evaluate: reason" in final
    assert final.endswith("harness show abcdef01")
    assert (kind.remedy in final) == (kind is not FailureKind.ERROR)
    (again,) = news(dataclasses.replace(failed, retry=True), tally, ())
    assert again.startswith("retry") and again.endswith(kind.retried) and "FAIL" not in again


def test_waiting_for_another_sweep_and_going_on_are_lines() -> None:
    tally: Any = SimpleNamespace(cells={}, metrics={})
    (waiting,) = news(Turn(0.0, priority=1, behind="sweep b (priority 3)"), tally, ())
    (resumed,) = news(Turn(0.0, priority=1), tally, ())
    assert "sweep b (priority 3)" in waiting and "priority 1" in waiting
    assert "priority 1" in resumed and "sweep b" not in resumed
