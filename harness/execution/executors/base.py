"""The interface of executors for the scheduler: worker slots, GPUs, messages, and the environment of a worker process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from harness.core.events import Event
from harness.core.failures import FailureKind
from harness.execution.tasks import Task


@dataclass(frozen=True)
class Exit:
    """How a task's process ended. kind None is a normal end, else kind, reason and detail are those of `events.Failed`."""

    kind: FailureKind | None = None
    reason: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", None if self.kind is None else FailureKind(self.kind))


@dataclass(frozen=True)
class Message:
    """An event of one task, or how its process ended. number: of the task."""

    number: int
    news: Event | Exit


class Executor(Protocol):
    """Runs tasks.

    worker_slots  tasks that run at once; 0 while no node can run a task
    threads       CPU threads of each task; 0: as the process has them
    gpu_fraction  of one GPU that a task has, 0 to 1; 0: no GPU
    max_gpus      GPUs that one task can have, those of the largest node; 0 where tasks use no GPU
    """

    worker_slots: int
    threads: int
    gpu_fraction: float
    max_gpus: int

    def width(self, gpus: float) -> int:
        """Worker slots that a task with so many GPUs takes; gpus 0: the fraction that every task has."""
        ...

    def submit(self, number: int, task: Task) -> None: ...

    def waits(self, number: int) -> bool:
        """Whether a submitted task has no slot yet, so that its withdrawal loses no work."""
        ...

    def wait(self) -> list[Message]:
        """Messages of the running tasks; waits at most POLL_SECONDS for the first."""
        ...

    def cancel(self, number: int) -> None:
        """End a task's process; it sends no more messages."""
        ...

    def close(self) -> None:
        """End all tasks, and leave no process behind."""
        ...


POLL_SECONDS = 1.0  # that an executor waits for events before the time limits are checked
RETURN_SECONDS = 600.0  # that a run waits for a lost head, or for a node that can run its tasks


def gpus_of(task: Task) -> float:
    """GPUs that a task takes: a number of full GPUs, or its fraction of one."""
    devices = getattr(task, "devices", 1)
    return float(devices) if devices > 1 else task.gpu_fraction


def process_environment(threads: int) -> dict[str, str]:
    """Environment of a worker process; must be set before torch is loaded."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a task without a GPU must not see all GPUs
    }
