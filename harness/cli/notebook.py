"""The output of a sweep in a notebook: a live bar with the cells that run, and texts that show themselves. Loads without torch."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Sequence
from typing import Any

from harness.cli.progress import SHOWN_AT_ONCE, Lines, news
from harness.core.events import Event
from harness.core.units import duration
from harness.execution.progress import Display, Tally

SECONDS = 0.25  # between two updates of the bar: a page redraws itself at each


class Text(str):
    """A text that a notebook and Python's prompt show with its lines, not as a quoted string."""

    def __repr__(self) -> str:
        return str(self)


class Bar:
    """Lines as in the shell, and below them a bar, the remaining time and the running cells, updated in place."""

    def __init__(self) -> None:
        from IPython.display import display

        self._handle: Any = display(_Markup(""), display_id=True)
        self._shown = 0.0

    def line(self, text: str) -> None:
        print(text, flush=True)

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
        for line in news(event, tally, finished):
            self.line(line)
        if finished or time.monotonic() - self._shown >= SECONDS:
            self._show(bar(tally))

    def close(self) -> None:
        self._show("")

    def _show(self, markup: str) -> None:
        self._shown = time.monotonic()
        self._handle.update(_Markup(markup))


class _Markup:
    """HTML that a notebook shows as such; nothing elsewhere."""

    def __init__(self, markup: str) -> None:
        self._markup = markup

    def __repr__(self) -> str:
        return ""

    def _repr_html_(self) -> str:
        return self._markup


def bar(tally: Tally) -> str:
    """A bar of the share that is done, counts, the remaining time, and the cells that run, as HTML."""
    left = tally.seconds_left
    words = [f"{len(tally.done)} of {len(tally.pending)} cells"]
    words += [f"{duration(left)} left"] if left is not None else []
    words += [f"{len(tally.failed)} failed"] if tally.failed else []
    running = "".join(
        f"<div>{html.escape(tally.cells[key].title)}: {html.escape(step.stage)} {step.step}/{step.steps}</div>"
        for key, step in list(tally.running.items())[-SHOWN_AT_ONCE:]
        if key in tally.cells
    )
    return (
        f'<progress max="1" value="{tally.fraction:.4f}" style="width:20em"></progress> '
        f"{html.escape(' · '.join(words))}{running}"
    )


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython is asked only where something else has loaded it."""
    loaded = sys.modules.get("IPython")
    shell = loaded.get_ipython() if loaded is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None


def api_display() -> Display:
    """What `harness.run` shows: a live bar in a notebook, plain lines elsewhere."""
    return Bar() if in_notebook() else Lines()
