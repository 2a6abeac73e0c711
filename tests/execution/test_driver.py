"""The driver: what is recorded while a sweep runs, and that killing it loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness.cli.commands import app
from harness.cli.progress import news
from harness.cli.show import record_text
from harness.cli.status import status
from harness.config.grid import load_sweep
from harness.core.cell import cell_key
from harness.core.errors import ConfigError, PlanError, ScheduleError, StoreError, TrackingError
from harness.core.events import Event, Failed, Progress, Quantized
from harness.core.sweep import Sweep
from harness.core.units import seconds_of
from harness.execution import dispatch, driver, outputs
from harness.execution.progress import Silent, Tally
from harness.planning.planner import make, within
from harness.storage import store as store_module
from harness.storage.files import LocalDisk
from harness.storage.store import Store
from harness.tracking.tracker import NullTracker

Make = Callable[..., Sweep]


SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")


class Kept(Silent):
    """A display that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def event(self, event: Event, tally: Tally, finished: Any) -> None:
        self.lines += news(event, tally, finished)


def test_a_sweep_from_nothing_to_done_and_once_more(demo_sweep: Make) -> None:
    sweep, display = demo_sweep("method=rtn", "scheme=w4,w3", *SMALL), Kept()
    summary = driver.run(sweep, display)
    assert summary.exit_code == 0 and all(record.complete for record in summary.records)
    assert display.lines[0].startswith("plan    3 cells")
    assert sum(line.startswith("  ok") for line in display.lines) == 3
    assert summary.text.splitlines()[0].startswith("done    3 of 3 cells")
    store = Store(sweep.runtime.runs)
    state = store.sweep_state(sweep.name)
    assert (
        state is not None
        and state["ended"]
        and {cell["state"] for cell in state["cells"].values()} == {"done"}
    )
    files = {path: path.stat().st_mtime_ns for path in store.root.rglob("scores/*.json")}
    again = driver.run(sweep)
    assert again.exit_code == 0 and files == {path: path.stat().st_mtime_ns for path in files}


def test_a_new_evaluation_of_a_finished_sweep_runs_alone(demo_sweep: Make) -> None:
    driver.run(demo_sweep("method=rtn", "scheme=w4", *SMALL))
    more = demo_sweep(
        "method=rtn", "scheme=w4", "evaluations=[demo_perplexity,demo_facts]", "evaluations.limit=2"
    )
    plan = make(more, Store(more.runtime.runs))
    assert (
        not plan.passes
        and [e.name for wanted in plan.scorings[0].evaluations for e in wanted]
        == ["demo_facts"] * 2
    )
    assert driver.run(more).exit_code == 0


