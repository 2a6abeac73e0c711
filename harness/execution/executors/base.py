"""What every executor offers the scheduler: slots, GPUs, messages, and the environment of a worker process."""

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
    """News of one task: an event, or its end."""

    number: int
    news: Event | Exit


class Executor(Protocol):
    """Runs tasks somewhere. slots: how many at once; threads: CPU threads of each (0: as they are); share: of a GPU (0: none).

    slots is 0 while no node can take a task. most: GPUs that one task can have, which are those of the largest node; 0 where tasks
    use none.
    """

    slots: int
    threads: int
    share: float
    most: int

    def width(self, gpus: float) -> int:
        """Slots that a task takes which asks for so many GPUs; 0: the share that every task has."""
        ...

    def submit(self, number: int, task: Task) -> None: ...

    def waits(self, number: int) -> bool:
        """Whether a submitted task has no slot yet, so that taking it back costs nothing."""
        ...

    def wait(self) -> list[Message]:
        """News of the running tasks, waiting for some for at most POLL_SECONDS."""
        ...

    def cancel(self, number: int) -> None:
        """End a task's process; no more news of it will come."""
        ...

    def close(self) -> None:
        """End whatever still runs, and leave no process behind."""
        ...


POLL_SECONDS = 1.0  # how long an executor waits for events before deadlines are looked at
RETURN_SECONDS = (
    600.0  # for a lost head, or for nodes that could take what no node can, to come back
)


def gpus_of(task: Task) -> float:
    """GPUs that a task takes: several whole ones, or its share of one."""
    devices = getattr(task, "devices", 1)
    return float(devices) if devices > 1 else task.share


def process_environment(threads: int) -> dict[str, str]:
    """Environment of a worker process; must be set before torch is loaded."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a task without a GPU must not see all of them
    }
