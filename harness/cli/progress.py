"""The output of a running sweep in the shell. Loads without torch.

`show_events` chooses a live view for a terminal and plain lines for a pipe or a log; both print a line per finished or failed cell.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.events import Event, Failed, Joined, Quantized, TaskStarted, Turn
from harness.core.failures import with_remedy
from harness.core.text import short_list
from harness.core.units import duration
from harness.execution.progress import Display, Tally

if TYPE_CHECKING:
    from rich.console import Console

    from harness.planning.plan import Plan

MANY_CELLS = 1000  # to do; above it `harness run` asks
PROGRESS_SECONDS = 180.0  # between two lines on the progress, where the output is no terminal
STYLES = {
    "ok": "green",
    "FAIL": "bold red",
    "retry": "yellow",
    "warning": "yellow",
    "done": "green",
}
SHOWN_AT_ONCE = 8  # running cells in the live view
SHOWN_METRICS = 6  # on a cell's line


class Lines:
    """A line per checkpoint, finished cell and failure, and every few minutes one on the progress: for pipes and logs."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def line(self, text: str) -> None:
        print(text, flush=True)

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
        for line in news(event, tally, finished):
            self.line(line)
        if time.monotonic() - self._said >= PROGRESS_SECONDS:
            self._said = time.monotonic()
            self.line(progress_line(tally))

    def interrupted(self) -> None:
        _answer_interrupt()

    def close(self) -> None:
        pass


def progress_line(tally: Tally) -> str:
    """How far a run is: cells, share of the work, time left, and what runs now."""
    words = [f"{len(tally.done)} of {len(tally.pending)} cells", f"{tally.fraction:.0%}"]
    words += [f"{len(tally.failed)} failed"] if tally.failed else []
    left = tally.seconds_left
    words += [f"{duration(left)} left"] if left is not None else []
    running = [
        f"{tally.cells[key].title} ({step.stage} {step.step}/{step.steps})"
        for key, step in tally.running.items()
    ]
    words += [short_list(running, 2)] if running else []
    return f"at {time.strftime('%H:%M')} {' · '.join(words)}"


def _answer_interrupt() -> None:
    """Say at once that Ctrl-C arrived. os.write, because a signal may come while Python's own buffers are written."""
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopping: running tasks end, finished work stays (Ctrl-C again: at once)\n")


class Live:
    """The same lines, and below them a progress bar, the remaining time and the cells that run."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._console = console or Console(highlight=False)
        self._live = RichLive("", console=self._console, refresh_per_second=8, transient=True)

    def line(self, text: str) -> None:
        from rich.text import Text

        styled = Text(text)
        word = text.split(maxsplit=1)[0] if text.strip() else ""
        start = text.find(word)
        styled.stylize(STYLES.get(word, ""), start, start + len(word))
        self._console.print(styled)  # wrapped between words

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
        for line in news(event, tally, finished):
            self.line(line)
        # not before: a question may be asked first; again after `close`: a sweep with budgets runs more than once
        self._live.start()
        self._live.update(self._view(tally))

    def interrupted(self) -> None:
        _answer_interrupt()

    def _view(self, tally: Tally) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 2))
        left = tally.seconds_left
        remaining = f"{duration(left)} left" if left is not None else ""
        failed = f"{len(tally.failed)} failed" if tally.failed else ""
        done = f"{len(tally.done)} of {len(tally.pending)} cells"
        for _ in range(4):
            bar.add_column(no_wrap=True)
        bar.add_row(
            ProgressBar(total=1.0, completed=tally.fraction, width=20),
            done,
            remaining,
            Text(failed, style=STYLES["FAIL"]),
        )
        rows = Table.grid(padding=(0, 2))
        rows.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        rows.add_column(no_wrap=True)
        for key, step in list(tally.running.items())[-SHOWN_AT_ONCE:]:
            rows.add_row(f"  {tally.cells[key].title}", f"{step.stage} {step.step}/{step.steps}")
        return Group(bar, rows)

    def close(self) -> None:
        self._live.stop()


def asks_for_large(plan: Plan) -> bool:
    """Whether to start: a person at a terminal is asked where a plan has more than MANY_CELLS cells to do."""
    if len(plan.missing) <= MANY_CELLS or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    answer = input(f"{len(plan.missing):,} cells are to do. Start? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def asks_nothing(plan: Plan) -> bool:
    """Start whatever the plan says (`--yes`)."""
    return True


def ssh_advice(environment: Mapping[str, str]) -> str:
    """What a person should know who starts a sweep over ssh outside of tmux and screen; "" for everyone else."""
    kept = {"TMUX", "STY"} & set(environment)
    if "SSH_CONNECTION" not in environment or kept or not sys.stdout.isatty():
        return ""
    return "note    the sweep ends with this ssh connection; start it inside tmux (tmux new -s sweep) to keep it running"


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
