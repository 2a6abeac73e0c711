"""Tracking in its own thread: slow or down, it it delays nobody, and receives everything in the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from harness.tracking import background
from harness.tracking.background import BackgroundTracker
from harness.tracking.tracker import Tracker


class Server:
    """A tracker that answers when it is let."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str]] = []
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
        self.received.append((key, state))

    def progress(self, text: str) -> None:
        self.said.append(text)

    def usage(self, key: str, facts: Any) -> None:
        self.used[key] = facts


def make(server: Server, warnings: list[str]) -> BackgroundTracker:
    def send(tracker: Any, key: str, state: str) -> None:
        tracker.cell(key, state)

    return BackgroundTracker(
        lambda: cast(Tracker, server),
        send,
        lambda: "1 of 2 cells done",
        lambda error: warnings.append(str(error)),
    )


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_server_that_hangs_holds_up_nobody() -> None:
    """Sixteen workers' news while the server answers nothing: noting them costs a thousandth of the time that they stand for."""
    server = Server()
    tracker = make(server, [])
    tracker.note("first", "quantizing")
    assert server.busy.wait(300)
    began = time.process_time()
    for number in range(16_000):  # an hour of 16 workers with a piece of news every 3.6 s
        tracker.note(f"cell-{number % 16}", "done")
        tracker.use(f"cell-{number % 16}", {"cpu_percent": 100.0})
    assert time.process_time() - began < 0.001 * 3600
    server.free.set()
    finished: list[Any] = []
    assert tracker.end(finished.append) and finished == [server]
    # the latest state of each cell, once
    assert server.received[0] == ("first", "quantizing") and len(server.received) == 17
    assert {state for _, state in server.received[1:]} == {"done"}


def test_a_server_that_never_answers_ends_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    tracker = make(server, [])
    tracker.note("first", "done")
    assert server.busy.wait(300)
    monkeypatch.setattr(background, "PATIENCE_SECONDS", 0.05)
    finished: list[Any] = []
    assert not tracker.end(finished.append) and not finished
    server.free.set()


def test_a_failed_send_is_repeated_after_a_pause_and_progress_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(background, "PROGRESS_SECONDS", 0.0)
    server, warnings = Server(), list[str]()
    server.fails = 2
    server.free.set()
    tracker = make(server, warnings)
    tracker.use("first", {"memory_megabytes": 5.0})
    tracker.note("first", "evaluating")
    wait_for(lambda: bool(server.received) and bool(server.used))
    assert warnings == ["the server is down"] * 2 and server.received == [("first", "evaluating")]
    assert server.said[0] == "1 of 2 cells done" and server.used == {
        "first": {"memory_megabytes": 5.0}
    }
    assert tracker.end(lambda tracker: None)
