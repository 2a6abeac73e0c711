"""The driver: plan, run, record (`harness run` and `harness.run()`). The only writer of failures, sweep states and tracking.

Workers write checkpoints and scores to the store (`worker`); the driver turns their events into the state, the tracking and the
output of the running sweep. It may be killed at any moment: rerunning the same command continues from the contents of the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.cell import Cell, baseline_of, cell_key, digest
from harness.core.errors import HarnessError, PlanError, ScheduleError, StoreError, TrackingError
from harness.core.events import (
    Allocated,
    Event,
    Failed,
    Joined,
    Progress,
    Quantized,
    Scored,
    TaskStarted,
    Turn,
    Usage,
)
from harness.core.sweep import Sweep, command_line
from harness.core.text import first_line, without_password
from harness.core.units import counted, duration
from harness.evaluation.flips import with_flips
from harness.execution import budgets, dispatch, notify, outputs
from harness.execution.progress import Display, Silent, Tally
from harness.planning.plan import Plan
from harness.planning.planner import make, within
from harness.planning.render import render, require
from harness.reporting.budgets import BudgetRow
from harness.reporting.files import report_path, write_figures, write_report, write_tables
from harness.reporting.tables import build, build_all
from harness.storage.budgets import resolved, unfinished
from harness.storage.record import Record
from harness.storage.store import Store
from harness.storage.sweep_state import SweepState, is_running
from harness.tracking import mlflow_runs
from harness.tracking.background import BackgroundTracker
from harness.tracking.tracker import Tracker
from harness.tracking.ui import PORT, pages

if TYPE_CHECKING:
    import pandas


# stages of making a checkpoint, as `Progress` names them
MAKING = ("reduction", "learning", "block", "tuning")
log = logging.getLogger(__name__)

SHOWN_LEFT_OUT = 20  # cells without room in the budget that are listed
# of a sweep with bit budgets: choose, measure what a pass made, and one for what another driver did meanwhile
ROUNDS = 3
# between two reports of a running sweep; of its time at most
REPORT_SECONDS, REPORT_SHARE = (10.0, 0.02)


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    records   of all cells of the sweep
    failed    cell key -> reason
    files     the tables on disk, one per format
    stopped   why the run ended before the sweep was finished; "" where it was interrupted or is complete
    left_out  cells for which the budget had no room
    report    where the sweep's report lies
    page      of the sweep in MLflow, without the server's address
    budgets   the result of every bit budget, in words
    """

    plan: Plan
    records: tuple[Record, ...]
    failed: dict[str, str]
    seconds: float
    interrupted: bool = False
    files: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    stopped: str = ""
    left_out: int = 0
    report: str = ""
    page: str = ""
    budgets: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 when all cells are done, 1 when some failed or were left, 130 when interrupted or cancelled."""
        return 130 if self.interrupted else int(bool(self.failed or self.stopped or self.left_out))

    @property
    def text(self) -> str:
        """Counts of finished and failed cells, warnings, and in the last line the command to type next."""
        done = sum(record.complete for record in self.records)
        words = [f"{done} of {len(self.records)} cells"]
        if self.failed:
            words.append(f"{len(self.failed)} failed")
        words.append(f"{self.seconds:.0f} s")
        lines = [
            f"{'stopped' if self.interrupted or self.stopped else 'done'}    {' · '.join(words)}"
        ]
        lines += [f"reason  {self.stopped}"] if self.stopped else []
        lines += (
            [f"left    {self.left_out} cells, for which the budget has no room"]
            if self.left_out
            else []
        )
        lines += [f"budget  {text}" for text in self.budgets]
        lines += [f"warning {warning}" for warning in self.warnings]
        sweep = self.plan.sweep
        lines += [f"report  {self.report}"] if self.report else []
        if self.interrupted or done < len(self.records):
            return "\n".join([*lines, f"resume  {command_line(sweep)}"])
        if sweep.path is not None or not self.records:
            lines.append(f"next    {command_line(sweep, 'table')}")
        else:
            lines.append(f"next    harness show {self.records[-1].cell_key[:8]}{_runs(sweep)}")
        lines += _browse(sweep, self.page)
        return "\n".join(lines)


def run(
    sweep: Sweep,
    display: Display | None = None,
    command: str = "",
    budget_seconds: float | None = None,
    confirm: Callable[[Plan], bool] = lambda plan: True,
) -> Summary:
    """Run a sweep. Raises PlanError with all refusals before anything starts, ScheduleError when no worker can run its tasks.

    A KeyboardInterrupt, `harness cancel` and the end of the budget end all tasks and are named in the summary; complete results
    stay in the store. So do a store that cannot be written any more, because every other cell would fail too, and a cluster whose
    head does not come back.

    confirm: asked once, with the plan, before anything starts; where it returns False nothing does.

    Cells that a bit budget chooses are not known before its candidates are made: the sweep runs, its budgets choose, and it runs
    again with the cells that they added.
    """
    store, began, shown = Store(sweep.runtime.runs), time.monotonic(), display or Silent()
    summary, is_new = _run(resolved(sweep, store), shown, command, budget_seconds, confirm)
    if sweep.budgets:
        summary, chose = _with_budgets(sweep, store, summary, shown, command, began, budget_seconds)
        is_new = is_new or chose
    return _notified(summary) if is_new else summary


def _with_budgets(
    sweep: Sweep,
    store: Store,
    summary: Summary,
    shown: Display,
    command: str,
    began: float,
    budget_seconds: float | None,
) -> tuple[Summary, bool]:
    """The summary of a run after its bit budgets have chosen and their cells have run; and whether anything was chosen now."""
    faults: dict[str, str] = {}
    chose = False

    def left() -> float | None:
        return None if budget_seconds is None else budget_seconds - (time.monotonic() - began)

    for _ in range(ROUNDS):
        if faults or summary.interrupted or summary.stopped or not unfinished(sweep, store):
            break
        room = left()
        if room is not None and room <= 0:
            summary = dataclasses.replace(summary, stopped=_used_up(budget_seconds))
            break
        chose = True
        before = resolved(sweep, store)
        try:
            with _interrupts(getattr(shown, "interrupted", lambda: None)):
                for event in budgets.allocate(sweep, store, command, room):
                    shown.line(_allocation(event))
                    if isinstance(event, Failed):
                        faults[event.stage] = event.reason
        except KeyboardInterrupt:
            return dataclasses.replace(summary, interrupted=True), chose
        if store.is_cancelled(sweep.name):
            return dataclasses.replace(summary, interrupted=True), chose
        after = resolved(sweep, store)
        room = (
            left()
        )  # where the allocation left none, the run starts nothing and reports all the same
        room = None if room is None else max(0.0, room)
        again = (
            shown if len(after.cells) > len(before.cells) else Silent()
        )  # else only reports change
        try:
            summary, _ = _run(after, again, command, room)
        except PlanError:  # a size that no assembly has, of which the first plan could not be sure
            if not faults:
                raise
        if summary.stopped and room is not None and (left() or 0.0) <= 0:
            summary = dataclasses.replace(summary, stopped=_used_up(budget_seconds))
    rows = budgets.settle(sweep, store)
    waits = [row.name for row in rows if row.content is None and not faults]
    if waits and not summary.interrupted and not summary.stopped:
        faults |= {name: "its candidates are not all made" for name in waits}
    summary = dataclasses.replace(
        summary,
        failed=summary.failed | faults,
        seconds=time.monotonic() - began,
        budgets=tuple(f"{row.name}    {_result(row)}" for row in rows),
        warnings=(*summary.warnings, *(f"{name}: {reason}" for name, reason in faults.items())),
    )
    return summary, chose


def _used_up(budget_seconds: float | None) -> str:
    return f"the budget of {duration(budget_seconds)[2:]} is used up"


def _allocation(event: Event) -> str:
    """The line of an event of an allocation."""
    if isinstance(event, Allocated):
        found = event.record
        measured = found.get("divergence_made", found["divergence"])
        kl = "not measured" if measured is None else f"KL {measured:.4g}"
        return (
            f"chosen  {event.budget}    {found['bits'] / found['weights']:.3f} bits per weight, {kl}, "
            f"{counted(len(found['trials']), 'swap')} measured"
        )
    assert isinstance(event, Failed)
    return f"FAIL    {event.stage}: {event.reason}"


def _result(row: BudgetRow) -> str:
    """The outcome of one size of a bit budget, for the summary."""
    if row.content is None:
        return row.text
    return f"{row.bits:.3f} bits per weight    {row.text}" + (
        f"    answer: {row.answer.title}" if row.answer is not None else ""
    )


def _run(
    sweep: Sweep,
    display: Display,
    command: str,
    budget_seconds: float | None,
    confirm: Callable[[Plan], bool] = lambda plan: True,
) -> tuple[Summary, bool]:
    """One run of the cells that are known; and whether it started, not so where all was done before or it was not confirmed."""
    store, began = Store(sweep.runtime.runs), time.monotonic()
    plan = make(sweep, store)
    require(plan)
    left_out: tuple[Cell, ...] = ()
    if budget_seconds is not None:
        plan, left_out = within(plan, budget_seconds)
    text = render(plan)
    if left_out:
        room = f"no room in {duration(budget_seconds)[2:]}"
        shown = [f"left    {cell.title}: {room}" for cell in left_out[:SHOWN_LEFT_OUT]]
        more = len(left_out) - SHOWN_LEFT_OUT
        shown += [f"left    {more} more cells: {room}"] if more > 0 else []
        text = "\n".join([text, *shown])
    display.line(text)
    other = store.sweep_state(sweep.name)
    if not plan.missing and not left_out and other and other.get("tracked") == _tracked(sweep):
        now = outputs.written(sweep, store)
        untouched = outputs.is_untouched(other, now)
        page = str(other.get("page", "")) if untouched else _tracked_page(sweep)
        if page is not None:
            display.close()
            return _finished(plan, store, other, now, page, began), False
    if not confirm(plan):
        display.close()
        return Summary(plan, (), {}, 0.0, stopped="not confirmed; nothing was started"), False
    if plan.missing and other and is_running(other):
        display.line(
            f"note    process {other['owner']['pid']} runs this sweep too; the two processes share the work"
        )
    store.clear_cancelled([sweep.name, *map(cell_key, plan.missing)])
    store.clear_priority(sweep.name)
    recorder = _Recorder(plan, store, display, text)
    interrupted, stopped, begun = False, "", False
    try:
        with ExitStack() as stack:
            stop = stack.enter_context(_interrupts(getattr(display, "interrupted", lambda: None)))
            limit = (
                {}
                if budget_seconds is None
                else {"seconds": max(0.0, budget_seconds - (time.monotonic() - began))}
            )
            events = dispatch.run(plan, command, **limit)
            stack.callback(_close, events)
            for event in events:
                begun = True
                if isinstance(event, Failed):
                    store.check_writable()
                recorder.event(event)
                if stop.is_set():  # the exception was raised where it could not propagate
                    raise KeyboardInterrupt
                if sweep.runtime.fail_fast and recorder.tally.failed:
                    break
    except KeyboardInterrupt:
        interrupted = True
    except StoreError as error:  # all other cells would fail too
        stopped = str(error)
    except ScheduleError as error:
        stopped = str(error)
        if not begun:
            recorder.end(time.monotonic() - began, interrupted, stopped)
            raise
    finally:
        display.close()
    if store.is_cancelled(sweep.name):
        interrupted = True
    elif (
        budget_seconds is not None
        and time.monotonic() - began >= budget_seconds
        and recorder.tally.fraction < 1
    ):
        stopped = stopped or _used_up(budget_seconds)
    summary = dataclasses.replace(
        recorder.end(time.monotonic() - began, interrupted, stopped), left_out=len(left_out)
    )
    return summary, True


def _notified(summary: Summary) -> Summary:
    """The summary, of which `notify` was told; what it cannot be told becomes a warning."""
    sweep, target = summary.plan.sweep, summary.plan.sweep.runtime.notify
    if not target:
        return summary
    done = sum(record.complete for record in summary.records)
    state = (
        "stopped"
        if summary.interrupted or summary.stopped
        else "failed"
        if summary.failed
        else "done"
    )
    facts = {
        "text": f"harness: sweep {sweep.name} {state}: {done} of {len(summary.records)} cells done, {len(summary.failed)} failed",
        "sweep": sweep.name,
        "state": state,
        "cells": len(summary.records),
        "done": done,
        "failed": len(summary.failed),
        "seconds": round(summary.seconds),
        "resume": "" if state == "done" else command_line(sweep),
    }
    try:
        notify.send(target, facts)
    except notify.NotifyError as error:
        return dataclasses.replace(summary, warnings=(*summary.warnings, str(error)))
    return summary


def _finished(
    plan: Plan, store: Store, state: dict[str, Any], now: Mapping[str, Any], page: str, began: float
) -> Summary:
    """The summary of a sweep of which all is done and was sent before: its tables and its report may be older than its results."""
    sweep = plan.sweep
    records = _records(store, sweep)
    folder = store.root / "tables" / sweep.name
    files = [folder / f"{table.name}.md" for table in sweep.shown_tables]
    are_there = all(map(store.files.exists, [*files, report_path(sweep, store)]))
    if not (outputs.is_current(state, now) and are_there):
        made = build_all(sweep, records, store)
        write_tables(sweep, made, store)
        write_report(sweep, records, made, store)
    left = {**state, **now, "page": page}
    if not is_running(state) and left != state:
        store.write_sweep_state(sweep.name, left)
    report = store.where(report_path(sweep, store))
    return Summary(plan, records, {}, time.monotonic() - began, report=report, page=page)


@contextlib.contextmanager
def _interrupts(answer: Callable[[], None]) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM (of batch systems) raise KeyboardInterrupt and set the event, because a `__del__` swallows exceptions.

    answer: called at once, in the handler, so that a person sees that the signal arrived.
    """
    stop = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        if not stop.is_set():
            answer()
        stop.set()
        raise KeyboardInterrupt

    handled = (
        (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        else ()
    )
    before = {number: signal.getsignal(number) for number in handled}
    # nohup ignores them
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in taken:
            signal.signal(number, interrupt)
        yield stop
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _close(events: Iterator[Event]) -> None:
    close = getattr(events, "close", None)
    if close is not None:
        close()


class _Recorder:
    """Turns events into failures on disk, the state of the sweep, tracking and the output of the run."""

    def __init__(self, plan: Plan, store: Store, display: Display, plan_text: str) -> None:
        self.plan, self.store, self.display = plan, store, display
        self.tally = Tally(plan)
        self.warnings: list[str] = []
        # problems of scores that were shown: data have them in every cell
        self.noted: set[str] = set()
        self.cells = self.tally.cells
        waiting = {cell_key(cell) for cell in plan.missing}
        store.open_cells([self.cells[key] for key in sorted(waiting)])
        titles = {key: cell.title for key, cell in self.cells.items()}
        self.state = SweepState(
            store, plan.sweep.name, titles, plan.sweep.title, command=command_line(plan.sweep)
        )
        self.tracker = BackgroundTracker(
            lambda: mlflow_runs.open_tracker(plan.sweep, plan_text),
            self._send_cell,
            self._progress,
            self._warn,
        )
        self.dashboard = self.behind = ""
        self._report_after = 0.0
        self.done = {cell_key(cell) for cell in plan.done}
        # key of a baseline -> keys of the cells that are compared with it
        self.compared: dict[str, list[str]] = {}
        for key, cell in self.cells.items():
            self.compared.setdefault(cell_key(baseline_of(cell)), []).append(key)
        for cell in plan.done:
            self.state.update(cell_key(cell), "done")
            self.tracker.note(cell_key(cell), "done")
        self.state.save()

    def event(self, event: Event) -> None:
        """Record one event."""
        finished = self.tally.add(event)
        self.state.content["seconds_left"] = self.tally.seconds_left
        match event:
            case TaskStarted():
                for key in event.cell_keys:
                    self.tracker.note(
                        key,
                        "quantizing"
                        if "checkpoint" in self.tally.pending.get(key, ())
                        else "evaluating",
                    )
            case Usage():
                for key in event.cell_keys:
                    self.tracker.use(key, event.facts)
            case Turn():
                self.behind = event.behind
            case Joined():
                self.dashboard = event.dashboard
            case Progress():
                doing = "quantizing" if event.stage in MAKING else "evaluating"
                for key in event.cell_keys:
                    self.state.update(
                        key, doing, stage=event.stage, step=event.step, steps=event.steps
                    )
            case Quantized() | Scored():
                for key in event.cell_keys:
                    state = "done" if key in finished else "evaluating"
                    self.state.update(key, state)
                    self.tracker.note(key, state)
                self.done |= set(finished)
                # The items of a baseline add flips to cells that were done before it.
                for key in finished:
                    for other in self.done.intersection(self.compared.get(key, ())):
                        self.tracker.note(other, "done")
            case Failed() if not event.retry:
                failure = {
                    name: getattr(event, name) for name in ("stage", "kind", "reason", "detail")
                }
                for key in event.cell_keys:
                    self.store.write_failure(key, failure)
                    self.state.update(key, "failed", reason=event.reason)
                    self.tracker.note(key, "failed")
        self.display.event(event, self.tally, finished)
        if isinstance(event, Scored):
            self._note(event)
        if finished:
            self._refresh_report()

    def _note(self, event: Scored) -> None:
        """Show what a reader must know of a score, each sentence once in a run."""
        for sentence in event.record.get("problems", {}).get("sentences", ()):
            if sentence not in self.noted:
                self.noted.add(sentence)
                self.display.line(f"note    {sentence}")

    def end(self, seconds: float, interrupted: bool, stopped: str = "") -> Summary:
        """Write tables and figures, finish tracking, and return the summary."""
        sweep = self.plan.sweep
        shown = outputs.written(sweep, self.store).get("outputs")
        records = _records(self.store, sweep)
        for key in (
            {cell_key(cell) for cell in self.plan.missing}
            - set(self.tally.done)
            - set(self.tally.failed)
        ):
            self.tracker.note(key, "unfinished")
        failed = {key: event.reason for key, event in self.tally.failed.items()}
        self.display.line("write   tables, figures and the report")
        made = self._guard(lambda: build_all(sweep, records, self.store)) or {}
        paths = self._guard(lambda: write_tables(sweep, made, self.store)) or ()
        figures = self._guard(lambda: write_figures(sweep, records, self.store)) or ()
        summary = Summary(
            self.plan, records, failed, seconds, interrupted, paths, tuple(self.warnings), stopped
        )
        written = self._guard(lambda: write_report(sweep, records, made, self.store))
        report = "" if written is None else self.store.where(written)
        files = (*figures, *(() if written is None else (written,)))
        sent: list[str] = []
        if sweep.runtime.tracking.kind != "none":
            self.display.line("send    the last results to MLflow")
        if not self.tracker.end(
            lambda tracker: sent.append(tracker.finish(made, files, summary.text))
        ):
            self._warn(TrackingError("tracking did not accept all updates in time"))
        if not self.warnings:
            self.state.content["tracked"] = _tracked(sweep)
            self.state.content |= {**outputs.written(sweep, self.store), "outputs": shown}
        page = self.state.content["page"] = "".join(sent)
        with contextlib.suppress(StoreError):  # a full disk was reported before
            self.state.end()
        return dataclasses.replace(summary, warnings=tuple(self.warnings), report=report, page=page)

    def _send_cell(self, tracker: Tracker, key: str, state: str) -> None:
        record = self.store.record(self.cells[key])
        tracker.cell(with_flips(record, self.store) if state == "done" else record, state)

    def _refresh_report(self) -> None:
        """Write the report of the running sweep; without tests, which need the items of all cells."""
        began = time.monotonic()
        if began < self._report_after:
            return
        sweep = self.plan.sweep

        def write() -> None:
            records = _records(self.store, sweep)
            made = {table.name: build(sweep, table, records) for table in sweep.shown_tables}
            write_report(sweep, records, made, self.store, self._progress())

        self._guard(write)
        ended = time.monotonic()
        self._report_after = ended + max(REPORT_SECONDS, (ended - began) / REPORT_SHARE)

    def _progress(self) -> str:
        """How far the sweep is, for tracking and the report."""
        done, left = len(self.tally.done) + len(self.plan.done), self.tally.seconds_left
        words = [f"{done} of {len(self.cells)} cells done"]
        words += [f"{len(self.tally.failed)} failed"] if self.tally.failed else []
        words += [f"{duration(left)} left"] if left is not None else []
        words += [f"waiting for {self.behind}"] if self.behind else []
        words += [f"Ray's dashboard: http://{self.dashboard}"] if self.dashboard else []
        return ", ".join(words)

    def _guard(self, work: Callable[[], Any]) -> Any:
        """The result of `work`; an error becomes a warning, because the store has all results."""
        try:
            return work()
        except Exception as error:  # libraries of tables and figures may raise anything
            if not isinstance(error, HarnessError):
                log.warning("tables or figures failed", exc_info=error)
            self._warn(error)
            return None

    def _warn(self, error: Exception) -> None:
        """Print and collect a warning, each sentence once."""
        sentence = f"{first_line(error)}; the store has all results, `harness publish` sends them to tracking"
        if sentence not in self.warnings:
            self.warnings.append(sentence)
            self.display.line(f"warning {sentence}")


def _records(store: Store, sweep: Sweep) -> tuple[Record, ...]:
    now = store.snapshot(sweep.cells)
    return tuple(now.record(cell) for cell in sweep.cells)


def _tracked(sweep: Sweep) -> list[str]:
    """The tracking of a sweep as its state holds it: place, experiment, and a digest of the tracked cells."""
    tracking_ = sweep.runtime.tracking
    place = without_password(tracking_.uri)
    return [tracking_.kind, place, tracking_.experiment, digest(sorted(map(cell_key, sweep.cells)))]


def _tracked_page(sweep: Sweep) -> str | None:
    """The sweep's page where MLflow still has its runs, else None; where it does not answer, the run itself reports that."""
    try:
        return mlflow_runs.tracked_page(sweep)
    except TrackingError:
        return None


def _runs(sweep: Sweep) -> str:
    """The --runs option for a store other than ./runs."""
    runs = sweep.runtime.runs
    return "" if runs == Path("runs").absolute() else f" --runs {runs}"


def _browse(sweep: Sweep, page: str) -> list[str]:
    """The line that says where the results are to be looked at in a browser."""
    tracking = sweep.runtime.tracking
    if tracking.kind == "none":
        return []
    if tracking.kind == "server":
        if not page:  # the server took nothing; a warning says so
            return []
        return [f"browse  {without_password(pages(tracking.uri, page))}"]
    return [f"browse  harness ui{_runs(sweep)}   →   {pages(f'http://127.0.0.1:{PORT}', page)}"]


def frame(records: Iterable[Record]) -> pandas.DataFrame:
    """One row per cell: names, state, every metric by its full name, and the reason where it failed."""
    import pandas

    rows = []
    for record in records:
        state = "done" if record.complete else "failed" if record.failures else "missing"
        names = {
            "model": record.cell.model.name,
            "method": record.cell.method.name,
            "scheme": record.cell.scheme.name,
        }
        reason = (
            "" if record.complete or not record.failures else record.failures[-1].get("reason", "")
        )
        rows.append(
            {
                **names,
                "state": state,
                **record.metrics(),
                "failure": reason,
                "key": record.cell_key[:12],
            }
        )
    return pandas.DataFrame(rows)
