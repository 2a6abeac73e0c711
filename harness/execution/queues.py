"""The state of the scheduler: tasks that are queued, tasks that run, checkpoints that no pass has begun."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from harness.core.cell import Cell, Evaluation, Model

Pair = tuple[Cell, tuple[Evaluation, ...]]


@dataclass(frozen=True)
class PassTask:
    """Checkpoints to make in one pass, which take about disk_bytes.

    losses          nodes that were lost while they ran it
    tried           an earlier process of it died
    exclusive       no other task may run at the same time
    needs_full_gpu  it takes a GPU of its own where tasks share GPUs
    pool            the pool that it was cut from, to which it returns if it is withdrawn; None: it was queued again as it is
    """

    cells: tuple[Cell, ...]
    priority_tier: int = 0
    disk_bytes: int = 0
    losses: int = 0
    tried: bool = False
    exclusive: bool = False
    needs_full_gpu: bool = False
    pool: Hashable = None
    made: tuple[UnmadeCheckpoint, ...] = ()

    @property
    def gpus(self) -> float:
        return 1.0 if self.needs_full_gpu or self.exclusive else 0.0


@dataclass(frozen=True)
class ScoringTask:
    """Cells to score in one task; fields that `PassTask` has mean the same.

    batch_size        0: as the sweep says; devices, offload: as in `EvaluateTask`
    requeueable       it was cut from the cells that have their checkpoint, to which it returns if it is withdrawn
    """

    pairs: tuple[Pair, ...]
    priority_tier: int = 0
    losses: int = 0
    tried: bool = False
    exclusive: bool = False
    needs_full_gpu: bool = False
    batch_size: int = 0
    devices: int = 1
    offload: bool = False
    requeueable: bool = False

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for cell, _ in self.pairs)

    @property
    def gpus(self) -> float:
        return (
            float(self.devices)
            if self.devices > 1
            else 1.0
            if self.needs_full_gpu or self.exclusive
            else 0.0
        )


Work = PassTask | ScoringTask


@dataclass
class RunningTask:
    """A submitted task.

    unfinished  cell keys of a pass, or (cell key, evaluation) pairs of a scoring, that have neither result nor failure
    width       worker slots that it takes
    """

    work: Work
    unfinished: set[Any]
    deadline: float
    width: int = 1

    @property
    def quantizes(self) -> bool:
        return isinstance(self.work, PassTask)


@dataclass(frozen=True)
class UnmadeCheckpoint:
    """One checkpoint to make, for all cells that use it, and what it is estimated to cost."""

    cells: tuple[Cell, ...]
    stream: Hashable
    seconds: float
    disk_bytes: int


@dataclass
class CheckpointPool:
    """Checkpoints of one model and one draw of windows that no pass has begun; those of one input stream are neighbours.

    limit: how many of them memory allows in one pass.
    """

    checkpoints: list[UnmadeCheckpoint]
    limit: int
    exclusive: bool
    needs_full_gpu: bool

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.checkpoints)

    @property
    def most_passes(self) -> int:
        """Into how many passes it can be cut for idle slots."""
        return max(
            len({each.stream for each in self.checkpoints}), -(-len(self.checkpoints) // self.limit)
        )


@dataclass
class TierQueue:
    """The work of one priority tier that has not begun.

    scoring_tasks, pass_tasks  queued as they are
    ready                      cells that have their checkpoint, by model
    """

    priority_tier: int
    scoring_tasks: list[ScoringTask] = field(default_factory=list)
    ready: dict[Model, list[Pair]] = field(default_factory=dict)
    pools: dict[Hashable, CheckpointPool] = field(default_factory=dict)
    pass_tasks: list[PassTask] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.scoring_tasks or any(self.ready.values()) or self.pools or self.pass_tasks)


@dataclass(frozen=True)
class ScoringDefaults:
    """How the cells of a model are scored at first, from its size and from records of memory that ran out.

    min_gpus: the GPUs that its size takes.
    """

    batch_size: int = 0
    devices: int = 1
    needs_full_gpu: bool = False
    offload: bool = False
    min_gpus: int = 1
