"""The three kinds of task, and how tasks and events travel as JSON."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.core import events
from harness.core.budget import Budget
from harness.core.cell import Cell, Evaluation, from_json, to_json
from harness.core.events import Event


@dataclass(frozen=True)
class QuantizeTask:
    """Make the checkpoints of cells of one model and one draw of calibration windows in one pass.

    runs     the store: its folder or its URL
    device   "auto", "cpu", "cuda" or "cuda:<index>"
    threads  CPU threads of one operation; 0: as the process has them
    command  what the user typed, for the record
    gpu_fraction  of a GPU's memory that the process may allocate, 0 to 1
    """

    cells: tuple[Cell, ...]
    runs: str
    device: str = "auto"
    threads: int = 0
    command: str = ""
    gpu_fraction: float = 1.0


@dataclass(frozen=True)
class EvaluateTask:
    """Score cells of one model; evaluations[i] are those of cells[i]. Other fields as in `QuantizeTask`.

    batch_size  0: chosen by the evaluator
    devices  GPUs over which the model is spread where it is too large for one
    offload  its blocks stay in main memory and are copied to the GPU to run
    """

    cells: tuple[Cell, ...]
    evaluations: tuple[tuple[Evaluation, ...], ...]
    runs: str
    device: str = "auto"
    threads: int = 0
    batch_size: int = 0
    command: str = ""
    gpu_fraction: float = 1.0
    devices: int = 1
    offload: bool = False


@dataclass(frozen=True)
class AllocateTask:
    """Choose the cells of a bit budget of a sweep. again: the command that runs the sweep. Other fields as in `QuantizeTask`."""

    budget: Budget
    sweep: str
    runs: str
    again: str = ""
    device: str = "auto"
    threads: int = 0
    command: str = ""
    gpu_fraction: float = 1.0

    @property
    def cells(self) -> tuple[Cell, ...]:
        return self.budget.candidates


Task = QuantizeTask | EvaluateTask | AllocateTask
TASKS = {"quantize": QuantizeTask, "evaluate": EvaluateTask, "allocate": AllocateTask}


def encode(task: Task) -> dict[str, Any]:
    """A task as JSON values: what crosses to another process."""
    return {
        "kind": next(kind for kind, task_type in TASKS.items() if isinstance(task, task_type)),
        "task": to_json(task),
    }


def decode(data: Mapping[str, Any]) -> Task:
    """The inverse of `encode`."""
    return from_json(TASKS[data["kind"]], data["task"])


def encode_event(event: Event) -> dict[str, Any]:
    """An event as JSON values."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def decode_event(data: Mapping[str, Any]) -> Event:
    """The inverse of `encode_event`."""
    fields = {name: value for name, value in data.items() if name != "event"}
    return typing.cast(
        Event, getattr(events, data["event"])(**{**fields, "cell_keys": tuple(data["cell_keys"])})
    )