def test_refusals_stop_before_anything_starts(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4,w4g96")
    with pytest.raises(PlanError, match="group size 96"):
        driver.run(sweep)
    assert not list(sweep.runtime.runs.rglob("*.safetensors"))


def script(monkeypatch: pytest.MonkeyPatch, act: Callable[[Any], Iterator[Event]]) -> None:
    monkeypatch.setattr(dispatch, "run", lambda plan, command="": act(plan))


def test_failures_are_kept_and_resumed(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, display = demo_sweep("method=rtn", "scheme=w4,w3", *SMALL), Kept()

    def act(plan: Any) -> Iterator[Event]:
        keys = tuple(map(cell_key, plan.missing))
        yield Failed(
            time.time(), keys[:2], stage="block 0", kind="killed", reason="gone", retry=True
        )
        yield Failed(
            time.time(), keys[:1], stage="block 0", reason="NaN in the Hessian", detail="Traceback"
        )

    with monkeypatch.context() as patched:
        script(patched, act)
        summary = driver.run(sweep, display)
    assert summary.exit_code == 1
    assert list(summary.failed.values()) == ["NaN in the Hessian"]
    assert summary.text.splitlines()[-1].startswith("resume  harness run")
    store, key = Store(sweep.runtime.runs), next(iter(summary.failed))
    assert [failure["reason"] for failure in store.failures(key)] == ["NaN in the Hessian"]
    assert "FAIL" in status(store, sweep.name, sweep.cells) and "NaN" in status(
        store, sweep.name, sweep.cells
    )
    assert sum(line.startswith("retry") for line in display.lines) == 2
    assert driver.run(sweep).exit_code == 0
    assert not store.failures(key)  # forgotten, as the work succeeded


def test_fail_fast_stops_at_the_first_failure(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(plan: Any) -> Iterator[Event]:
        for cell in plan.missing:
            yield Failed(time.time(), (cell_key(cell),), reason="no")

    script(monkeypatch, act)
    assert len(driver.run(demo_sweep("method=rtn", "scheme=w4,w3", "fail_fast=true")).failed) == 1


def test_a_full_store_stops_the_sweep_and_is_named(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell fails because nothing can be written; the others are not tried on the same disk, and none is blamed."""
    sweep = demo_sweep("method=rtn", "scheme=w4,w3", *SMALL)

    def act(plan: Any) -> Iterator[Event]:
        def full(self: Any, path: Path, fill: Any, durable: bool = True) -> None:
            raise StoreError(f"cannot write {path}: the disk is full")

        monkeypatch.setattr(store_module.LocalDisk, "write", full)
        for cell in plan.missing:
            yield Failed(
                time.time(),
                (cell_key(cell),),
                stage="block 0",
                reason="cannot write: no space left on device",
            )

    script(monkeypatch, act)
    summary = driver.run(sweep)
    assert summary.exit_code == 1 and "the disk is full" in summary.stopped and not summary.failed
    assert "the disk is full" in summary.text and summary.text.splitlines()[-1].startswith("resume")
    monkeypatch.undo()
    store = Store(sweep.runtime.runs)
    assert not any(store.failures(cell_key(cell)) for cell in sweep.cells)


def test_a_cluster_lost_for_good_ends_the_sweep_in_words(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was never there is an error as before; either way nobody takes the sweep for a running one."""
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)

    def lost(plan: Any, before: int) -> Iterator[Event]:
        for _ in range(before):
            yield Progress(
                time.time(), (cell_key(plan.missing[0]),), stage="block", step=1, steps=4
            )
        raise ScheduleError("the head of the cluster is lost")

    script(monkeypatch, lambda plan: lost(plan, 1))
    summary = driver.run(sweep)
    assert (
        summary.exit_code == 1
        and summary.stopped == "the head of the cluster is lost"
        and "resume" in summary.text
    )
    script(monkeypatch, lambda plan: lost(plan, 0))
    with pytest.raises(ScheduleError):
        driver.run(sweep)
    state = Store(sweep.runtime.runs).sweep_state(sweep.name)
    assert state is not None and state["ended"]


def test_a_cancelled_sweep_goes_on_when_it_is_run_again(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalDisk, "state_seconds", 0.0)  # looked for each time
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    store = Store(sweep.runtime.runs)

    class Cancelling(Silent):
        def event(self, event: Event, tally: Tally, finished: Any) -> None:
            if isinstance(event, Quantized):
                store.cancel(sweep.name)

    summary = driver.run(sweep, Cancelling())
    assert summary.exit_code == 130 and not all(record.complete for record in summary.records)
    assert driver.run(sweep).exit_code == 0 and not store.is_cancelled(sweep.name)


def test_a_budget_takes_the_cheapest_cells_and_names_the_others(demo_sweep: Make) -> None:
    sweep, display = demo_sweep("method=none,rtn", "scheme=w4,w3", *SMALL), Kept()
    plan = make(sweep, Store(sweep.runtime.runs))
    costs = {"full": 50.0, "w4": 1.0, "w3": 2.0}
    passes = [
        dataclasses.replace(each, cells=(cell,), seconds=costs[cell.scheme.name])
        for each in plan.passes
        for cell in each.cells
    ]
    smaller, left = within(dataclasses.replace(plan, passes=tuple(passes), workers=1), 52.0)
    assert [cell.scheme.name for cell in left] == ["w3"]  # the baseline first, whatever it costs
    assert {cell.scheme.name for cell in smaller.missing} == {
        "full",
        "w4",
    } and smaller.evaluations == 2
    assert within(plan, 1e9) == (plan, ())
    summary = driver.run(sweep, display, budget_seconds=0.0)
    assert (
        summary.exit_code == 1
        and "budget" in summary.text
        and not any(record.complete for record in summary.records)
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("90min", 5400), ("8h", 28800), ("2d", 172800), ("1.5h", 5400)],
)
def test_times_are_written_as_people_do(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds
    with pytest.raises(ConfigError, match="is no time"):
        seconds_of(f"{text}x")


def test_an_interrupt_is_a_summary(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def act(plan: Any) -> Iterator[Event]:
        try:
            yield Progress(time.time(), (cell_key(plan.missing[0]),), "block", 1, 4)
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    script(monkeypatch, act)
    summary = driver.run(demo_sweep("method=rtn", "scheme=w4"))
    assert closed and summary.exit_code == 130 and "resume  harness run" in summary.text


def test_broken_tracking_never_stops_a_sweep(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(NullTracker):
        def cell(self, record: Any, state: str) -> None:
            raise RuntimeError("database is locked")

        def finish(self, files: Any, figures: Any, summary: str) -> str:
            raise TrackingError("the server is gone")

    monkeypatch.setattr(driver.mlflow_runs, "open_tracker", lambda sweep, text: Broken())
    summary = driver.run(demo_sweep("method=rtn", "scheme=w4", *SMALL))
    assert summary.exit_code == 0
    assert len(summary.warnings) == 2 and "harness publish" in summary.warnings[0]


def test_tracking_that_comes_back_is_told_everything(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down at the start, up later: cells of which it does not know are sent then, and an outage is not asked at every event."""
    told: dict[str, str] = {}
    tries: list[float] = []
    tried = threading.Event()

    class Patient(Silent):
        def event(self, event: Event, tally: Tally, finished: Any) -> None:
            assert tried.wait(600)  # tracking has its own thread; the sweep may be faster

    class Tracker(NullTracker):
        def cell(self, record: Any, state: str) -> None:
            told[record.cell_key] = state

        def finish(self, files: Any, figures: Any, summary: str) -> str:
            told["finish"] = summary
            return "#/experiments/1/runs/abc"

    def open_tracker(sweep: Sweep, text: str) -> Tracker:
        tries.append(time.monotonic())
        tried.set()
        if len(tries) == 1:
            raise TrackingError("no tracking server")
        return Tracker()

    monkeypatch.setattr(driver.mlflow_runs, "open_tracker", open_tracker)
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    summary = driver.run(sweep, Patient())
    # at the start and at the end, not in between
    assert len(tries) == 2 and len(summary.warnings) == 1
    assert {told[cell_key(cell)] for cell in sweep.cells} == {"done"} and "2 of 2 cells" in told[
        "finish"
    ]


def test_a_finished_sweep_names_the_page_that_mlflow_has_now(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody deleted the database and published the sweep again: the page that the run left is of the old one."""

    class Tracker(NullTracker):
        def finish(self, files: Any, figures: Any, summary: str) -> str:
            return "#/experiments/1/runs/old"

    monkeypatch.setattr(driver.mlflow_runs, "open_tracker", lambda sweep, text: Tracker())
    monkeypatch.setattr(
        driver.mlflow_runs, "tracked_page", lambda sweep: "#/experiments/1/runs/new"
    )
    sweep = demo_sweep("method=none", *SMALL)
    assert driver.run(sweep).page == "#/experiments/1/runs/old"
    for _ in range(2):
        assert driver.run(sweep).page == "#/experiments/1/runs/new"
    state = Store(sweep.runtime.runs).sweep_state(sweep.name)
    assert state is not None and state["page"] == "#/experiments/1/runs/new"


def test_a_server_that_took_nothing_is_not_named_as_a_place_to_look(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=none", "tracking=server", "tracking.uri=http://127.0.0.1:9")
    assert driver._browse(sweep, "") == []
    assert "http://127.0.0.1:9/#/x" in driver._browse(sweep, "#/x")[0]


def test_tables_follow_from_the_titles_of_methods_too(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    store = Store(sweep.runtime.runs)
    other = dataclasses.replace(sweep, method_titles={"rtn": "Rounding"})
    questions = []
    for each in (sweep, other):
        stamp = outputs.results_stamp(each, store)
        assert stamp is not None
        questions.append(outputs.tables_question(each, stamp))
    assert questions[0] != questions[1]


def test_a_record_in_full(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4", *SMALL)
    (record,) = [
        record for record in driver.run(sweep).records if not record.cell.method.is_baseline
    ]
    text = record_text(record, Store(sweep.runtime.runs), "harness run again")
    for words in (
        record.cell_key,
        "demo_perplexity/perplexity",
        "layer errors",
        "_proj",
        "damping",
        "made by",
        "run again",
    ):
        assert words in text


def harness(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "harness", *words]
    # What a shell starts in its background ignores interrupts; the process under test must not inherit that.
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in ten minutes"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


SWEEP_FILE = """\
# A sweep to be killed
model: demo
calibration: demo
calibration.samples: 8
grids:
  - method: [rtn, gptq]
    scheme: [w4, w3]
evaluations: [{demo_perplexity: {}}]
tables:
  - name: main
    columns:
      - {metric: checkpoint/bits_per_weight}
      - {metric: demo_perplexity/perplexity, digits: 6}
"""


COMMON = (
    "tracking=none",
    "device=cpu",
    "cluster=local",
    "cluster.workers=1",
    "evaluations.limit=8",
)


def run_here(sweep_file: Path, runs: Path) -> bytes:
    """The command in this process; the bytes of its table."""
    done = CliRunner().invoke(app, ["run", str(sweep_file), f"runs={runs}", *COMMON])
    assert done.exit_code == 0, done.output
    return (runs / "tables" / "killed" / "main.md").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of the sweep that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "killed.yaml").write_text(SWEEP_FILE)
    return run_here(folder / "killed.yaml", folder / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_driver_loses_nothing(
    tmp_path: Path, undisturbed: bytes, how: signal.Signals
) -> None:
    """Killed after its first score and run again, a sweep repeats no finished cell and makes the same table to the byte."""
    sweep_file, killed = tmp_path / "killed.yaml", tmp_path / "killed"
    sweep_file.write_text(SWEEP_FILE)
    with contextlib.ExitStack() as held:
        last = load_sweep(str(sweep_file), [f"runs={killed}", *COMMON]).cells[-1]
        # it cannot end before the signal comes
        held.enter_context(Store(killed).lock(f"cell-{cell_key(last)}"))
        process = harness("run", str(sweep_file), f"runs={killed}", *COMMON)
        wait_for(lambda: any(killed.glob("cells/*/scores/*.json")), process)
        process.send_signal(how)
        out, _ = process.communicate(timeout=300)
    if how != signal.SIGKILL:
        assert process.returncode == 130, out
        assert out.splitlines()[-1].startswith("resume  harness run"), out
    patterns = ("cells/*/scores/*.json", "checkpoints/*/manifest.json")
    finished = {
        path: path.stat().st_mtime_ns for pattern in patterns for path in killed.glob(pattern)
    }
    assert finished
    table = run_here(sweep_file, killed)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert table == undisturbed and b"3.2" in table


def test_the_command_of_a_record_makes_the_same_cell(demo_sweep: Make) -> None:
    import shlex

    from harness.config.reproduce import command_for

    changed = ("rounding.damping_fraction=0.05", "seed=3", "baseline=false")
    wanted = demo_sweep("method=gptq", "scheme=w4g32", *changed, *SMALL).cells[0]
    words = shlex.split(command_for(wanted))
    assert words[:2] == ["harness", "run"]
    assert cell_key(wanted) in map(cell_key, load_sweep(None, words[2:]).cells)


@pytest.mark.parametrize(
    "changes",
    [
        (
            "method=gptq",
            "scheme=w4",
            "rounding.damping_fraction=0.05,0.1",
            "seed=1,2",
        ),  # names with settings in brackets
        ("method=awq", "scheme=w3g32", "inputs=quantized"),  # not the method's own
        ("method=rtn", "scheme=w8a8", "scheme.activation.dynamic=false", "calibration=demo"),
        ("method=none", "evaluations.limit=5"),
        ("method=rtn", "scheme=w4", "evaluations=[{demo_facts: {num_fewshot: 2}}]"),
    ],
)
def test_the_command_of_a_record_makes_the_same_scores(
    demo_sweep: Make, changes: tuple[str, ...]
) -> None:
    import shlex

    from harness.config.reproduce import command_for
    from harness.core.cell import score_key

    own = (
        ()
        if any(change.startswith("evaluations=") for change in changes)
        else ("evaluations=demo_perplexity,demo_facts",)
    )
    wanted = demo_sweep(*changes, *own, "baseline=false").cells[-1]
    command = command_for(wanted)
    assert command.startswith("harness run "), command
    (made,) = load_sweep(None, [*shlex.split(command)[2:], "baseline=false"]).cells
    assert cell_key(made) == cell_key(wanted)
    assert [score_key(made, e) for e in made.evaluations] == [
        score_key(wanted, e) for e in wanted.evaluations
    ]


def test_tracking_is_told_which_answers_changed(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a cell that was done before its baseline was scored."""
    told: list[tuple[str, dict[str, float]]] = []

    class Told(NullTracker):
        def cell(self, record: Any, state: str) -> None:
            told.append((record.cell_key, record.metrics()))

    monkeypatch.setattr(driver.mlflow_runs, "open_tracker", lambda sweep, text: Told())
    alone = demo_sweep(
        "method=rtn", "scheme=w3", "baseline=false", "evaluations=demo_facts", "evaluations.limit=8"
    )
    driver.run(alone)
    assert told and not any("demo_facts/flips" in metrics for _, metrics in told)
    driver.run(
        demo_sweep("method=rtn", "scheme=w3", "evaluations=demo_facts", "evaluations.limit=8")
    )
    cell = next(cell for cell in alone.cells)
    assert "demo_facts/flips" in [metrics for key, metrics in told if key == cell_key(cell)][-1]
