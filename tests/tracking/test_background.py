"""Tracking in its own thread: slow or down, it holds up nobody, and is told everything in the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from harness.tracking import background
from harness.tracking.background import BackgroundTracker


class Server:
    """A tracker that answers when it is let."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.used: dict[str, Any] = {}
        self.busy, self.free = threading.Event(), threading.Event()
        self.fails = 0

    def cell(self, key: str, state: str) -> None:
        self.busy.set()
        assert self.free.wait(600)
        if self.fails:
            self.fails -= 1
            raise OSError("the server is down")
        self.told.append((key, state))

    def progress(self, text: str) -> None:
        self.said.append(text)

    def usage(self, key: str, facts: Any) -> None:
        self.used[key] = facts


def make(server: Server, warnings: list[str]) -> BackgroundTracker:
    def tell(tracker: Server, key: str, state: str) -> None:
        tracker.cell(key, state)

    return BackgroundTracker(
        lambda: server, tell, lambda: "1 of 2 cells done", lambda error: warnings.append(str(error))
    )


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_server_that_hangs_holds_up_nobody() -> None:
    """Sixteen workers' news while the server answers nothing: noting them costs a thousandth of the time that they stand for."""
    server = Server()
    told = make(server, [])
    told.note("first", "quantizing")
    assert server.busy.wait(300)
    began = time.process_time()
    for number in range(16_000):  # an hour of 16 workers with a piece of news every 3.6 s
        told.note(f"cell-{number % 16}", "done")
        told.use(f"cell-{number % 16}", {"cpu_percent": 100.0})
    assert time.process_time() - began < 0.001 * 3600
    server.free.set()
    finished: list[Any] = []
    assert told.end(finished.append) and finished == [server]
    assert (
        server.told[0] == ("first", "quantizing") and len(server.told) == 17
    )  # the latest state of each cell, once
    assert {state for _, state in server.told[1:]} == {"done"}


def test_a_server_that_never_answers_ends_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    told = make(server, [])
    told.note("first", "done")
    assert server.busy.wait(300)
    monkeypatch.setattr(background, "PATIENCE_SECONDS", 0.05)
    finished: list[Any] = []
    assert not told.end(finished.append) and not finished
    server.free.set()


def test_what_failed_is_told_after_a_pause_and_progress_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(background, "PROGRESS_SECONDS", 0.0)
    server, warnings = Server(), list[str]()
    server.fails = 2
    server.free.set()
    told = make(server, warnings)
    told.use("first", {"memory_megabytes": 5.0})
    told.note("first", "evaluating")
    wait_for(lambda: bool(server.told) and bool(server.used))
    assert warnings == ["the server is down"] * 2 and server.told == [("first", "evaluating")]
    assert server.said[0] == "1 of 2 cells done" and server.used == {
        "first": {"memory_megabytes": 5.0}
    }
    assert told.end(lambda tracker: None)
