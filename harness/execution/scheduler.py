"""The scheduler: which task runs next, and what is retried. One policy, whichever executor runs the tasks.

The scheduler holds all work that has not begun. Checkpoints of one model and one draw of calibration windows lie in a pool, and a
pass is cut from the pool only when a slot is free for it: as many checkpoints as memory allows while all slots are busy, fewer
where slots would stay idle. So passes are joined and split as nodes join and leave; an input stream that cells share is never cut
for idle slots. Work of an earlier priority tier (`first:` in a sweep) runs before work of a later one, and scoring runs before
quantizing, because results are worth more to a reader than checkpoints that wait to be scored.

Failed work is retried by a changed plan, or not at all; `dispatch` lists how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from harness.core.cell import Cell, Evaluation, Model, cell_key, quantize_key, reduction_key
from harness.core.errors import StoreError
from harness.core.events import Event, Failed, Quantized, Scored, TaskStarted
from harness.core.failures import FailureKind
from harness.execution import failures
from harness.execution.executors.base import RETURN_SECONDS, Executor, Exit, Message
from harness.execution.queues import (
    CheckpointPool,
    Pair,
    PassTask,
    RunningTask,
    ScoringDefaults,
    ScoringTask,
    TierQueue,
    UnmadeCheckpoint,
    Work,
)
from harness.execution.tasks import EvaluateTask, QuantizeTask, Task
from harness.planning.plan import CHECKPOINTS_PER_PASS, Pass, Plan
from harness.planning.resources import measures_device, over_quota
from harness.planning.streams import chunk_size, stream_of
from harness.storage.store import Store

LOSSES = 3  # nodes that may be lost under the same work
TAIL_TASK = 4  # checkpoints or cells of a task near the end; smaller ones load more often


class Wait(enum.Enum):
    """Why nothing begins although there is work: the next task must not be overtaken by a later one."""

    FOR_SLOTS = "the next task takes more slots than are free"
    FOR_IDLE_DEVICES = "the next task runs with no other task, and some still run"
    FOR_DISK = "the next checkpoints do not fit into the quota of the store"


class Scheduler:
    """Submits the work of a plan to an executor and retries what fails.

    behind  the driver with a higher priority on the same store whose tasks wait for slots, in words; "" where there is none.
            While there is one, no task begins.
    full    why no pass may begin: the store has reached its quota; "" where it has room
    """

    def __init__(
        self, plan: Plan, executor: Executor, command: str, cheapest_first: bool = False
    ) -> None:
        self.executor, self.command, self.runtime = executor, command, plan.sweep.runtime
        self.running: dict[int, RunningTask] = {}
        self.behind = ""
        self.full = ""
        self._number = 0
        self._cheapest_first, self._has_begun_pass = cheapest_first, False
        self._store = Store(self.runtime.runs)
        self._tier_of = plan.sweep.priority_tier
        self._unplaced: float | None = None  # since when no node could run some of the work
        self._queues = {tier: TierQueue(tier) for tier in range(len(plan.sweep.first) + 1)}
        for each in plan.passes:
            self._add(each)
        self._defaults: dict[Model, ScoringDefaults] = {}
        for scoring in plan.scorings:
            devices, offload = scoring.devices, scoring.offload
            if devices > max(scoring.min_gpus, executor.max_gpus):  # more than any node has
                devices, offload = scoring.min_gpus, True
            self._defaults[scoring.cells[0].model] = ScoringDefaults(
                scoring.batch_size, devices, scoring.needs_full_gpu, offload, scoring.min_gpus
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
        fraction = 1 / len(by_key)
        made = [
            UnmadeCheckpoint(
                tuple(cells),
                stream_of(cells[0]),
                (each.seconds or 0.0) * fraction,
                math.ceil(each.disk_bytes * fraction),
            )
            for cells in by_key.values()
        ]
        first = each.cells[0]
        windows = first.calibration if first.method.needs_calibration else None
        key = (
            each.priority_tier,
            first.model,
            windows,
            each.limit,
            each.exclusive,
            each.needs_full_gpu,
            reduction_key(first) if first.method.reduction is not None else "",
        )
        pool = self._queues[each.priority_tier].pools.setdefault(
            key, CheckpointPool([], each.limit, each.exclusive, each.needs_full_gpu)
        )
        pool.checkpoints += made

    def _make_ready(self, cell: Cell, evaluations: tuple[Evaluation, ...]) -> None:
        """Queue a cell for scoring. Evaluations that need their device for themselves, or ran out of memory, get their own task."""
        priority_tier, defaults = self._tier_of(cell_key(cell)), self._defaults[cell.model]
        queue = self._queues[priority_tier]
        exclusive = tuple(e for e in evaluations if self._needs_all(e))
        if exclusive:
            queue.scoring_tasks.append(
                ScoringTask(
                    ((cell, exclusive),), priority_tier, exclusive=True, devices=defaults.min_gpus
                )
            )
        others = tuple(e for e in evaluations if e not in exclusive)
        if others and defaults.batch_size:
            # A measurement is one of a single device, whatever earlier runs said about memory.
            measured = tuple(e for e in others if measures_device(e))
            for wanted, same in (
                (tuple(e for e in others if e not in measured), defaults),
                (measured, ScoringDefaults(1, defaults.min_gpus)),
            ):
                if wanted:
                    task = ScoringTask(
                        ((cell, wanted),),
                        priority_tier,
                        batch_size=1,
                        devices=same.devices,
                        offload=same.offload,
                    )
                    queue.scoring_tasks.append(
                        dataclasses.replace(task, needs_full_gpu=same.needs_full_gpu)
                    )
        elif others:
            queue.ready.setdefault(cell.model, []).append((cell, others))

    def _needs_all(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation measures its device, and tasks share devices."""
        return (
            self.executor.worker_slots > 1
            and self.executor.gpu_fraction != 1.0
            and measures_device(evaluation)
        )

    # what runs next

    def submit(self) -> bool:
        """Withdraw tasks that cannot start, then fill the free slots. True when a task was submitted."""
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
        """Whether one more slot would start a task, queued or submitted. Work that no node could run does not count."""
        if any(self.executor.waits(number) for number in self.running):
            return True
        queued = [
            each
            for queue in self._queues.values()
            for each in (*queue.scoring_tasks, *self._ready_tasks(queue))
        ]
        has_passes = (
            not self.full
            and self.executor.worker_slots > 0
            and any(queue.pools or queue.pass_tasks for queue in self._queues.values())
        )
        return has_passes or any(self._placeable(each) for each in queued)

    @property
    def waits(self) -> bool:
        """Whether work is left that can start later: when other drivers have finished, or when nodes come back."""
        if all(queue.empty for queue in self._queues.values()):
            return False
        return bool(self.behind) or self.executor.worker_slots < 1 or self._unplaced is not None

    def _free(self) -> int:
        return self.executor.worker_slots - sum(running.width for running in self.running.values())

    def _withdraw(self) -> None:
        """Withdraw submitted tasks that have no slot yet: for another driver, for lack of slots, or of a node that can run them."""
        for number in [number for number in reversed(self.running) if self.executor.waits(number)]:
            running = self.running[number]
            if self.behind or self._free() < 0 or not self._placeable(running.work):
                self.executor.cancel(number)
                del self.running[number]
                self._put_back(running.work)

    def _put_back(self, work: Work) -> None:
        """Return work to the pool or the cells that it was cut from, to be cut anew; other work goes to the front of its queue."""
        queue = self._queues[work.priority_tier]
        if isinstance(work, ScoringTask):
            if work.requeueable:
                queue.ready[work.cells[0].model] = [
                    *work.pairs,
                    *queue.ready.get(work.cells[0].model, []),
                ]
            else:
                queue.scoring_tasks.insert(0, work)
        elif work.pool is None:
            queue.pass_tasks.insert(0, work)
        else:
            limit = work.pool[3] if isinstance(work.pool, tuple) else CHECKPOINTS_PER_PASS
            pool = queue.pools.setdefault(
                work.pool, CheckpointPool([], limit, work.exclusive, work.needs_full_gpu)
            )
            pool.checkpoints[:0] = work.made

    def _placeable(self, work: Work) -> bool:
        """Whether a node of the current cluster could run it."""
        devices = work.devices if isinstance(work, ScoringTask) else 1
        return self.executor.worker_slots > 0 and devices <= max(1, self.executor.max_gpus)

    def _width(self, work: Work) -> int:
        """Slots that a task takes; one that needs more than there are takes all of them."""
        return max(1, min(self.executor.worker_slots, self.executor.width(work.gpus)))

    def _ready_tasks(self, queue: TierQueue) -> list[ScoringTask]:
        """The cells that have their checkpoint, as one scoring task per model."""
        found = []
        for model, pairs in queue.ready.items():
            if pairs:
                defaults = self._defaults[model]
                task = ScoringTask(
                    tuple(pairs),
                    queue.priority_tier,
                    devices=defaults.devices,
                    offload=defaults.offload,
                    requeueable=True,
                )
                found.append(dataclasses.replace(task, needs_full_gpu=defaults.needs_full_gpu))
        return found

    def _next(self, free: int) -> Work | None:
        """The work of the earliest priority tier that may begin now; None where there is none, or where the next task must wait."""
        self.full = ""
        if self._begins_nothing():
            return None
        choices = (self._next_scoring, self._next_ready, self._next_shared_pass, self._next_alone)
        for queue in self._queues.values():  # by priority tier
            for choose in choices:
                found = choose(queue, free)
                if isinstance(found, Wait):
                    return None
                if found is not None:
                    return found
        return None

    def _begins_nothing(self) -> bool:
        """Whether a running task excludes others, or one waits for GPUs of a node that small tasks would never leave free."""
        return any(
            running.work.exclusive or (running.width > 1 and self.executor.waits(number))
            for number, running in self.running.items()
        )

    def _next_scoring(self, queue: TierQueue, free: int) -> Work | Wait | None:
        """The first scoring task that was queued as it is and shares the devices with others."""
        for task in queue.scoring_tasks:
            if self._placeable(task) and not task.exclusive:
                if self._width(task) > free:
                    return Wait.FOR_SLOTS
                queue.scoring_tasks.remove(task)
                return task
        return None

    def _next_ready(self, queue: TierQueue, free: int) -> Work | Wait | None:
        """Of the cells that have their checkpoint, those of one model: as many as spread the rest over the free slots."""
        ready = [task for task in self._ready_tasks(queue) if self._placeable(task)]
        if not ready:
            return None
        task = max(ready, key=lambda task: (task.devices, len(task.pairs)))
        width = self._width(task)
        if width > free:
            return Wait.FOR_SLOTS
        left = len(self._waiting) + sum(len(each.pairs) for each in ready)
        count = min(-(-len(task.pairs) // (free // width)), self._largest_task(left))
        queue.ready[task.cells[0].model] = list(task.pairs[count:])
        return dataclasses.replace(task, pairs=task.pairs[:count])

    def _next_shared_pass(self, queue: TierQueue, free: int) -> Work | Wait | None:
        """The next pass that shares the devices with others."""
        task = self._next_pass(queue, free)
        if task is not None and self._width(task) > free:
            self._put_back(task)
            return Wait.FOR_SLOTS
        return task

    def _next_alone(self, queue: TierQueue, free: int) -> Work | Wait | None:
        """A task that runs with no other task, a scoring before a pass; it waits until nothing else runs."""
        exclusive = [
            task for task in queue.scoring_tasks if self._placeable(task) and task.exclusive
        ]
        passes = queue.pass_tasks or any(pool.exclusive for pool in queue.pools.values())
        if not exclusive and not passes:
            return None
        if self.running:
            return Wait.FOR_IDLE_DEVICES
        if self.full:
            return Wait.FOR_DISK
        if exclusive:
            queue.scoring_tasks.remove(exclusive[0])
            return exclusive[0]
        return self._next_pass(queue, free, exclusive=True)

    def _next_pass(self, queue: TierQueue, free: int, exclusive: bool = False) -> PassTask | None:
        """Cut a pass from a pool, else take one that was queued again; None where there is none or the quota has no room."""
        if self.full:
            return None
        keys = [key for key, pool in queue.pools.items() if pool.exclusive == exclusive]
        if keys:
            cuts = self._cuts([queue.pools[key] for key in keys], free)
            costs = [sum(each.seconds for each in cut) for cut in cuts]
            cheapest = (
                self._cheapest_first or self.executor.worker_slots == 1 or not self._has_begun_pass
            )
            chosen = (min if cheapest else max)(range(len(keys)), key=costs.__getitem__)
            pool, cut, key = queue.pools[keys[chosen]], cuts[chosen], keys[chosen]
            task = PassTask(
                tuple(cell for each in cut for cell in each.cells),
                queue.priority_tier,
                sum(each.disk_bytes for each in cut),
                exclusive=pool.exclusive,
                needs_full_gpu=pool.needs_full_gpu,
                pool=key,
                made=cut,
            )
            if not self._has_disk(task):
                return None
            pool.checkpoints = pool.checkpoints[len(cut) :]
            if not pool.checkpoints:
                del queue.pools[key]
            return task
        for task in queue.pass_tasks:
            if task.exclusive == exclusive:
                if not self._has_disk(task):
                    return None
                queue.pass_tasks.remove(task)
                return task
        return None

    def _cuts(
        self, pools: Sequence[CheckpointPool], free: int
    ) -> list[tuple[UnmadeCheckpoint, ...]]:
        """The pass that would be cut from each pool next: free slots beyond one per pool go where most work waits per pass.

        Without idle slots a pass is as large as memory allows, but near the end no larger than its part of the slots.
        """
        largest = self._largest_task(sum(len(pool.checkpoints) for pool in pools))
        passes = [1] * len(pools)
        for _ in range(max(0, free - len(pools))):
            divisible = [i for i, pool in enumerate(pools) if passes[i] < pool.most_passes]
            if not divisible:
                break
            passes[max(divisible, key=lambda i: pools[i].seconds / passes[i])] += 1
        cuts = []
        for pool, parts in zip(pools, passes, strict=True):
            streams = [each.stream for each in pool.checkpoints]
            count = min(-(-len(pool.checkpoints) // parts), largest)
            cuts.append(tuple(pool.checkpoints[: chunk_size(streams, count, pool.limit)]))
        return cuts

    def _largest_task(self, left: int) -> int:
        """Checkpoints or cells of one task at most, where `left` are not begun: near the end what falls to one slot."""
        return max(TAIL_TASK, -(-left // max(1, self.executor.worker_slots)))

    def _has_disk(self, task: PassTask) -> bool:
        """Whether the quota of the store has room for these checkpoints and for those of the passes that run."""
        if not self.runtime.store.quota:
            return True
        underway = sum(
            running.work.disk_bytes
            for running in self.running.values()
            if isinstance(running.work, PassTask)
        )
        self.full = over_quota(self.runtime, self._store.used_bytes(), underway + task.disk_bytes)
        return not self.full

    def _start(self, work: Work) -> None:
        common: dict[str, Any] = {
            "runs": str(self._store.place),
            "device": self.runtime.device,
            "threads": self.executor.threads,
            "command": self.command,
            "gpu_fraction": 1.0 if work.gpus else self.executor.gpu_fraction or 1.0,
        }
        task: Task
        unfinished: set[Any]
        if isinstance(work, PassTask):
            self._has_begun_pass = True
            task, unfinished = QuantizeTask(work.cells, **common), set(map(cell_key, work.cells))
        else:
            wanted = tuple(evaluations for _, evaluations in work.pairs)
            size = work.batch_size or self.runtime.batch_size
            task = EvaluateTask(
                work.cells,
                wanted,
                batch_size=size,
                devices=work.devices,
                offload=work.offload,
                **common,
            )
            unfinished = {
                (cell_key(cell), e.name) for cell, evaluations in work.pairs for e in evaluations
            }
        self._number += 1
        self.running[self._number] = RunningTask(
            work, unfinished, self._deadline(), self._width(work)
        )
        self.executor.submit(self._number, task)

    def _deadline(self) -> float:
        limit = self.runtime.cluster.task_timeout_seconds
        return time.monotonic() + limit if limit else float("inf")

    # what messages change

    def receive(self, message: Message) -> Iterator[Event]:
        """Yield an event of a task, after updating the queues."""
        running, news = self.running.get(message.number), message.news
        if running is None:  # withdrawn or cancelled meanwhile
            return
        match news:
            case Exit():
                del self.running[message.number]
                yield from self._ended(running, news)
            case Quantized():
                running.unfinished -= set(news.cell_keys)
                yield news
                for key in news.cell_keys:
                    for cell, evaluations in self._waiting.pop(key, ()):
                        self._make_ready(cell, evaluations)
            case Scored():
                running.unfinished -= {(key, news.evaluation) for key in news.cell_keys}
                yield news
            case Failed():
                yield self._failed(running, news)
            case TaskStarted():
                running.deadline = self._deadline()
                yield news
            case _:
                yield news

    def deadlines(self) -> Iterator[Event]:
        """End the tasks that exceeded their time limit; the limit does not run while a task waits for a slot."""
        now = time.monotonic()
        for number, running in list(self.running.items()):
            if self.executor.waits(number):
                running.deadline = self._deadline()
            elif now > running.deadline:
                self.executor.cancel(number)
                del self.running[number]
                limit = self.runtime.cluster.task_timeout_seconds
                yield from self._ended(
                    running,
                    Exit(FailureKind.TIMEOUT, f"{FailureKind.TIMEOUT.sentence} ({limit:g} s)"),
                )

    def unplaced(self) -> Iterator[Event]:
        """Fail the scoring tasks that no node could run for RETURN_SECONDS."""
        scoring_tasks = [
            (queue, task)
            for queue in self._queues.values()
            for task in (*queue.scoring_tasks, *self._ready_tasks(queue))
        ]
        found = [(queue, task) for queue, task in scoring_tasks if not self._placeable(task)]
        nowhere = self.executor.worker_slots < 1 and any(
            not queue.empty for queue in self._queues.values()
        )
        if not found and not nowhere:
            self._unplaced = None
            return
        self._unplaced = time.monotonic() if self._unplaced is None else self._unplaced
        if time.monotonic() - self._unplaced < RETURN_SECONDS or self.executor.worker_slots < 1:
            return
        for queue, task in found:
            if task.requeueable:
                queue.ready[task.cells[0].model] = []
            else:
                queue.scoring_tasks.remove(task)
            keys, kind = tuple(dict.fromkeys(map(cell_key, task.cells))), FailureKind.NO_NODE
            reason = (
                f"{kind.sentence}: the cell takes {task.devices} GPUs of one node, and none has had more than "
                f"{self.executor.max_gpus} for {RETURN_SECONDS:g} s"
            )
            yield Failed(time.time(), keys, stage="evaluate", kind=kind, reason=reason)
        self._unplaced = None

    @property
    def stranded(self) -> bool:
        """Whether there is work, and no node could run any task for RETURN_SECONDS."""
        since = self._unplaced
        return (
            self.executor.worker_slots < 1
            and since is not None
            and time.monotonic() - since > RETURN_SECONDS
        )

    def cancelled(self, names: Iterable[str]) -> Iterator[Event]:
        """Drop the cells that `harness cancel` named. Their tasks end; other cells of those tasks are queued again."""
        named = set(names)
        keys = named & self._open_cells() if named else named
        if not keys:
            return
        for number, running in list(self.running.items()):
            if any(cell_key(cell) in keys for cell in running.work.cells):
                self.executor.cancel(number)
                del self.running[number]
                left = {
                    entry
                    for entry in running.unfinished
                    if (entry if running.quantizes else entry[0]) not in keys
                }
                if left:
                    self._requeue(running, [left], tried=running.work.tried)

        def kept(pairs: Iterable[Pair]) -> list[Pair]:
            return [pair for pair in pairs if cell_key(pair[0]) not in keys]

        def remaining(cells: Iterable[Cell]) -> tuple[Cell, ...]:
            return tuple(cell for cell in cells if cell_key(cell) not in keys)

        for queue in self._queues.values():
            queue.pass_tasks = [
                dataclasses.replace(task, cells=cells)
                for task in queue.pass_tasks
                if (cells := remaining(task.cells))
            ]
            queue.scoring_tasks = [
                dataclasses.replace(task, pairs=tuple(pairs))
                for task in queue.scoring_tasks
                if (pairs := kept(task.pairs))
            ]
            queue.ready = {model: kept(pairs) for model, pairs in queue.ready.items()}
            for pool in queue.pools.values():
                pool.checkpoints = [
                    dataclasses.replace(each, cells=cells)
                    for each in pool.checkpoints
                    if (cells := remaining(each.cells))
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
        """Keys of the cells that are not finished."""
        running = {
            entry if running.quantizes else entry[0]
            for running in self.running.values()
            for entry in running.unfinished
        }
        queued: set[str] = set()
        for queue in self._queues.values():
            works: list[Any] = [
                *queue.scoring_tasks,
                *queue.pass_tasks,
                *(each for pool in queue.pools.values() for each in pool.checkpoints),
            ]
            queued |= {cell_key(cell) for each in works for cell in each.cells}
            queued |= {cell_key(cell) for pairs in queue.ready.values() for cell, _ in pairs}
        return running | queued | set(self._waiting)

    def _failed(self, running: RunningTask, failed: Failed) -> Failed:
        """A failure that the task itself reported; where memory ran out, the work is retried with more memory."""
        lost = self._concerned(running, failed)
        running.unfinished -= lost
        retry = (
            failed.kind is FailureKind.OUT_OF_MEMORY
            and bool(lost)
            and self._with_more_room(running, lost, smaller=False)
        )
        return dataclasses.replace(failed, retry=retry)

    def _concerned(self, running: RunningTask, failed: Failed) -> set[Any]:
        if running.quantizes:
            return running.unfinished & set(failed.cell_keys)
        named = {(key, name) for key, name in running.unfinished if key in failed.cell_keys}
        return {pair for pair in named if pair[1] == failed.stage} or named

    def _ended(self, running: RunningTask, end: Exit) -> Iterator[Event]:
        if not running.unfinished:
            return
        unfinished, running.unfinished = running.unfinished, set()
        keys = [
            key
            for key in map(cell_key, running.work.cells)
            if key in unfinished or any(key == pair[0] for pair in unfinished)
        ]
        if isinstance(running.work, ScoringTask) and end.kind not in (
            FailureKind.LOST,
            FailureKind.HEAD_LOST,
        ):
            # Cells are scored in order: the process died during the first unfinished one, and had not begun the others.
            behind = {pair for pair in unfinished if pair[0] != keys[0]}
            unfinished -= behind
            if behind:
                self._put_back(
                    dataclasses.replace(running.work, pairs=tuple(self._pairs(running, behind)))
                )
            keys = keys[:1]
        # A task that reports its own failure has recorded that memory ran out.
        if end.kind is FailureKind.OUT_OF_MEMORY:
            with contextlib.suppress(StoreError):
                # Main memory ran out, and more GPUs would not help.
                if isinstance(running.work, ScoringTask):
                    failures.ran_out(
                        self._store,
                        keys,
                        "evaluate",
                        running.work.batch_size or self.runtime.batch_size,
                        0,
                    )
                else:
                    together = (
                        0
                        if running.work.exclusive
                        else len({quantize_key(cell) for cell in running.work.cells})
                    )
                    failures.ran_out(self._store, keys, "quantize", together, 0)
        kind, reason = (
            end.kind or FailureKind.ERROR,
            end.reason or "the task ended without a result for this cell",
        )
        stage = "quantize" if running.quantizes else "evaluate"
        retry = end.kind is not None and self._changed_plan(running, end.kind, unfinished)
        yield Failed(
            time.time(),
            tuple(keys),
            stage=stage,
            kind=kind,
            reason=reason,
            detail=end.detail,
            retry=retry,
        )

    def _changed_plan(self, running: RunningTask, kind: FailureKind, unfinished: set[Any]) -> bool:
        """Queue the unfinished work of a process that ended; False where no other plan is left to try."""
        if kind is FailureKind.HEAD_LOST:  # not caused by the work
            self._requeue(running, [unfinished])
            return True
        if kind is FailureKind.LOST:
            if running.work.losses + 1 < LOSSES:
                self._requeue(running, [unfinished], losses=running.work.losses + 1)
                return True
            return False
        halves = self._halves(running, unfinished)
        if len(halves) > 1:
            self._requeue(running, halves, tried=True)
            return True
        if kind is FailureKind.OUT_OF_MEMORY:
            return self._with_more_room(running, unfinished, smaller=True)
        # Earlier cells may have left memory in use.
        if isinstance(running.work, ScoringTask) and len(running.work.pairs) > 1:
            self._requeue(running, [unfinished], tried=True)
            return True
        if kind is FailureKind.KILLED and not running.work.tried:
            self._requeue(running, [unfinished], tried=True, exclusive=True)
            return True
        return False

    def _with_more_room(self, running: RunningTask, lost: set[Any], smaller: bool) -> bool:
        """Retry work whose memory ran out: first one task per checkpoint, then a task that runs with no other task and scores in
        batches of 1, then (evaluations only) twice the GPUs, at last blocks in main memory. False where all of these were tried.

        smaller: whether batches of 1 were not tried yet. A task that reports its own failure has tried them; a task whose process
        was ended has not, and what ran out was the memory of its host, which more GPUs would not help.
        """
        host = smaller
        alone = len({quantize_key(cell) for cell in running.work.cells}) == 1
        smaller = (
            smaller
            and isinstance(running.work, ScoringTask)
            and (running.work.batch_size or self.runtime.batch_size) != 1
        )
        if not alone:
            self._requeue(running, self._each(running, lost), tried=True)
        elif (self.executor.worker_slots > 1 and not running.work.exclusive) or smaller:
            self._requeue(running, [lost], tried=True, exclusive=True, batch_size=1)
        elif (
            not host
            and isinstance(running.work, ScoringTask)
            and self.executor.max_gpus
            and not any(
                measures_device(evaluation)
                for _, wanted in running.work.pairs
                for evaluation in wanted
            )
        ):
            if running.work.offload:
                return False
            more = min(2 * running.work.devices, self.executor.max_gpus)
            min_gpus = self._defaults[running.work.cells[0].model].min_gpus
            changes = (
                {"devices": more}
                if more > running.work.devices
                else {"devices": min_gpus, "offload": True}
            )
            self._requeue(running, [lost], tried=True, batch_size=1, **changes)
        else:
            return False
        return True

    def _each(self, running: RunningTask, unfinished: set[Any]) -> list[set[Any]]:
        """The unfinished work as one set per checkpoint."""
        sets: dict[str, set[Any]] = {}
        for cell in running.work.cells:
            mine = {
                entry
                for entry in unfinished
                if (entry if running.quantizes else entry[0]) == cell_key(cell)
            }
            if mine:
                sets.setdefault(quantize_key(cell), set()).update(mine)
        return list(sets.values())

    def _halves(self, running: RunningTask, unfinished: set[Any]) -> list[set[Any]]:
        each = self._each(running, unfinished)
        middle = -(-len(each) // 2)
        return [set().union(*part) for part in (each[:middle], each[middle:]) if part]

    def _requeue(
        self, running: RunningTask, parts: Sequence[set[Any]], batch_size: int = 0, **changes: Any
    ) -> None:
        """Queue each part of a task's work as a task of its own."""
        for part in parts:
            if isinstance(running.work, ScoringTask):
                changes["batch_size"] = batch_size or running.work.batch_size
                pairs = tuple(self._pairs(running, part))
                self._queues[running.work.priority_tier].scoring_tasks.append(
                    dataclasses.replace(running.work, pairs=pairs, requeueable=False, **changes)
                )
            else:
                cells = tuple(cell for cell in running.work.cells if cell_key(cell) in part)
                disk = running.work.disk_bytes * len(cells) // len(running.work.cells)
                task = dataclasses.replace(
                    running.work, cells=cells, disk_bytes=disk, pool=None, made=(), **changes
                )
                self._queues[running.work.priority_tier].pass_tasks.append(task)

    @staticmethod
    def _pairs(running: RunningTask, unfinished: set[Any]) -> list[Pair]:
        assert isinstance(running.work, ScoringTask)
        pairs = []
        for cell, evaluations in running.work.pairs:
            left = tuple(
                evaluation
                for evaluation in evaluations
                if (cell_key(cell), evaluation.name) in unfinished
            )
            if left:
                pairs.append((cell, left))
        return pairs
