"""Events of a running sweep: small frozen facts that tasks yield, schedulers carry and drivers record.

Every event travels between processes as is (plain data, no tensors, no paths but strings).
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from harness.core.errors import HarnessError
from harness.core.failures import FailureKind, failure_kind
from harness.core.text import first_line


@dataclass(frozen=True)
class Event:
    """time: seconds since the epoch; cell_keys: the cells concerned (empty: the whole task)."""

    time: float
    cell_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskStarted(Event):
    """A process began a task. worker: host and process id; device: "cpu" or a card's name."""

    worker: str = ""
    device: str = ""


@dataclass(frozen=True)
class Joined(Event):
    """The cluster that takes the tasks. dashboard: HOST:PORT of its pages, "" where it has none."""

    dashboard: str = ""


@dataclass(frozen=True)
class Turn(Event):
    """The priority of the sweep on its store, or the driver that it waits for, has changed.

    behind  the driver with a higher priority whose tasks wait for slots, in words; "" for none
    """

    priority: int = 0
    behind: str = ""


@dataclass(frozen=True)
class Usage(Event):
    """What the process of a task takes now: cpu_percent, memory_megabytes, and gpu_memory_megabytes where it has a card."""

    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress(Event):
    """step of steps is done; stage names what is counted ("block", "wikitext2", …)."""

    stage: str = ""
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Quantized(Event):
    """One checkpoint is complete in the store; record holds sizes, timings, layer errors, provenance."""

    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored(Event):
    """One evaluation of one cell is complete in the store. metrics: name -> value, e.g. {"wikitext2/perplexity": 6.14}."""

    evaluation: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocated(Event):
    """A bit budget has its choice in the store. budget: its name with the size; record: the content of its file."""

    budget: str = ""
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed(Event):
    """One cell (or one evaluation of it) failed; the others of its task go on.

    stage   what was being done: "quantize", "evaluate", a block, an evaluation
    kind    a `FailureKind`; its value as a string is accepted, ValueError for any other
    reason  one line; detail: traceback or log tail
    retry   whether the scheduler retries the cells, as `kind.retried` says; else this failure is final
    """

    stage: str = ""
    kind: FailureKind = FailureKind.ERROR
    reason: str = ""
    detail: str = ""
    retry: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", FailureKind(self.kind))


@dataclass(frozen=True)
class TaskEnded(Event):
    """The task's generator is exhausted. seconds: wall time of the task; peak_memory_bytes: of its process or device."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


def failure(error: BaseException, cell_keys: tuple[str, ...], stage: str) -> Failed:
    """The Failed event of an exception: its kind, its message in one line, and the traceback as detail."""
    line = first_line(error)
    reason = line if isinstance(error, HarnessError) else f"{type(error).__name__}: {line}"
    detail = "".join(traceback.format_exception(error))
    return Failed(time.time(), cell_keys, stage, failure_kind(error), reason, detail)
