"""The output of a running sweep: the live view and the lines of events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from harness.cli import progress
from harness.cli.progress import Lines, Live, news
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


def test_a_live_view_of_80_columns_breaks_no_word_and_colours_what_counts(demo_sweep: Make) -> None:
    import io

    from rich.console import Console

    sweep = demo_sweep("method=rtn", "scheme=w4,w3,w2", *SMALL)
    tally = Tally(make(sweep, Store(sweep.runtime.runs)))
    out = io.StringIO()
    live = Live(Console(file=out, width=80, force_terminal=True, color_system="standard"))
    for key in tally.pending:
        live.event(event := Progress(0.0, (key,), "block", 1, 4), tally, tally.add(event))
    sentence = "  ok    demo · rtn · w4    " + "demo_perplexity/perplexity 2.126  " * 6
    live.line(sentence)
    live.line("FAIL    demo · rtn · w3    evaluate: it broke")
    shown = io.StringIO()
    Console(file=shown, width=80).print(live._view(tally))
    live.close()
    assert max(map(len, shown.getvalue().splitlines())) <= 80
    assert "0 of 4 cells" in shown.getvalue() and "block 1/4" in shown.getvalue()
    text = out.getvalue()
    assert "\x1b[32mok\x1b[0m" in text and "\x1b[1;31mFAIL\x1b[0m" in text
    assert text.count("demo_perplexity/perplexity") == 6  # no line ends within a word


def test_a_pipe_gets_a_line_on_the_progress_every_few_minutes(
    demo_sweep: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    tally, lines = Tally(make(sweep, Store(sweep.runtime.runs))), Lines()
    step = Progress(0.0, (cell_key(sweep.cells[0]),), "block", 1, 4)
    lines.event(step, tally, tally.add(step))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.0)
    lines.event(step, tally, tally.add(step))
    said = capsys.readouterr().out
    assert "0 of 2 cells" in said and "(block 1/4)" in said and said.count("\n") == 1


def test_a_large_sweep_asks_at_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Any = SimpleNamespace(missing=[None] * (progress.MANY_CELLS + 1))
    assert progress.asks_for_large(plan)  # the tests have no terminal
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    for answer, expected in (("y", True), ("", False), ("no", False)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert progress.asks_for_large(plan) is expected
    assert progress.asks_for_large(SimpleNamespace(missing=[None]))
    assert "tmux" in progress.ssh_advice({"SSH_CONNECTION": "a"})
    assert not progress.ssh_advice({"SSH_CONNECTION": "a", "TMUX": "b"})
    assert not progress.ssh_advice({})
