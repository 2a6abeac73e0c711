"""Drivers on one store: priorities, heartbeats, silence."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.execution import coordination
from harness.execution.coordination import Coordination
from harness.storage.files import LocalDisk
from harness.storage.store import Store


def test_drivers_tell_each_other_their_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalDisk, "state_seconds", 0.0)
    store = Store(tmp_path)
    with Coordination(store, "low") as low, Coordination(store, "high", 3) as high:
        low.refresh()
        assert low.behind == ""  # nothing of the other waits
        high.wants = True
        high._write()
        low.refresh()
        high.refresh()
        assert "sweep high (priority 3, process" in low.behind and high.behind == ""
        store.ask_priority("low", 5)
        low.refresh()
        assert low.priority == 5 and low.behind == ""
        content = store.drivers()[high._id]
        store.write_driver(
            "dead", {**content, "owner": {**content["owner"], "birth": "0"}, "priority": 9}
        )
        low.refresh()
        assert "dead" not in store.drivers() and low.behind == ""
    assert not store.drivers()


def test_a_silent_driver_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalDisk, "state_seconds", 0.0)
    with Coordination(Store(tmp_path), "a", 1) as other:
        content = {**Store(tmp_path).drivers()[other._id], "wants": True}
    monkeypatch.setattr(Store, "drivers", lambda self: {"other": content})
    clock = [0.0]
    monkeypatch.setattr(
        coordination, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time)
    )
    mine = Coordination(Store(tmp_path), "b")
    for now, blocked in (
        (0.0, True),
        (coordination.SILENT_SECONDS - 1, True),
        (coordination.SILENT_SECONDS + 1, False),
    ):
        clock[0] = now
        mine.refresh()
        assert bool(mine.behind) == blocked
