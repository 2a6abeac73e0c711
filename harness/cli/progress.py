"""The output of a running sweep in the shell. Loads without torch.

`show_events` chooses a live view for a terminal and plain lines for a pipe or a log; both print a line per finished or failed cell.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from harness.core.events import Event, Failed, Joined, Quantized, TaskStarted, Turn
from harness.core.failures import with_remedy
from harness.core.units import duration
from harness.execution.progress import Display, Tally

SHOWN_AT_ONCE = 8  # running cells in the live view
SHOWN_METRICS = 6  # on a cell's line


class Lines:
    """A line per checkpoint, finished cell and failure: for pipes and logs."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
        for line in news(event, tally, finished):
            self.line(line)

    def close(self) -> None:
        pass


class Live:
    """The same lines, and below them a progress bar, the remaining time and the cells that run."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._console = Console(highlight=False)
        self._live = RichLive("", console=self._console, refresh_per_second=8, transient=True)
        self._live.start()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
        self._live.start()  # a sweep with budgets runs more than once
        for line in news(event, tally, finished):
            self.line(line)
        self._live.update(self._view(tally))

    def _view(self, tally: Tally) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        bar = Table.grid(padding=(0, 2))
        left = tally.seconds_left
        remaining = f"{duration(left)} left" if left is not None else ""
        failed = f"{len(tally.failed)} failed" if tally.failed else ""
        done = f"{len(tally.done)} of {len(tally.pending)} cells"
        bar.add_row(
            ProgressBar(total=1.0, completed=tally.fraction, width=30), done, remaining, failed
        )
        rows = Table.grid(padding=(0, 2))
        for key, step in list(tally.running.items())[-SHOWN_AT_ONCE:]:
            rows.add_row(f"  {tally.cells[key].title}", f"{step.stage} {step.step}/{step.steps}")
        return Group(bar, rows)

    def close(self) -> None:
        self._live.stop()


def show_events() -> Display:
    """A live view where the output is a terminal, else lines."""
    return Live() if sys.stdout.isatty() else Lines()


def news(event: Event, tally: Tally, finished: Sequence[str]) -> list[str]:
    """The lines to print for an event; none for most."""
    lines = []
    if isinstance(event, Quantized):
        for key in event.cell_keys:
            if (
                key in tally.cells
                and not tally.cells[key].method.is_baseline
                and key not in finished
            ):
                bits, seconds = (
                    event.record.get("bits_per_weight", 0.0),
                    event.record.get("seconds", 0.0),
                )
                lines.append(
                    f"made    {tally.cells[key].title}    {bits:.2f} bits per weight in {seconds:.1f} s"
                )
    if isinstance(event, Failed):
        for key in event.cell_keys:
            title = tally.cells[key].title if key in tally.cells else key[:12]
            if event.retry:
                lines.append(
                    f"retry   {title}    {event.stage}: {event.reason}; {event.kind.retried}"
                )
            else:
                reason = with_remedy(event.reason, event.kind)
                lines.append(
                    f"FAIL    {title}    {event.stage}: {reason}    harness show {key[:8]}"
                )
    if isinstance(event, Turn):
        lines.append(
            f"waiting: {event.behind} has a higher priority; running tasks finish, no other task starts "
            f"(own priority {event.priority})"
            if event.behind
            else f"resumed: no sweep of a higher priority is waiting (own priority {event.priority})"
        )
    if isinstance(event, Joined):
        lines.append(f"ray     dashboard http://{event.dashboard}")
    if isinstance(event, TaskStarted) and event.device not in ("", "cpu"):
        lines.append(f"start   {event.worker} on {event.device}")
    lines += [
        f"  ok    {tally.cells[key].title}    {short_metrics(tally.metrics.get(key, {}))}"
        for key in finished
    ]
    return lines


def short_metrics(metrics: Mapping[str, float]) -> str:
    """The first few metrics on one line."""
    shown = [f"{name} {value:.4g}" for name, value in list(metrics.items())[:SHOWN_METRICS]]
    return "  ".join(shown) + (
        f"  and {len(metrics) - SHOWN_METRICS} more" if len(metrics) > SHOWN_METRICS else ""
    )
