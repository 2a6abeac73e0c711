"""What the scheduler holds: tasks that wait, tasks that run, checkpoints that are not begun."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from harness.core.cell import Cell, Evaluation, Model

Pair = tuple[Cell, tuple[Evaluation, ...]]


@dataclass(frozen=True)
class PassTask:
    """Checkpoints to make in one task, which take about disk_bytes.

    pool: where it was cut from and goes back to if it is not begun; None: it was given again and stays as it is. losses: nodes lost
    under it; tried: it died before; apart: nothing may run beside it; whole: it takes a GPU of its own where tasks share them.
    """

    cells: tuple[Cell, ...]
    rank: int = 0
    disk_bytes: int = 0
    losses: int = 0
    tried: bool = False
    apart: bool = False
    whole: bool = False
    pool: Hashable = None
    made: tuple[UnmadeCheckpoint, ...] = ()

    @property
    def gpus(self) -> float:
        return 1.0 if self.whole or self.apart else 0.0


@dataclass(frozen=True)
class ScoringTask:
    """Cells to score in one task, otherwise as `_Walk`. batch_size 0: as the sweep says; devices, offload: as in `EvaluateTask`.

    fresh: as it was cut from the cells that are ready, to which it goes back if it is not begun.
    """

    pairs: tuple[Pair, ...]
    rank: int = 0
    losses: int = 0
    tried: bool = False
    apart: bool = False
    whole: bool = False
    batch_size: int = 0
    devices: int = 1
    offload: bool = False
    fresh: bool = False

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for cell, _ in self.pairs)

    @property
    def gpus(self) -> float:
        return float(self.devices) if self.devices > 1 else 1.0 if self.whole or self.apart else 0.0


Work = PassTask | ScoringTask


@dataclass
class RunningTask:
    """A submitted task. unfinished: what has neither result nor failure: cell keys, or (cell key, evaluation) pairs.

    width: slots that it takes.
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
    """Checkpoints of one model and one draw of windows that are not begun, those of one stream side by side.

    limit: how many memory allows in one walk.
    """

    checkpoints: list[UnmadeCheckpoint]
    limit: int
    apart: bool
    whole: bool

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.checkpoints)

    @property
    def pieces(self) -> int:
        """Into how many walks it could be cut for idle slots."""
        return max(
            len({each.stream for each in self.checkpoints}), -(-len(self.checkpoints) // self.limit)
        )


@dataclass
class RankQueue:
    """What is not begun of one rank. looks and walks were given as they are; ready: cells that have their checkpoint, by model."""

    rank: int
    looks: list[ScoringTask] = field(default_factory=list)
    ready: dict[Model, list[Pair]] = field(default_factory=dict)
    pools: dict[Hashable, CheckpointPool] = field(default_factory=dict)
    walks: list[PassTask] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.looks or any(self.ready.values()) or self.pools or self.walks)


@dataclass(frozen=True)
class ScoringDefaults:
    """How the cells of a model are scored at first: what it takes, and what memory that ran out before has taught."""

    batch_size: int = 0
    devices: int = 1
    whole: bool = False
    offload: bool = False
    least: int = 1  # GPUs by its size alone
