"""The state of a sweep while it runs, as other processes see it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

from harness.storage.locks import Owner
from harness.storage.store import Store

SILENT_SECONDS = 600.0  # without a write, after which the driver of another host counts as ended


class SweepState:
    """The progress of one running sweep, stored in runs/sweeps/<name>.json for `harness status`.

    States of a cell: waiting, quantizing, evaluating, done, failed, refused.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        titles: Mapping[str, str],
        title: str = "",
        interval_seconds: float | None = None,
        command: str = "",
    ) -> None:
        """titles: cell_key -> title, in the sweep's order; command: what goes on with the sweep."""
        self.store, self.name = store, name
        self.interval_seconds = (
            store.files.state_seconds if interval_seconds is None else interval_seconds
        )
        self.content: dict[str, Any] = {
            "name": name,
            "title": title,
            "command": command,
            "owner": dataclasses.asdict(Owner.current()),
            "started": time.time(),
            "updated": time.time(),
            "ended": None,
            "cells": {
                key: {"title": cell_title, "state": "waiting"} for key, cell_title in titles.items()
            },
        }
        self._saved = -math.inf
        self.save()

    def update(self, cell_key: str, state: str, **facts: Any) -> None:
        """Set a cell's state and its facts (stage, step, steps, reason, metrics); written at most every interval_seconds."""
        title = self.content["cells"].get(cell_key, {}).get("title", "")
        self.content["cells"][cell_key] = {"title": title, "state": state, **facts}
        if time.monotonic() - self._saved >= self.interval_seconds:
            self.save()

    def end(self) -> None:
        self.content["ended"] = time.time()
        self.save()

    def save(self) -> None:
        self.content["updated"] = time.time()
        self.store.write_sweep_state(self.name, self.content)
        self._saved = time.monotonic()


def is_running(state: Mapping[str, Any]) -> bool:
    """Whether the process that writes a sweep's state lives. Of a process on another host that is known from its writes only."""
    owner = Owner(**state["owner"])
    silent = not owner.is_here and time.time() - state["updated"] > SILENT_SECONDS
    return state.get("ended") is None and not owner.is_dead and not silent
