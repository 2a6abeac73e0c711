"""Tracking in a thread of its own: a server that is slow or down holds up neither tasks nor the driver. Loads without MLflow.

What is to be told waits here by cell, the latest state of each; the records themselves are in the store, and `harness publish`
sends them at any time. A tracker that fails is left alone for PAUSE_SECONDS and then told everything that it has missed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

log = logging.getLogger(__name__)

PAUSE_SECONDS = 60.0  # after tracking failed
PROGRESS_SECONDS = 15.0  # between two words on how far the sweep is
PATIENCE_SECONDS = 300.0  # at the end, for one more cell to be told
END_SECONDS = 1800.0  # at the end, for all of them


class Tracker(Protocol):
    """What the thread needs of a tracker (see `tracking.Tracker`)."""

    def progress(self, text: str) -> None: ...

    def usage(self, cell_key: str, facts: Mapping[str, float]) -> None: ...


class BackgroundTracker:
    """open: makes the tracker; tell: sends one cell in a state; progress: how far the sweep is; warn: is told of failures.

    All of them are called in this thread alone.
    """

    def __init__(
        self,
        open: Callable[[], Any],
        tell: Callable[[Any, str, str], None],
        progress: Callable[[], str],
        warn: Callable[[Exception], None],
    ) -> None:
        self._open, self._tell, self._progress, self._warn = open, tell, progress, warn
        self._news = threading.Condition()
        self._untold: dict[str, str] = {}
        self._usage: dict[str, Mapping[str, float]] = {}
        self._finish: Callable[[Any], None] | None = None
        self._ending = False
        self._tracker: Any = None
        self._tell_after = self._progress_after = 0.0
        self._told = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def note(self, key: str, state: str) -> None:
        """A cell has a new state."""
        with self._news:
            self._untold[key] = state
            self._news.notify()

    def use(self, key: str, facts: Mapping[str, float]) -> None:
        """What the worker of a cell takes now."""
        with self._news:
            self._usage[key] = facts

    def end(self, finish: Callable[[Any], None]) -> bool:
        """Tell what is untold, then `finish` with the tracker; False where that did not come to its end in a bounded time."""
        with self._news:
            self._finish, self._ending = finish, True
            self._tell_after, self._told = 0.0, time.monotonic()
            self._news.notify()
        ends = time.monotonic() + END_SECONDS
        while self._thread.is_alive() and time.monotonic() < min(
            ends, self._told + PATIENCE_SECONDS
        ):
            self._thread.join(0.2)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._ending and (
                    not self._untold or time.monotonic() < self._tell_after
                ):
                    self._news.wait(1.0)
                    if (
                        time.monotonic() >= max(self._progress_after, self._tell_after)
                        and self._tracker is not None
                    ):
                        break
                ending = self._ending
            self._tell_all()
            if ending:
                self._guard(self._close)
                return

    def _tell_all(self) -> None:
        if self._tracker is None:
            self._guard(self._join)
        while self._tracker is not None:
            with self._news:
                if not self._untold:
                    break
                key, state = next(iter(self._untold.items()))
            if not self._guard(lambda key=key, state=state: self._tell(self._tracker, key, state)):  # type: ignore[misc]
                break
            self._told = time.monotonic()
            with self._news:
                if self._untold.get(key) == state:
                    del self._untold[key]  # else it has a newer one
            self._say()  # even where news come faster than they are told
        if self._tracker is None or self._untold:
            self._tell_after = time.monotonic() + PAUSE_SECONDS
        else:
            self._say()

    def _say(self) -> None:
        if not self._ending and time.monotonic() >= self._progress_after:
            self._progress_after = time.monotonic() + PROGRESS_SECONDS
            self._guard(self._tell_progress)

    def _join(self) -> None:
        self._tracker = self._open()

    def _close(self) -> None:
        if self._tracker is not None and self._finish is not None:
            self._finish(self._tracker)

    def _tell_progress(self) -> None:
        with self._news:
            usage, self._usage = self._usage, {}
        self._tracker.progress(self._progress())
        for key, facts in usage.items():
            self._tracker.usage(key, facts)

    def _guard(self, work: Callable[[], None]) -> bool:
        """What fails here is told and stops nothing."""
        try:
            work()
            return True
        except Exception as error:  # tracking must never end a sweep, whatever its libraries raise
            log.warning("tracking failed", exc_info=error)
            self._warn(error)
            return False
