"""Which task comes next, and what its news means for the others: the policy of a run, wherever its tasks are carried out.

The board holds what is not begun. Checkpoints of one model and one draw of windows lie in a pool, and a walk is cut from it only
when a slot takes it: as many checkpoints as memory allows while all slots are busy, fewer where some would stay idle. So passes are
joined and split as nodes come and go; a stream that cells share is never cut for that. Work of an earlier rank (`first:` in a
sweep) comes before that of a later one, and scores before checkpoints: a number to look at is worth more than a checkpoint to wait
with.

What fails is given again by a changed plan, or not at all; `schedule` lists how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from harness.core.cell import Cell, Evaluation, Model, cell_key, quantize_key
from harness.core.errors import StoreError
from harness.core.events import Event, Failed, Quantized, Scored, TaskStarted
from harness.core.failures import FailureKind
from harness.execution import failures
from harness.execution.executors.base import RETURN_SECONDS, Executor, Exit, Message
from harness.execution.queues import (
    CheckpointPool,
    Pair,
    PassTask,
    RankQueue,
    RunningTask,
    ScoringDefaults,
    ScoringTask,
    UnmadeCheckpoint,
    Work,
)
from harness.execution.tasks import EvaluateTask, QuantizeTask, Task
from harness.planning.plan import CHECKPOINTS_PER_PASS, Pass, Plan
from harness.planning.resources import measures_device, over_quota
from harness.planning.streams import chunk_size, stream_of
from harness.storage.store import Store

LOSSES = 3  # nodes that may be lost under the same work
TAIL_TASK = 4  # checkpoints or cells of a task near the end; fewer would only load more


class Scheduler:
    """The work of a plan, handed out to an executor.

    behind: who goes first, while another driver of the store has a higher priority and tasks that wait; nothing is begun then.
    """

    def __init__(
        self, plan: Plan, executor: Executor, command: str, cheapest_first: bool = False
    ) -> None:
        self.executor, self.command, self.runtime = executor, command, plan.sweep.runtime
        self.running: dict[int, RunningTask] = {}
        self.behind = ""
        self.full = ""  # why no checkpoint may be begun, where the store has reached its quota
        self._number = 0
        self._cheapest_first, self._walked = cheapest_first, False
        self._store = Store(self.runtime.runs)
        self._rank_of = plan.sweep.rank
        self._unplaced: float | None = (
            None  # since when some work has had no node that could take it
        )
        self._queues = {rank: RankQueue(rank) for rank in range(len(plan.sweep.first) + 1)}
        for each in plan.passes:
            self._add(each)
        self._rooms: dict[Model, ScoringDefaults] = {}
        for scoring in plan.scorings:
            devices, offload = scoring.devices, scoring.offload
            if devices > max(scoring.least, executor.most):  # more than any node has
                devices, offload = scoring.least, True
            self._rooms[scoring.cells[0].model] = ScoringDefaults(
                scoring.batch_size, devices, scoring.whole, offload, scoring.least
            )
        unmade = {quantize_key(cell) for each in plan.passes for cell in each.cells}
        self._waiting: dict[str, list[Pair]] = {}
        for scoring in plan.scorings:
            for cell, evaluations in zip(scoring.cells, scoring.evaluations, strict=True):
                if quantize_key(cell) in unmade:
                    self._waiting.setdefault(cell_key(cell), []).append((cell, evaluations))
                else:
                    self._make_ready(cell, evaluations)

    def _add(self, each: Pass) -> None:
        by_key: dict[str, list[Cell]] = {}
        for cell in each.cells:
            by_key.setdefault(quantize_key(cell), []).append(cell)
        share = 1 / len(by_key)
        made = [
            UnmadeCheckpoint(
                tuple(cells),
                stream_of(cells[0]),
                (each.seconds or 0.0) * share,
                math.ceil(each.disk_bytes * share),
            )
            for cells in by_key.values()
        ]
        first = each.cells[0]
        walk = first.calibration if first.method.needs else None
        key = (each.rank, first.model, walk, each.limit, each.apart, each.whole)
        pool = self._queues[each.rank].pools.setdefault(
            key, CheckpointPool([], each.limit, each.apart, each.whole)
        )
        pool.checkpoints += made

    def _make_ready(self, cell: Cell, evaluations: tuple[Evaluation, ...]) -> None:
        """Give a cell to be scored: by itself what needs its device for itself, and what memory ran out for before."""
        rank, room = self._rank_of(cell_key(cell)), self._rooms[cell.model]
        queue = self._queues[rank]
        exclusive = tuple(e for e in evaluations if self._needs_all(e))
        if exclusive:
            queue.looks.append(
                ScoringTask(((cell, exclusive),), rank, apart=True, devices=room.least)
            )
        others = tuple(e for e in evaluations if e not in exclusive)
        if others and room.batch_size:
            measured = tuple(
                e for e in others if measures_device(e)
            )  # of one device, whatever memory taught
            for wanted, same in (
                (tuple(e for e in others if e not in measured), room),
                (measured, ScoringDefaults(1, room.least)),
            ):
                if wanted:
                    look = ScoringTask(
                        ((cell, wanted),),
                        rank,
                        batch_size=1,
                        devices=same.devices,
                        offload=same.offload,
                    )
                    queue.looks.append(dataclasses.replace(look, whole=same.whole))
        elif others:
            queue.ready.setdefault(cell.model, []).append((cell, others))

    def _needs_all(self, evaluation: Evaluation) -> bool:
        """A measurement of a device, where tasks do not have one each."""
        return (
            self.executor.slots > 1 and self.executor.share != 1.0 and measures_device(evaluation)
        )

    # what comes next

    def submit(self) -> bool:
        """Fill the free slots, after taking back what waits in vain; True when anything was submitted."""
        self._withdraw()
        submitted = False
        while (
            not self.behind
            and (free := self._free()) > 0
            and (found := self._next(free)) is not None
        ):
            self._start(found)
            submitted = True
        return submitted

    @property
    def wants(self) -> bool:
        """Whether a slot more would begin a task, or let one begin that was submitted. What no node could take asks for none."""
        if any(self.executor.waits(number) for number in self.running):
            return True
        queued = [
            each
            for queue in self._queues.values()
            for each in (*queue.looks, *self._as_looks(queue))
        ]
        walks = (
            not self.full
            and self.executor.slots > 0
            and any(queue.pools or queue.walks for queue in self._queues.values())
        )
        return walks or any(self._placeable(each) for each in queued)

    @property
    def waits(self) -> bool:
        """Whether there is work that may yet be begun though nothing runs: when others are done, or when nodes come back."""
        if all(queue.empty for queue in self._queues.values()):
            return False
        return bool(self.behind) or self.executor.slots < 1 or self._unplaced is not None

    def _free(self) -> int:
        return self.executor.slots - sum(job.width for job in self.running.values())

    def _withdraw(self) -> None:
        """Take back tasks that have no slot yet: for another driver, for want of slots, or because no node is left for them."""
        for number in [number for number in reversed(self.running) if self.executor.waits(number)]:
            job = self.running[number]
            if self.behind or self._free() < 0 or not self._placeable(job.work):
                self.executor.cancel(number)
                del self.running[number]
                self._put_back(job.work)

    def _put_back(self, back: Work) -> None:
        """To where it was cut from, so that it may be cut anew; what was given as it is, first of its kind."""
        queue = self._queues[back.rank]
        if isinstance(back, ScoringTask):
            if back.fresh:
                queue.ready[back.cells[0].model] = [
                    *back.pairs,
                    *queue.ready.get(back.cells[0].model, []),
                ]
            else:
                queue.looks.insert(0, back)
        elif back.pool is None:
            queue.walks.insert(0, back)
        else:
            limit = back.pool[3] if isinstance(back.pool, tuple) else CHECKPOINTS_PER_PASS
            pool = queue.pools.setdefault(
                back.pool, CheckpointPool([], limit, back.apart, back.whole)
            )
            pool.checkpoints[:0] = back.made

    def _placeable(self, asked: Work) -> bool:
        """Whether some node of now could take it."""
        devices = asked.devices if isinstance(asked, ScoringTask) else 1
        return self.executor.slots > 0 and devices <= max(1, self.executor.most)

    def _width(self, asked: Work) -> int:
        """Slots of a task; what takes more than there are waits for all of them."""
        return max(1, min(self.executor.slots, self.executor.width(asked.gpus)))

    def _as_looks(self, queue: RankQueue) -> list[ScoringTask]:
        """What is ready, one task per model."""
        found = []
        for model, pairs in queue.ready.items():
            if pairs:
                room = self._rooms[model]
                look = ScoringTask(
                    tuple(pairs), queue.rank, devices=room.devices, offload=room.offload, fresh=True
                )
                found.append(dataclasses.replace(look, whole=room.whole))
        return found

    def _next(self, free: int) -> Work | None:
        """The work of the earliest rank that may begin now. None where there is none, or where what comes next needs more slots."""
        self.full = ""
        if any(
            job.work.apart or (job.width > 1 and self.executor.waits(number))
            for number, job in self.running.items()
        ):
            return None  # one that waits for several GPUs of a node would wait for ever beside small ones
        for queue in self._queues.values():  # by rank
            looks = [look for look in queue.looks if self._placeable(look)]
            together = [look for look in looks if not look.apart]
            if together:
                if self._width(together[0]) > free:
                    return None
                queue.looks.remove(together[0])
                return together[0]
            ready = [look for look in self._as_looks(queue) if self._placeable(look)]
            if ready:
                look = max(ready, key=lambda look: (look.devices, len(look.pairs)))
                width = self._width(look)
                if width > free:
                    return None
                left = len(self._waiting) + sum(len(each.pairs) for each in ready)
                share, model = (
                    min(-(-len(look.pairs) // (free // width)), self._most(left)),
                    look.cells[0].model,
                )
                queue.ready[model] = list(look.pairs[share:])
                return dataclasses.replace(look, pairs=look.pairs[:share])
            walk = self._next_walk(queue, free)
            if walk is not None:
                if self._width(walk) > free:
                    self._put_back(walk)
                    return None
                return walk
            if (
                any(look.apart for look in looks)
                or any(pool.apart for pool in queue.pools.values())
                or queue.walks
            ):
                if self.running or self.full:
                    return None  # until nothing runs beside it
                for look in looks:
                    queue.looks.remove(look)
                    return look
                walk = self._next_walk(queue, free, apart=True)
                if walk is not None:
                    return walk
        return None

    def _next_walk(self, queue: RankQueue, free: int, apart: bool = False) -> PassTask | None:
        """Cut a walk from a pool, else one that was given again; None where there is none or the quota has no room."""
        if self.full:
            return None
        keys = [key for key, pool in queue.pools.items() if pool.apart == apart]
        if keys:
            made = self._pieces([queue.pools[key] for key in keys], free)
            costs = [sum(each.seconds for each in part) for part in made]
            cheap = self._cheapest_first or self.executor.slots == 1 or not self._walked
            chosen = (min if cheap else max)(range(len(keys)), key=costs.__getitem__)
            pool, part, key = queue.pools[keys[chosen]], made[chosen], keys[chosen]
            cells = tuple(cell for each in part for cell in each.cells)
            disk = sum(each.disk_bytes for each in part)
            walk = PassTask(
                cells, queue.rank, disk, apart=pool.apart, whole=pool.whole, pool=key, made=part
            )
            if not self._has_room(walk):
                return None
            pool.checkpoints = pool.checkpoints[len(part) :]
            if not pool.checkpoints:
                del queue.pools[key]
            return walk
        for walk in queue.walks:
            if walk.apart == apart:
                if not self._has_room(walk):
                    return None
                queue.walks.remove(walk)
                return walk
        return None

    def _pieces(
        self, pools: Sequence[CheckpointPool], free: int
    ) -> list[tuple[UnmadeCheckpoint, ...]]:
        """The walk that would be cut from each pool next: free slots beyond one each go where most work waits per walk.

        Without idle slots a walk is as large as memory allows, but near the end no larger than its share of the slots.
        """
        tail = self._most(sum(len(pool.checkpoints) for pool in pools))
        shares = [1] * len(pools)
        for _ in range(max(0, free - len(pools))):
            open_ = [index for index, pool in enumerate(pools) if shares[index] < pool.pieces]
            if not open_:
                break
            shares[max(open_, key=lambda index: pools[index].seconds / shares[index])] += 1
        cut = []
        for pool, share in zip(pools, shares, strict=True):
            count = min(-(-len(pool.checkpoints) // share), tail)
            cut.append(
                tuple(
                    pool.checkpoints[
                        : chunk_size([each.stream for each in pool.checkpoints], count, pool.limit)
                    ]
                )
            )
        return cut

    def _most(self, left: int) -> int:
        """Of so many checkpoints or cells that are left, the most for one task: near the end its share of the slots."""
        return max(TAIL_TASK, -(-left // max(1, self.executor.slots)))

    def _has_room(self, walk: PassTask) -> bool:
        """Whether the quota of the store has room for what is being made and for these checkpoints too."""
        if not self.runtime.store.quota:
            return True
        underway = sum(
            job.work.disk_bytes for job in self.running.values() if isinstance(job.work, PassTask)
        )
        self.full = over_quota(self.runtime, self._store.used_bytes(), underway + walk.disk_bytes)
        return not self.full

    def _start(self, begun: Work) -> None:
        common: dict[str, Any] = {
            "runs": str(self._store.place),
            "device": self.runtime.device,
            "threads": self.executor.threads,
            "command": self.command,
            "share": 1.0 if begun.gpus else self.executor.share or 1.0,
        }
        task: Task
        unfinished: set[Any]
        if isinstance(begun, PassTask):
            self._walked = True
            task, unfinished = QuantizeTask(begun.cells, **common), set(map(cell_key, begun.cells))
        else:
            wanted = tuple(evaluations for _, evaluations in begun.pairs)
            size = begun.batch_size or self.runtime.batch_size
            task = EvaluateTask(
                begun.cells,
                wanted,
                batch_size=size,
                devices=begun.devices,
                offload=begun.offload,
                **common,
            )
            unfinished = {
                (cell_key(cell), e.name) for cell, evaluations in begun.pairs for e in evaluations
            }
        self._number += 1
        self.running[self._number] = RunningTask(
            begun, unfinished, self._deadline(), self._width(begun)
        )
        self.executor.submit(self._number, task)

    def _deadline(self) -> float:
        limit = self.runtime.cluster.task_timeout_seconds
        return time.monotonic() + limit if limit else float("inf")

    # what news means

    def receive(self, message: Message) -> Iterator[Event]:
        """Pass an event on, after drawing the consequences."""
        job, news = self.running.get(message.number), message.news
        if job is None:  # taken back between its word and now
            return
        match news:
            case Exit():
                del self.running[message.number]
                yield from self._ended(job, news)
            case Quantized():
                job.unfinished -= set(news.cell_keys)
                yield news
                for key in news.cell_keys:
                    for cell, evaluations in self._waiting.pop(key, ()):
                        self._make_ready(cell, evaluations)
            case Scored():
                job.unfinished -= {(key, news.evaluation) for key in news.cell_keys}
                yield news
            case Failed():
                yield self._failed(job, news)
            case TaskStarted():
                job.deadline = self._deadline()
                yield news
            case _:
                yield news

    def deadlines(self) -> Iterator[Event]:
        """End the tasks whose time is over; it does not run while a task waits for a slot."""
        now = time.monotonic()
        for number, job in list(self.running.items()):
            if self.executor.waits(number):
                job.deadline = self._deadline()
            elif now > job.deadline:
                self.executor.cancel(number)
                del self.running[number]
                limit = self.runtime.cluster.task_timeout_seconds
                yield from self._ended(
                    job, Exit(FailureKind.TIMEOUT, f"{FailureKind.TIMEOUT.sentence} ({limit:g} s)")
                )

    def unplaced(self) -> Iterator[Event]:
        """Give up what no node could take for RETURN_SECONDS; the others have gone on meanwhile."""
        looks = [
            (queue, look)
            for queue in self._queues.values()
            for look in (*queue.looks, *self._as_looks(queue))
        ]
        found = [(queue, look) for queue, look in looks if not self._placeable(look)]
        nowhere = self.executor.slots < 1 and any(
            not queue.empty for queue in self._queues.values()
        )
        if not found and not nowhere:
            self._unplaced = None
            return
        self._unplaced = time.monotonic() if self._unplaced is None else self._unplaced
        if time.monotonic() - self._unplaced < RETURN_SECONDS or self.executor.slots < 1:
            return
        for queue, look in found:
            if look.fresh:
                queue.ready[look.cells[0].model] = []
            else:
                queue.looks.remove(look)
            keys, kind = tuple(dict.fromkeys(map(cell_key, look.cells))), FailureKind.NO_NODE
            reason = (
                f"{kind.sentence}: the cell takes {look.devices} GPUs of one node, and none has had more than "
                f"{self.executor.most} for {RETURN_SECONDS:g} s"
            )
            yield Failed(time.time(), keys, stage="evaluate", kind=kind, reason=reason)
        self._unplaced = None

    @property
    def stranded(self) -> bool:
        """No node has taken any task for RETURN_SECONDS, though there is work."""
        since = self._unplaced
        return (
            self.executor.slots < 1
            and since is not None
            and time.monotonic() - since > RETURN_SECONDS
        )

    def cancelled(self, names: Iterable[str]) -> Iterator[Event]:
        """Take out the cells that `harness cancel` named. Their tasks end; what else was in them is given again."""
        named = set(names)
        keys = named & self._open_cells() if named else named
        if not keys:
            return
        for number, job in list(self.running.items()):
            if any(cell_key(cell) in keys for cell in job.work.cells):
                self.executor.cancel(number)
                del self.running[number]
                left = {
                    entry
                    for entry in job.unfinished
                    if (entry if job.quantizes else entry[0]) not in keys
                }
                if left:
                    self._give(job, [left], tried=job.work.tried)

        def kept(pairs: Iterable[Pair]) -> list[Pair]:
            return [pair for pair in pairs if cell_key(pair[0]) not in keys]

        def staying(cells: Iterable[Cell]) -> tuple[Cell, ...]:
            return tuple(cell for cell in cells if cell_key(cell) not in keys)

        for queue in self._queues.values():
            queue.walks = [
                dataclasses.replace(walk, cells=cells)
                for walk in queue.walks
                if (cells := staying(walk.cells))
            ]
            queue.looks = [
                dataclasses.replace(look, pairs=tuple(pairs))
                for look in queue.looks
                if (pairs := kept(look.pairs))
            ]
            queue.ready = {model: kept(pairs) for model, pairs in queue.ready.items()}
            for pool in queue.pools.values():
                pool.checkpoints = [
                    dataclasses.replace(each, cells=cells)
                    for each in pool.checkpoints
                    if (cells := staying(each.cells))
                ]
            queue.pools = {key: pool for key, pool in queue.pools.items() if pool.checkpoints}
        self._waiting = {key: pairs for key, pairs in self._waiting.items() if key not in keys}
        yield Failed(
            time.time(),
            tuple(sorted(keys)),
            stage="cell",
            kind=FailureKind.CANCELLED,
            reason=FailureKind.CANCELLED.sentence,
        )

    def _open_cells(self) -> set[str]:
        """Keys of the cells for which something is still to do."""
        running = {
            entry if job.quantizes else entry[0]
            for job in self.running.values()
            for entry in job.unfinished
        }
        queued: set[str] = set()
        for queue in self._queues.values():
            works: list[Any] = [
                *queue.looks,
                *queue.walks,
                *(each for pool in queue.pools.values() for each in pool.checkpoints),
            ]
            queued |= {cell_key(cell) for each in works for cell in each.cells}
            queued |= {cell_key(cell) for pairs in queue.ready.values() for cell, _ in pairs}
        return running | queued | set(self._waiting)

    def _failed(self, job: RunningTask, failed: Failed) -> Failed:
        """A failure that the task itself reported; one for lack of memory is tried again with more room."""
        lost = self._concerned(job, failed)
        job.unfinished -= lost
        retry = (
            failed.kind is FailureKind.OUT_OF_MEMORY
            and bool(lost)
            and self._with_more_room(job, lost, smaller=False)
        )
        return dataclasses.replace(failed, retry=retry)

    def _concerned(self, job: RunningTask, failed: Failed) -> set[Any]:
        if job.quantizes:
            return job.unfinished & set(failed.cell_keys)
        named = {(key, name) for key, name in job.unfinished if key in failed.cell_keys}
        return {pair for pair in named if pair[1] == failed.stage} or named

    def _ended(self, job: RunningTask, end: Exit) -> Iterator[Event]:
        if not job.unfinished:
            return
        unfinished, job.unfinished = job.unfinished, set()
        keys = [
            key
            for key in map(cell_key, job.work.cells)
            if key in unfinished or any(key == pair[0] for pair in unfinished)
        ]
        if isinstance(job.work, ScoringTask) and end.kind not in (
            FailureKind.LOST,
            FailureKind.HEAD_LOST,
        ):
            # Cells are scored in order: the first unfinished one is what the process died of, the others were only behind it.
            behind = {pair for pair in unfinished if pair[0] != keys[0]}
            unfinished -= behind
            if behind:
                self._put_back(dataclasses.replace(job.work, pairs=tuple(self._pairs(job, behind))))
            keys = keys[:1]
        if end.kind is FailureKind.OUT_OF_MEMORY:  # a task that ends itself has noted it
            with contextlib.suppress(StoreError):
                if isinstance(
                    job.work, ScoringTask
                ):  # for want of main memory, which more GPUs do not help
                    failures.ran_out(
                        self._store,
                        keys,
                        "evaluate",
                        job.work.batch_size or self.runtime.batch_size,
                        0,
                    )
                else:
                    together = (
                        0
                        if job.work.apart
                        else len({quantize_key(cell) for cell in job.work.cells})
                    )
                    failures.ran_out(self._store, keys, "quantize", together, 0)
        kind, reason = (
            end.kind or FailureKind.ERROR,
            end.reason or "the task ended without a result for this cell",
        )
        stage = "quantize" if job.quantizes else "evaluate"
        retry = end.kind is not None and self._changed_plan(job, end.kind, unfinished)
        yield Failed(
            time.time(),
            tuple(keys),
            stage=stage,
            kind=kind,
            reason=reason,
            detail=end.detail,
            retry=retry,
        )

    def _changed_plan(self, job: RunningTask, kind: FailureKind, unfinished: set[Any]) -> bool:
        """Queue what a process left when it ended; False where there is no other way left to try it."""
        if kind is FailureKind.HEAD_LOST:  # nothing that the work could have done
            self._give(job, [unfinished])
            return True
        if kind is FailureKind.LOST:
            if job.work.losses + 1 < LOSSES:
                self._give(job, [unfinished], losses=job.work.losses + 1)
                return True
            return False
        halves = self._halves(job, unfinished)
        if len(halves) > 1:
            self._give(job, halves, tried=True)
            return True
        if kind is FailureKind.OUT_OF_MEMORY:
            return self._with_more_room(job, unfinished, smaller=True)
        if (
            isinstance(job.work, ScoringTask) and len(job.work.pairs) > 1
        ):  # others were in memory before it
            self._give(job, [unfinished], tried=True)
            return True
        if kind is FailureKind.KILLED and not job.work.tried:
            self._give(job, [unfinished], tried=True, apart=True)
            return True
        return False

    def _with_more_room(self, job: RunningTask, lost: set[Any], smaller: bool) -> bool:
        """Each checkpoint or cell alone; what was alone, with nothing beside it and in batches of 1; evaluations then on twice the
        GPUs, and at last with blocks in main memory. What had all that, not again.

        smaller: whether smaller batches are a change; a task that reports its own end has tried them. One that could not was ended
        for the memory of its host, which more GPUs do not help.
        """
        host = smaller
        alone = len({quantize_key(cell) for cell in job.work.cells}) == 1
        smaller = (
            smaller
            and isinstance(job.work, ScoringTask)
            and (job.work.batch_size or self.runtime.batch_size) != 1
        )
        if not alone:
            self._give(job, self._each(job, lost), tried=True)
        elif (self.executor.slots > 1 and not job.work.apart) or smaller:
            self._give(job, [lost], tried=True, apart=True, batch_size=1)
        elif (
            not host
            and isinstance(job.work, ScoringTask)
            and self.executor.most
            and not any(
                measures_device(evaluation) for _, wanted in job.work.pairs for evaluation in wanted
            )
        ):
            if job.work.offload:
                return False
            more = min(2 * job.work.devices, self.executor.most)
            least = self._rooms[job.work.cells[0].model].least
            changes = (
                {"devices": more}
                if more > job.work.devices
                else {"devices": least, "offload": True}
            )
            self._give(job, [lost], tried=True, batch_size=1, **changes)
        else:
            return False
        return True

    def _each(self, job: RunningTask, unfinished: set[Any]) -> list[set[Any]]:
        """Unfinished work, one set per checkpoint."""
        sets: dict[str, set[Any]] = {}
        for cell in job.work.cells:
            mine = {
                entry
                for entry in unfinished
                if (entry if job.quantizes else entry[0]) == cell_key(cell)
            }
            if mine:
                sets.setdefault(quantize_key(cell), set()).update(mine)
        return list(sets.values())

    def _halves(self, job: RunningTask, unfinished: set[Any]) -> list[set[Any]]:
        each = self._each(job, unfinished)
        middle = -(-len(each) // 2)
        return [set().union(*part) for part in (each[:middle], each[middle:]) if part]

    def _give(
        self, job: RunningTask, parts: Sequence[set[Any]], batch_size: int = 0, **changes: Any
    ) -> None:
        """Queue each part of a job's work as a task of its own."""
        for part in parts:
            if isinstance(job.work, ScoringTask):
                changes["batch_size"] = batch_size or job.work.batch_size
                pairs = tuple(self._pairs(job, part))
                self._queues[job.work.rank].looks.append(
                    dataclasses.replace(job.work, pairs=pairs, fresh=False, **changes)
                )
            else:
                cells = tuple(cell for cell in job.work.cells if cell_key(cell) in part)
                disk = job.work.disk_bytes * len(cells) // len(job.work.cells)
                walk = dataclasses.replace(
                    job.work, cells=cells, disk_bytes=disk, pool=None, made=(), **changes
                )
                self._queues[job.work.rank].walks.append(walk)

    @staticmethod
    def _pairs(job: RunningTask, unfinished: set[Any]) -> list[Pair]:
        assert isinstance(job.work, ScoringTask)
        pairs = []
        for cell, evaluations in job.work.pairs:
            left = tuple(
                evaluation
                for evaluation in evaluations
                if (cell_key(cell), evaluation.name) in unfinished
            )
            if left:
                pairs.append((cell, left))
        return pairs
