"""Runs tasks one after the other in this process: no start-up time, and breakpoints of a debugger work."""

from __future__ import annotations

from collections.abc import Iterator

from harness.core.events import Event
from harness.execution import worker
from harness.execution.executors.base import Exit, Message
from harness.execution.tasks import Task


class InProcess:
    """Runs one task after the other in this process. max_gpus: GPUs that a task can have."""

    worker_slots = 1
    threads = 0
    gpu_fraction = 1.0

    def __init__(self, max_gpus: int = 0) -> None:
        self.max_gpus = max_gpus
        self._current: tuple[int, Iterator[Event]] | None = None

    def width(self, gpus: float) -> int:
        return 1

    def submit(self, number: int, task: Task) -> None:
        self._current = number, worker.run(task)

    def waits(self, number: int) -> bool:
        return False

    def wait(self) -> list[Message]:
        if self._current is None:
            return []
        number, stream = self._current
        event = next(stream, None)
        if event is not None:
            return [Message(number, event)]
        self._current = None
        return [Message(number, Exit())]

    def cancel(self, number: int) -> None:
        self.close()

    def close(self) -> None:
        if self._current is not None:
            close = getattr(self._current[1], "close", None)
            self._current = None
            if close is not None:
                close()
