"""Tracking in a thread of its own: a server that is slow or down delays neither tasks nor the driver. Loads without MLflow.

The latest state of every cell waits here until it is sent; the records themselves are in the store, and `harness publish` sends
them at any time. After a failure nothing is sent for PAUSE_SECONDS, and then everything that is still waiting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from harness.core.errors import HarnessError
from harness.tracking.tracker import Tracker

log = logging.getLogger(__name__)

PAUSE_SECONDS = 60.0  # after tracking failed
PROGRESS_SECONDS = 15.0  # between two reports of how far the sweep is
PATIENCE_SECONDS = 300.0  # at the end, for one more cell to be sent
END_SECONDS = 1800.0  # at the end, for all of them


class BackgroundTracker:
    """Sends cells to a tracker, in its own thread alone.

    open      makes the tracker
    send      (tracker, cell key, state): sends one cell in a state
    progress  returns how far the sweep is, in words
    warn      receives every failure
    """

    def __init__(
        self,
        open: Callable[[], Tracker],
        send: Callable[[Tracker, str, str], None],
        progress: Callable[[], str],
        warn: Callable[[Exception], None],
    ) -> None:
        self._open, self._send, self._progress, self._warn = open, send, progress, warn
        self._news = threading.Condition()
        self._unsent: dict[str, str] = {}
        self._usage: dict[str, Mapping[str, float]] = {}
        self._finish: Callable[[Tracker], None] | None = None
        self._ending = False
        self._tracker: Tracker | None = None
        self._send_after = self._progress_after = 0.0
        self._sent = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def note(self, key: str, state: str) -> None:
        """A cell has a new state."""
        with self._news:
            self._unsent[key] = state
            self._news.notify()

    def use(self, key: str, facts: Mapping[str, float]) -> None:
        """The resources that the worker of a cell takes now."""
        with self._news:
            self._usage[key] = facts

    def end(self, finish: Callable[[Tracker], None]) -> bool:
        """Send what is waiting, then call `finish` with the tracker; False where that was not complete in a bounded time."""
        with self._news:
            self._finish, self._ending = finish, True
            self._send_after, self._sent = 0.0, time.monotonic()
            self._news.notify()
        ends = time.monotonic() + END_SECONDS
        while self._thread.is_alive() and time.monotonic() < min(
            ends, self._sent + PATIENCE_SECONDS
        ):
            self._thread.join(0.2)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._ending and (
                    not self._unsent or time.monotonic() < self._send_after
                ):
                    self._news.wait(1.0)
                    if (
                        time.monotonic() >= max(self._progress_after, self._send_after)
                        and self._tracker is not None
                    ):
                        break
                ending = self._ending
            self._send_all()
            if ending:
                self._guard(self._close)
                return

    def _send_all(self) -> None:
        if self._tracker is None:
            self._guard(self._join)
        while (tracker := self._tracker) is not None:
            with self._news:
                if not self._unsent:
                    break
                key, state = next(iter(self._unsent.items()))
            if not self._guard(lambda key=key, state=state: self._send(tracker, key, state)):  # type: ignore[misc]
                break
            self._sent = time.monotonic()
            with self._news:
                if self._unsent.get(key) == state:
                    del self._unsent[key]  # else it has a newer one
            self._report_progress()  # even where news come faster than they are sent
        if self._tracker is None or self._unsent:
            self._send_after = time.monotonic() + PAUSE_SECONDS
        else:
            self._report_progress()

    def _report_progress(self) -> None:
        if not self._ending and time.monotonic() >= self._progress_after:
            self._progress_after = time.monotonic() + PROGRESS_SECONDS
            self._guard(self._send_progress)

    def _join(self) -> None:
        self._tracker = self._open()

    def _close(self) -> None:
        if self._tracker is not None and self._finish is not None:
            self._finish(self._tracker)

    def _send_progress(self) -> None:
        with self._news:
            usage, self._usage = self._usage, {}
        if self._tracker is not None:
            self._tracker.progress(self._progress())
            for key, facts in usage.items():
                self._tracker.usage(key, facts)

    def _guard(self, work: Callable[[], None]) -> bool:
        """Whether the work succeeded; a failure is reported and stops nothing."""
        try:
            work()
            return True
        except Exception as error:  # tracking must never end a sweep, whatever its libraries raise
            if not isinstance(error, HarnessError):  # a sentence of ours needs no traceback
                log.warning("tracking failed", exc_info=error)
            self._warn(error)
            return False
