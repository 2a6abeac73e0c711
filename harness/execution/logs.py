"""Logs of cells, written to the store while their task runs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from harness.core.cell import Cell, cell_key
from harness.core.errors import StoreError
from harness.core.events import Event, Failed, Progress, Quantized, Scored, TaskStarted
from harness.storage.store import Store

LOG_SECONDS = 30.0  # after which logs are uploaded to an object store, at the latest


class _ToFiles(logging.Handler):
    """Passes each message of a logger, as one line, to a function."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(f"{record.levelname.lower()}  {record.getMessage()}")


class TaskLogs:
    """One log file per cell: every event of the cell, and all messages that the harness logs while its task runs."""

    def __init__(self, store: Store, cells: Iterable[Cell]) -> None:
        self._store = store
        self._paths = {cell_key(cell): store.log_path(cell_key(cell)) for cell in cells}
        self._uploaded = time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> TaskLogs:
        root = logging.getLogger("harness")
        handler = _ToFiles(lambda line: self._write(self._paths, line))
        root.addHandler(handler)
        self._stack.callback(self._upload)
        self._stack.callback(root.removeHandler, handler)
        with contextlib.suppress(StoreError):
            for path in self._paths.values():  # an earlier task, perhaps on another node, began it
                self._store.local(path)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def event(self, event: Event) -> None:
        line = describe(event)
        if line:
            self._write(event.cell_keys or self._paths, line)
        if (
            isinstance(event, Quantized | Scored | Failed)
            or time.monotonic() - self._uploaded > LOG_SECONDS
        ):
            self._upload()

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        with contextlib.suppress(StoreError):
            for path in self._paths.values():
                self._store.files.upload(path)

    def _write(self, keys: Iterable[str], line: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        for key in keys:
            with contextlib.suppress(OSError):  # a cell does not fail because of its log
                path = self._paths[key]
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"{stamp}  {line}\n")


def describe(event: Event) -> str:
    """The line of an event in a log; "" for an event without one."""
    match event:
        case Progress():
            return f"{event.stage} {event.step}/{event.steps}"
        case Quantized():
            bits, seconds = (
                event.record.get("bits_per_weight", 0.0),
                event.record.get("seconds", 0.0),
            )
            return f"quantized  {bits:.3f} bits per weight in {seconds:.1f} s"
        case Scored():
            return "scored  " + "  ".join(
                f"{name} {value:.6g}" for name, value in event.metrics.items()
            )
        case Failed():
            return f"FAILED in {event.stage} ({event.kind}): {event.reason}\n{event.detail}"
        case TaskStarted():
            return f"started on {event.worker}, {event.device}"
    return ""
