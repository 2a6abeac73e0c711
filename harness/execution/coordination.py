"""Coordination of the drivers on one store: heartbeats, priorities, waiting tasks, cancellations.

Each driver has one small file in the store (`runs/drivers/`) and rewrites it while it lives. While tasks of a driver wait for a
slot, drivers of a lower priority start no task and finish those that run. Running tasks never wait for a priority, and only running
tasks hold locks, so that no two drivers wait for each other. Clocks of machines are not compared: each reader measures with its own
clock how long a file has not changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import uuid
from typing import Any

from harness.core.errors import StoreError
from harness.storage.locks import Owner
from harness.storage.store import Store
from harness.storage.sweep_state import is_running

BEAT_SECONDS = 5.0  # between two heartbeats
SILENT_SECONDS = 60.0  # without a heartbeat, after which a driver blocks no other


class Coordination:
    """This driver among those on its store.

    priority   of its sweep, as the sweep or `harness prioritize` sets it
    behind     the driver with a higher priority that this one waits for, in words; "" for none
    cancelled  cell keys and sweep names that `harness cancel` wrote; is_cancelled: the sweep is one of them
    """

    def __init__(self, store: Store, sweep: str, priority: int = 0) -> None:
        self.priority, self.behind, self.cancelled = priority, "", frozenset[str]()
        self._store, self._sweep, self._id = store, sweep, uuid.uuid4().hex[:12]
        self._wants, self._beat, self._refreshed = False, 0, -float("inf")
        self._seen: dict[str, tuple[int, float]] = {}
        self._due, self._over = threading.Event(), threading.Event()
        self._owner = dataclasses.asdict(Owner.current())
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)

    def __enter__(self) -> Coordination:
        self.refresh()
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._due.set()
        self._thread.join()
        with contextlib.suppress(StoreError):
            self._store.remove_driver(self._id)

    @property
    def is_cancelled(self) -> bool:
        return self._sweep in self.cancelled

    @property
    def wants(self) -> bool:
        """Whether tasks of this driver wait for a slot: drivers of a lower priority then start no task."""
        return self._wants

    @wants.setter
    def wants(self, value: bool) -> None:
        if value != self._wants:
            self._wants = value
            self._due.set()

    def refresh(self) -> None:
        """Read what others have written, unless it was read recently. A store that does not answer changes nothing."""
        now = time.monotonic()
        if now - self._refreshed < self._store.files.state_seconds:
            return
        self._refreshed = now
        with contextlib.suppress(StoreError, OSError):
            self.cancelled = frozenset(self._store.cancelled_names())
            asked = self._store.asked_priority(self._sweep)
            if asked is not None and asked != self.priority:
                self.priority = asked
                self._due.set()
            self.behind = self._driver_ahead(now)

    def _driver_ahead(self, now: float) -> str:
        """The living driver of the highest priority above this one's whose tasks wait for slots, in words; "" for none."""
        first: dict[str, Any] | None = None
        for name, content in self._store.drivers().items():
            if name == self._id:
                continue
            if Owner(**content["owner"]).is_dead:
                self._store.remove_driver(name)
                continue
            beat, since = self._seen.get(name, (-1, now))
            if beat != content["beat"]:
                since = now
            self._seen[name] = content["beat"], since
            if (
                now - since < SILENT_SECONDS
                and content["wants"]
                and content["priority"]
                > max(self.priority, first["priority"] if first else self.priority)
            ):
                first = content
        if first is None:
            return ""
        owner = Owner(**first["owner"])
        return f"sweep {first['sweep']} (priority {first['priority']}, process {owner.pid} on {owner.host.partition('/')[0]})"

    def _live(self) -> None:
        while not self._over.is_set():
            self._due.wait(BEAT_SECONDS)
            self._due.clear()
            if not self._over.is_set():
                self._write()

    def _write(self) -> None:
        # A full store is reported where results are written.
        with self._writing, contextlib.suppress(StoreError):
            self._beat += 1
            self._store.write_driver(
                self._id,
                {
                    "sweep": self._sweep,
                    "priority": self.priority,
                    "wants": self._wants,
                    "behind": self.behind,
                    "beat": self._beat,
                    "owner": self._owner,
                    "updated": time.time(),
                },
            )


def active_drivers(store: Store) -> list[dict[str, Any]]:
    """The contents of the files of the running drivers on a store, highest priority first."""
    return sorted(
        (each for each in store.drivers().values() if is_running(each)),
        key=lambda each: -int(each["priority"]),
    )
