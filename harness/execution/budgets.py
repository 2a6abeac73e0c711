"""Bit budgets of a sweep between its runs: allocation tasks on the sweep's executor, and the verdicts once all is scored."""

from __future__ import annotations

import time
from collections.abc import Iterator

from harness.core.events import Allocated, Event, Failed
from harness.core.sweep import Sweep, command_line
from harness.execution import provenance
from harness.execution.dispatch import make_executor
from harness.execution.executors.base import Exit
from harness.execution.tasks import AllocateTask
from harness.planning.resources import count_workers
from harness.reporting.budgets import BudgetRow, budget_rows
from harness.storage.budgets import unfinished
from harness.storage.store import Store


def allocate(
    sweep: Sweep, store: Store, command: str = "", seconds: float | None = None
) -> Iterator[Event]:
    """Choose and measure for every budget whose candidates are made; yields Allocated and Failed events.

    It ends where the sweep is cancelled, and after this many seconds. Closing the generator ends all tasks; what they measured
    is in the store. Raises ScheduleError where no worker can run.
    """
    ends = time.monotonic() + seconds if seconds is not None else float("inf")
    budgets = list(unfinished(sweep, store))
    if not budgets:
        return
    runtime = sweep.runtime
    executor = make_executor(runtime, count_workers(runtime))
    typed = command or provenance.typed_command()
    running: dict[int, str] = {}
    try:
        number = 0
        while budgets or running:
            while budgets and len(running) < max(1, executor.worker_slots):
                budget = budgets.pop(0)
                task = AllocateTask(
                    budget,
                    sweep.name,
                    str(runtime.runs),
                    command_line(sweep),
                    runtime.device,
                    executor.threads,
                    typed,
                    executor.gpu_fraction,
                )
                executor.submit(number, task)
                running[number], number = budget.name, number + 1
            if store.is_cancelled(sweep.name) or time.monotonic() >= ends:
                return
            for message in executor.wait():
                if isinstance(message.news, Exit):
                    name = running.pop(message.number)
                    end = message.news
                    if end.kind is not None:
                        yield Failed(
                            time.time(), (), f"budget {name}", end.kind, end.reason, end.detail
                        )
                elif isinstance(message.news, Allocated | Failed):
                    yield message.news
    finally:
        executor.close()


def settle(sweep: Sweep, store: Store) -> tuple[BudgetRow, ...]:
    """The rows of all budgets, with their verdicts written to their files."""
    rows = budget_rows(sweep, store)
    for row in rows:
        if row.content is not None and row.content.get("verdict") != row.verdict_record():
            content = {**row.content, "verdict": row.verdict_record()}
            store.write_budget(sweep.name, row.name, content)
    return tuple(rows)
