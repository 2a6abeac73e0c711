"""The state of the scheduler: GPUs that queued tasks take, and how far a pool can be cut."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from harness.core.cell import Cell, Method, Model, Scheme
from harness.execution.queues import (
    CheckpointPool,
    PassTask,
    ScoringTask,
    TierQueue,
    UnmadeCheckpoint,
)

CELL = Cell(Model("m", "m", digest="d"), Method("none"), Scheme("full"))


def pool(*streams: Hashable, limit: int) -> CheckpointPool:
    checkpoints = [UnmadeCheckpoint((CELL,), stream, 1.5, 0) for stream in streams]
    return CheckpointPool(checkpoints, limit, exclusive=False, needs_full_gpu=False)


@pytest.mark.parametrize("flags", [{"exclusive": True}, {"needs_full_gpu": True}])
def test_tasks_that_need_a_gpu_of_their_own_take_one(flags: dict[str, bool]) -> None:
    assert PassTask((CELL,)).gpus == 0 and ScoringTask(((CELL, ()),)).gpus == 0
    assert PassTask((CELL,), **flags).gpus == 1  # type: ignore[arg-type]
    assert ScoringTask(((CELL, ()),), **flags).gpus == 1  # type: ignore[arg-type]
    assert ScoringTask(((CELL, ()),), devices=4, **flags).gpus == 4  # type: ignore[arg-type]


def test_a_pool_is_cut_between_streams_or_at_its_limit() -> None:
    assert pool("a", "a", "a", limit=16).most_passes == 1  # a stream is not cut for idle slots
    assert pool("a", "a", "b", limit=16).most_passes == 2
    assert pool("a", "a", "a", limit=2).most_passes == 2  # but for its memory
    assert pool("a", "b", limit=16).seconds == 3.0


def test_a_queue_without_pairs_is_empty() -> None:
    queue = TierQueue(0)
    queue.ready[CELL.model] = []
    assert queue.empty
    queue.ready[CELL.model].append((CELL, ()))
    assert not queue.empty
