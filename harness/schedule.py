"""Runs what a plan has missing, here or on a cluster, and yields the events. The one importer of Ray.

Three executors give the same events for the same plan:

    local, one worker     in this process, one task after the other: no start-up, and a debugger stops where it should
    local, more workers   a fresh process per task on this machine, without Ray
    ray                   workers of a Ray cluster, started here (loopback only) or reached at an address

On GPUs every task has a fresh process, because what a task leaves behind on a card would be counted against the next one; on CPUs
Ray's workers are used again, because importing torch takes longer than many a task. Evaluations are submitted as checkpoints
appear; the cheapest pass comes first, so that there is soon something to look at, then the longest, so that none ends alone.

What fails is tried again by a changed plan, or not at all in this run:

    a task dies or hangs       its unfinished checkpoints in two halves, until the one that it dies of is alone; the others finish
    killed while alone         once more, with nothing beside it
    out of memory              in company: alone. Alone: with nothing beside it, evaluations in batches of 1. Then evaluations
                               on twice the GPUs as long as a node has them, at last with the model's blocks in main memory
    a node is lost             as it was, on another node, three times
    a cluster's head is lost   as it was, once another head has taken its place at the same address

Finished blocks and scores are kept, so a second try starts where the first ended. The next run of the sweep starts from whatever
the store holds.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

from harness import events, plugins, provenance, sources, work
from harness.cell import Cell, Evaluation, Model, cell_key, from_json, quantize_key, to_json
from harness.errors import ScheduleError, StoreError
from harness.events import Event, Failed, Joined, Quantized, Scored, TaskStarted
from harness.plan import Pass, Plan, count_cores, count_gpus, over_quota
from harness.store import Store
from harness.sweep import Runtime
from harness.work import EvaluateTask, QuantizeTask, Task

POLL_SECONDS = 1.0                              # how long an executor waits for events before deadlines are looked at
SILENCE_SECONDS = 90.0                          # after which Ray is asked whether a task's node still lives
PROBE_SECONDS = 60.0                            # for every node of a cluster to say what it sees
LOOK_SECONDS = 5.0                              # between two looks at a cluster's head and nodes
HEAD_SECONDS = 20.0                             # of silence after which the head counts as lost; Ray ends the driver after 60
RETURN_SECONDS = 600.0                          # for another head to take its place
JOIN_SECONDS = 60.0                             # for the first node that takes tasks to join a cluster
STOP_SECONDS = 5.0                              # between asking a process to end and ending it
LOSSES = 3                                      # nodes that may be lost under the same work
PRINTED_BYTES = 4000                            # of what a worker printed last, kept with its failure
log = logging.getLogger(__name__)

TASKS = {"quantize": QuantizeTask, "evaluate": EvaluateTask}


@dataclass(frozen=True)
class Exit:
    """How a task's process ended. kind "" is a normal end, else kind, reason and detail are those of `events.Failed`."""

    kind: str = ""
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Message:
    """News of one task: an event, or its end."""

    number: int
    news: Event | Exit


class Executor(Protocol):
    """Runs tasks somewhere. slots: how many at once; threads: CPU threads of each (0: as they are); share: of a GPU (0: none).

    most: GPUs that one task can have, which are those of the largest node; 0 where tasks use none.
    """

    slots: int
    threads: int
    share: float
    most: int

    def width(self, devices: int) -> int:
        """Slots that a task on so many GPUs takes."""
        ...

    def submit(self, number: int, task: Task) -> None: ...

    def wait(self) -> list[Message]:
        """News of the running tasks, waiting for some for at most POLL_SECONDS."""
        ...

    def cancel(self, number: int) -> None:
        """End a task's process; no more news of it will come."""
        ...

    def close(self) -> None:
        """End whatever still runs, and leave no process behind."""
        ...


def run(plan: Plan, command: str = "", seconds: float | None = None) -> Iterator[Event]:
    """Everything that the plan has missing, as events. Closing the generator ends all tasks.

    seconds: after which nothing is begun any more and what runs is ended; finished blocks and scores stay.
    Raises ScheduleError when no worker could ever take the tasks, StoreError when its quota has no room for the next checkpoints.
    """
    if not plan.passes and not plan.scorings:
        return
    ends = time.monotonic() + seconds if seconds is not None else float("inf")
    executor = make_executor(plan.sweep.runtime, plan.workers)
    wide = {each.cells[0].model.name: each.devices for each in plan.scorings if each.devices > max(1, executor.most)}
    if wide:
        executor.close()
        asked = "; ".join(f'model "{name}" takes {devices} GPUs of one node to evaluate' for name, devices in wide.items())
        raise ScheduleError(f"{asked}, and none has more than {executor.most}. Nothing was started. Leave it out, or add a node")
    board = _Board(plan, executor, command or provenance.command_line(), cheapest_first=seconds is not None)
    try:
        if isinstance(executor, RayCluster) and executor.dashboard:
            yield Joined(time.time(), dashboard=executor.dashboard)
        store = Store(plan.sweep.runtime.runs)
        shared: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if plan.sweep.runtime.cluster.address and isinstance(executor, RayCluster):
            shared = executor.shared(store, plan)
        with shared:
            while time.monotonic() < ends and not store.is_cancelled(plan.sweep.name) and (board.submit() or board.running):
                for message in executor.wait():
                    yield from board.receive(message)
                yield from board.deadlines()
                yield from board.cancelled()
            if board.full:
                raise StoreError(board.full)
    finally:
        executor.close()


def make_executor(runtime: Runtime, workers: int) -> Executor:
    """The executor that a sweep's `cluster` names."""
    if runtime.cluster.kind == "local" and not runtime.cluster.address:
        # A deadline needs a process that can be ended.
        if workers == 1 and not runtime.cluster.task_timeout_seconds:
            return InProcess(count_gpus() if runtime.device != "cpu" else 0)
        return Processes(workers, runtime)
    return RayCluster(runtime, workers)


# --- what to do next --------------------------------------------------------------------------------------------------------------


Pair = tuple[Cell, tuple[Evaluation, ...]]


@dataclass(frozen=True)
class _Walk:
    """Checkpoints to make in one task, which take about disk_bytes.

    losses: nodes lost under it; tried: it died before; apart: nothing may run beside it.
    """

    cells: tuple[Cell, ...]
    disk_bytes: int = 0
    losses: int = 0
    tried: bool = False
    apart: bool = False


@dataclass(frozen=True)
class _Look:
    """Cells to score in one task, otherwise as `_Walk`. batch_size 0: as the sweep says; devices, offload: as in `EvaluateTask`."""

    pairs: tuple[Pair, ...]
    losses: int = 0
    tried: bool = False
    apart: bool = False
    batch_size: int = 0
    devices: int = 1
    offload: bool = False

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for cell, _ in self.pairs)


@dataclass
class _Job:
    """A submitted task. unfinished: what has neither result nor failure: cell keys, or (cell key, evaluation) pairs.

    width: slots that it takes.
    """

    work: _Walk | _Look
    unfinished: set[Any]
    deadline: float
    width: int = 1
    started: bool = False

    @property
    def quantizes(self) -> bool:
        return isinstance(self.work, _Walk)


class _Board:
    """Which task comes next, and what its news means for the others."""

    def __init__(self, plan: Plan, executor: Executor, command: str, cheapest_first: bool = False) -> None:
        self.executor, self.command, self.runtime = executor, command, plan.sweep.runtime
        self.running: dict[int, _Job] = {}
        self._number = 0
        self._store = Store(self.runtime.runs)
        self._looked = time.monotonic()                                        # for cells that were cancelled
        passes = in_order(plan.passes, 1 if cheapest_first else executor.slots)
        self._quantize = collections.deque(_Walk(each.cells, each.disk_bytes, apart=each.apart) for each in passes)
        self._careful = plan.careful
        self._devices = {each.cells[0].model: each.devices for each in plan.scorings}
        self.full = ""                          # why no checkpoint may be begun, where the store has reached its quota
        unmade = {quantize_key(cell) for each in plan.passes for cell in each.cells}
        self._waiting: dict[str, list[Pair]] = {}
        self._ready: dict[Model, list[Pair]] = {}
        self._again: collections.deque[_Look] = collections.deque()
        for scoring in plan.scorings:
            for cell, evaluations in zip(scoring.cells, scoring.evaluations, strict=True):
                if quantize_key(cell) in unmade:
                    self._waiting.setdefault(cell_key(cell), []).append((cell, evaluations))
                else:
                    self._make_ready(cell, evaluations)

    def _make_ready(self, cell: Cell, evaluations: tuple[Evaluation, ...]) -> None:
        """Give a cell to be scored: by itself what needs its device for itself, and what memory ran out for before."""
        devices = self._devices[cell.model]
        exclusive = tuple(e for e in evaluations if self._needs_all(e))
        if exclusive:
            self._again.append(_Look(((cell, exclusive),), apart=True, devices=devices))
        others = tuple(e for e in evaluations if e not in exclusive)
        if others and cell_key(cell) in self._careful:
            self._again.append(_Look(((cell, others),), batch_size=1, devices=devices))
        elif others:
            self._ready.setdefault(cell.model, []).append((cell, others))

    def _needs_all(self, evaluation: Evaluation) -> bool:
        """A measurement of a device, where tasks do not have one each."""
        facts = plugins.find("evaluator").get(evaluation.evaluator)
        return self.executor.slots > 1 and self.executor.share != 1.0 and facts is not None and facts.get("exclusive", False)

    def submit(self) -> bool:
        """Fill the free slots; True when anything was submitted."""
        submitted = False
        while (free := self.executor.slots - sum(job.width for job in self.running.values())) > 0 and self._submit_one(free):
            submitted = True
        return submitted

    def _width(self, look: _Look) -> int:
        """Slots of a task; what takes more than there are waits for all of them."""
        return min(self.executor.slots, self.executor.width(look.devices))

    def _submit_one(self, free: int) -> bool:
        """Scores before checkpoints: a number to look at is worth more than a checkpoint to wait with."""
        if any(job.work.apart or (job.width > 1 and not job.started) for job in self.running.values()):
            return False                        # one that waits for several GPUs of a node would wait for ever beside small ones
        if self._again and not self._again[0].apart:
            if self._width(self._again[0]) > free:
                return False
            self._start(self._again.popleft())
        elif any(self._ready.values()):
            model = max(self._ready, key=lambda model: (bool(self._ready[model]), self._devices[model], len(self._ready[model])))
            width = self._width(_Look((), devices=self._devices[model]))
            if width > free:
                return False
            share = max(1, -(-len(self._ready[model]) // (free // width)))
            chosen, self._ready[model] = self._ready[model][:share], self._ready[model][share:]
            self._start(_Look(tuple(chosen), devices=self._devices[model]))
        elif self._quantize and not self._quantize[0].apart and self._has_room(self._quantize[0]):
            self._start(self._quantize.popleft())
        elif not self.running and self._again:
            self._start(self._again.popleft())
        elif not self.running and self._quantize and self._has_room(self._quantize[0]):
            self._start(self._quantize.popleft())
        else:
            return False
        return True

    def _has_room(self, walk: _Walk) -> bool:
        """Whether the quota of the store has room for what is being made and for these checkpoints too."""
        if not self.runtime.store.quota:
            return True
        underway = sum(job.work.disk_bytes for job in self.running.values() if isinstance(job.work, _Walk))
        self.full = over_quota(self.runtime, self._store.used_bytes(), underway + walk.disk_bytes)
        return not self.full

    def _start(self, work: _Walk | _Look) -> None:
        common: dict[str, Any] = {
            "runs": str(self._store.place), "device": self.runtime.device, "threads": self.executor.threads,
            "command": self.command, "share": self.executor.share or 1.0,
        }
        task: Task
        unfinished: set[Any]
        if isinstance(work, _Walk):
            task, unfinished = QuantizeTask(work.cells, **common), set(map(cell_key, work.cells))
        else:
            wanted = tuple(evaluations for _, evaluations in work.pairs)
            size = work.batch_size or self.runtime.batch_size
            task = EvaluateTask(work.cells, wanted, batch_size=size, devices=work.devices, offload=work.offload, **common)
            unfinished = {(cell_key(cell), e.name) for cell, evaluations in work.pairs for e in evaluations}
        self._number += 1
        width = self._width(work) if isinstance(work, _Look) else 1
        self.running[self._number] = _Job(work, unfinished, self._deadline(), width)
        self.executor.submit(self._number, task)

    def _deadline(self) -> float:
        limit = self.runtime.cluster.task_timeout_seconds
        return time.monotonic() + limit if limit else float("inf")

    def receive(self, message: Message) -> Iterator[Event]:
        """Pass an event on, after drawing the consequences."""
        job, news = self.running[message.number], message.news
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
                # A task may have waited for a slot of the cluster; its time counts from here.
                job.deadline, job.started = self._deadline(), True
                yield news
            case _:
                yield news

    def deadlines(self) -> Iterator[Event]:
        """End the tasks whose time is over."""
        now = time.monotonic()
        for number, job in list(self.running.items()):
            if now > job.deadline:
                self.executor.cancel(number)
                del self.running[number]
                limit = self.runtime.cluster.task_timeout_seconds
                yield from self._ended(job, Exit("timeout", f"ended after {limit:g} s (cluster.task_timeout_seconds)"))

    def cancelled(self) -> Iterator[Event]:
        """Once a second: take out the cells that `harness cancel` named. Their tasks end; what else was in them is given again."""
        if time.monotonic() - self._looked < POLL_SECONDS:
            return
        self._looked = time.monotonic()
        keys = self._store.cancelled_names() & self._open_cells()
        if not keys:
            return
        for number, job in list(self.running.items()):
            if any(cell_key(cell) in keys for cell in job.work.cells):
                self.executor.cancel(number)
                del self.running[number]
                left = {entry for entry in job.unfinished if (entry if job.quantizes else entry[0]) not in keys}
                if left:
                    self._give(job, [left], tried=job.work.tried)

        def kept(pairs: Iterable[Pair]) -> list[Pair]:
            return [pair for pair in pairs if cell_key(pair[0]) not in keys]

        walks = [(walk, tuple(cell for cell in walk.cells if cell_key(cell) not in keys)) for walk in self._quantize]
        self._quantize = collections.deque(dataclasses.replace(walk, cells=cells) for walk, cells in walks if cells)
        looks = [(look, tuple(kept(look.pairs))) for look in self._again]
        self._again = collections.deque(dataclasses.replace(look, pairs=pairs) for look, pairs in looks if pairs)
        self._ready = {model: kept(pairs) for model, pairs in self._ready.items()}
        self._waiting = {key: pairs for key, pairs in self._waiting.items() if key not in keys}
        yield Failed(time.time(), tuple(sorted(keys)), stage="cell", kind="cancelled", reason="cancelled with harness cancel")

    def _open_cells(self) -> set[str]:
        """Keys of the cells for which something is still to do."""
        running = {entry if job.quantizes else entry[0] for job in self.running.values() for entry in job.unfinished}
        queued = {cell_key(cell) for walk in self._quantize for cell in walk.cells}
        again = {cell_key(cell) for look in self._again for cell in look.cells}
        ready = {cell_key(cell) for pairs in self._ready.values() for cell, _ in pairs}
        return running | queued | again | ready | set(self._waiting)

    def _failed(self, job: _Job, failed: Failed) -> Failed:
        """A failure that the task itself reported; one for lack of memory is tried again with more room."""
        lost = self._concerned(job, failed)
        job.unfinished -= lost
        retry = failed.kind == "out_of_memory" and bool(lost) and self._with_more_room(job, lost, smaller=False)
        return dataclasses.replace(failed, retry=retry)

    def _concerned(self, job: _Job, failed: Failed) -> set[Any]:
        if job.quantizes:
            return job.unfinished & set(failed.cell_keys)
        named = {(key, name) for key, name in job.unfinished if key in failed.cell_keys}
        return {pair for pair in named if pair[1] == failed.stage} or named

    def _ended(self, job: _Job, end: Exit) -> Iterator[Event]:
        if not job.unfinished:
            return
        unfinished, job.unfinished = job.unfinished, set()
        keys = [key for key in map(cell_key, job.work.cells) if key in unfinished or any(key == pair[0] for pair in unfinished)]
        if isinstance(job.work, _Look) and end.kind not in ("lost", "head_lost"):
            # Cells are scored in order: the first unfinished one is what the process died of, the others were only behind it.
            behind = {pair for pair in unfinished if pair[0] != keys[0]}
            unfinished -= behind
            self._ready.setdefault(job.work.cells[0].model, []).extend(self._pairs(job, behind))
            keys = keys[:1]
        if end.kind == "out_of_memory":         # a task that ends itself has noted it
            together = len({quantize_key(cell) for cell in job.work.cells}) if job.quantizes else 2
            with contextlib.suppress(StoreError):
                work.ran_out(self._store, keys, "quantize" if job.quantizes else "evaluate", 0 if job.work.apart else together, 0)
        kind, reason = end.kind or "error", end.reason or "the task ended without a result for this cell"
        stage = "quantize" if job.quantizes else "evaluate"
        retry = bool(end.kind) and self._changed_plan(job, end.kind, unfinished)
        yield Failed(time.time(), tuple(keys), stage=stage, kind=kind, reason=reason, detail=end.detail, retry=retry)

    def _changed_plan(self, job: _Job, kind: str, unfinished: set[Any]) -> bool:
        """Queue what a process left when it ended; False where there is no other way left to try it."""
        if kind == "head_lost":                 # nothing that the work could have done
            self._give(job, [unfinished])
            return True
        if kind == "lost":
            if job.work.losses + 1 < LOSSES:
                self._give(job, [unfinished], losses=job.work.losses + 1)
                return True
            return False
        halves = self._halves(job, unfinished)
        if len(halves) > 1:
            self._give(job, halves, tried=True)
            return True
        if kind == "out_of_memory":
            return self._with_more_room(job, unfinished, smaller=True)
        if isinstance(job.work, _Look) and len(job.work.pairs) > 1:            # others were in memory before it
            self._give(job, [unfinished], tried=True)
            return True
        if kind == "killed" and not job.work.tried:
            self._give(job, [unfinished], tried=True, apart=True)
            return True
        return False

    def _with_more_room(self, job: _Job, lost: set[Any], smaller: bool) -> bool:
        """Each checkpoint or cell alone; what was alone, with nothing beside it and in batches of 1; evaluations then on twice the
        GPUs, and at last with blocks in main memory. What had all that, not again.

        smaller: whether smaller batches are a change; a task that reports its own end has tried them. One that could not was ended
        for the memory of its host, which more GPUs do not help.
        """
        host = smaller
        alone = len({quantize_key(cell) for cell in job.work.cells}) == 1
        smaller = smaller and isinstance(job.work, _Look) and (job.work.batch_size or self.runtime.batch_size) != 1
        if not alone:
            self._give(job, self._each(job, lost), tried=True)
        elif (self.executor.slots > 1 and not job.work.apart) or smaller:
            self._give(job, [lost], tried=True, apart=True, batch_size=1)
        elif not host and isinstance(job.work, _Look) and self.executor.most and not self._measures(job.work):
            if job.work.offload:
                return False
            more = min(2 * job.work.devices, self.executor.most)
            changes = {"devices": more} if more > job.work.devices else {"devices": 1, "offload": True}
            self._give(job, [lost], tried=True, batch_size=1, **changes)
        else:
            return False
        return True

    @staticmethod
    def _measures(look: _Look) -> bool:
        """An evaluation measures the device that it is on: several, or one that waits for main memory, are another."""
        facts = plugins.find("evaluator")
        named = {evaluation.evaluator for _, wanted in look.pairs for evaluation in wanted}
        return any(name in facts and facts[name].get("exclusive", False) for name in named)

    def _each(self, job: _Job, unfinished: set[Any]) -> list[set[Any]]:
        """Unfinished work, one set per checkpoint."""
        sets: dict[str, set[Any]] = {}
        for cell in job.work.cells:
            mine = {entry for entry in unfinished if (entry if job.quantizes else entry[0]) == cell_key(cell)}
            if mine:
                sets.setdefault(quantize_key(cell), set()).update(mine)
        return list(sets.values())

    def _halves(self, job: _Job, unfinished: set[Any]) -> list[set[Any]]:
        each = self._each(job, unfinished)
        middle = -(-len(each) // 2)
        return [set().union(*part) for part in (each[:middle], each[middle:]) if part]

    def _give(self, job: _Job, parts: Sequence[set[Any]], batch_size: int = 0, **changes: Any) -> None:
        """Queue each part of a job's work as a task of its own."""
        for part in parts:
            if isinstance(job.work, _Look):
                size = batch_size or job.work.batch_size
                self._again.append(dataclasses.replace(job.work, pairs=tuple(self._pairs(job, part)), batch_size=size, **changes))
            else:
                cells = tuple(cell for cell in job.work.cells if cell_key(cell) in part)
                self._quantize.append(dataclasses.replace(job.work, cells=cells, **changes))

    @staticmethod
    def _pairs(job: _Job, unfinished: set[Any]) -> list[Pair]:
        assert isinstance(job.work, _Look)
        pairs = []
        for cell, evaluations in job.work.pairs:
            left = tuple(evaluation for evaluation in evaluations if (cell_key(cell), evaluation.name) in unfinished)
            if left:
                pairs.append((cell, left))
        return pairs


def in_order(passes: Sequence[Pass], slots: int) -> list[Pass]:
    """The cheapest first, so that results come soon; then the longest, so that it does not run alone at the end.

    With one slot nothing runs beside anything, and cheap before dear is best throughout. What costs the same keeps its place.
    """
    by_cost = sorted(passes, key=lambda each: each.seconds or 0.0)
    return by_cost if slots == 1 else by_cost[:1] + sorted(by_cost[1:], key=lambda each: -(each.seconds or 0.0))


# --- this process ----------------------------------------------------------------------------------------------------------------


class InProcess:
    """One task after the other in this process."""

    slots = 1
    threads = 0
    share = 1.0

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self._current: tuple[int, Iterator[Event]] | None = None

    def width(self, devices: int) -> int:
        return 1

    def submit(self, number: int, task: Task) -> None:
        self._current = number, work.run(task)

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


# --- processes of this machine ----------------------------------------------------------------------------------------------------


class Processes:
    """A fresh process per task on this machine. Each sees as many of its GPUs as the task needs, where there are any.

    A worker reads its task as JSON from its standard input and writes events as lines of JSON to a pipe; what libraries print goes
    to a file, whose end is the detail of a failure.
    """

    def __init__(self, workers: int, runtime: Runtime) -> None:
        self.slots = workers
        self.threads = max(1, count_cores() // workers)
        self._gpus = count_gpus() if runtime.device != "cpu" else 0
        self._hidden = runtime.device == "cpu"
        self.share, self.most = min(1.0, self._gpus / workers), self._gpus
        self._news: queue.Queue[Message] = queue.Queue()
        self._running: dict[int, tuple[subprocess.Popen[str], list[int]]] = {}

    def width(self, devices: int) -> int:
        """Where tasks share GPUs, one that needs several has the machine to itself."""
        if devices <= 1:
            return 1
        return self.slots if self._gpus < self.slots else -(-devices // (self._gpus // self.slots))

    def submit(self, number: int, task: Task) -> None:
        devices = getattr(task, "devices", 1)
        taken = {place for _, places in self._running.values() for place in places}
        places = [place for place in range(self.slots) if place not in taken][: self.width(devices)]
        environment = {**os.environ, **process_environment(self.threads)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(_visible_gpu(index) for index in self._gpus_of(places)[:devices])
        elif self._hidden:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        ours, theirs = os.pipe()
        printed = tempfile.TemporaryFile("w+", errors="replace")
        command = [sys.executable, "-c", "from harness.schedule import serve; serve()", str(theirs), str(os.getpid())]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=printed, stderr=printed, pass_fds=(theirs,), text=True,
        )
        os.close(theirs)
        self._running[number] = process, places
        threading.Thread(target=self._listen, args=(number, process, ours, printed), daemon=True).start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:          # one that died at once is told of by its exit
            json.dump(encode(task), process.stdin)

    def _gpus_of(self, places: Sequence[int]) -> list[int]:
        """The GPUs of slots: each has some of its own, or shares one with others."""
        each = max(1, self._gpus // self.slots)
        if len(places) == self.slots:
            return list(range(self._gpus))
        return [index % self._gpus for place in places for index in range(place * each, (place + 1) * each)]

    def _listen(self, number: int, process: subprocess.Popen[str], pipe: int, printed: IO[str]) -> None:
        with open(pipe, encoding="utf-8") as lines, printed:
            for line in lines:
                if line.endswith("\n"):                                    # a killed worker may leave half a line
                    self._news.put(Message(number, decode_event(json.loads(line))))
            code = process.wait()
            printed.seek(0, os.SEEK_END)
            printed.seek(max(0, printed.tell() - PRINTED_BYTES))
            self._news.put(Message(number, _exit_of(code, printed.read())))

    def wait(self) -> list[Message]:
        messages = []
        try:
            messages.append(self._news.get(timeout=POLL_SECONDS))
            while True:
                messages.append(self._news.get_nowait())
        except queue.Empty:
            pass
        known = [message for message in messages if message.number in self._running]       # a cancelled task has no more news
        for message in known:
            if isinstance(message.news, Exit):
                del self._running[message.number]
        return known

    def cancel(self, number: int) -> None:
        process, _ = self._running.pop(number)
        _end([process])

    def close(self) -> None:
        _end([process for process, _ in self._running.values()])
        self._running.clear()


def serve() -> None:
    """The main function of a worker process. Arguments: the pipe for events, the driver's process id."""
    pipe, driver = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # the driver decides what an interrupt ends
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()
    with open(pipe, "w", encoding="utf-8") as out:
        for event in work.run(decode(json.load(sys.stdin))):
            out.write(json.dumps(encode_event(event)) + "\n")
            out.flush()


def process_environment(threads: int) -> dict[str, str]:
    """Environment of a worker process; must be set before torch is loaded."""
    return {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",          # a task without a GPU must not see all of them
    }


def encode(task: Task) -> dict[str, Any]:
    """A task as JSON values: what crosses to another process."""
    return {"kind": next(kind for kind, task_type in TASKS.items() if isinstance(task, task_type)), "task": to_json(task)}


def decode(data: Mapping[str, Any]) -> Task:
    """The inverse of `encode`."""
    return from_json(TASKS[data["kind"]], data["task"])


def encode_event(event: Event) -> dict[str, Any]:
    """An event as JSON values."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def decode_event(data: Mapping[str, Any]) -> Event:
    """The inverse of `encode_event`."""
    fields = {name: value for name, value in data.items() if name != "event"}
    return typing.cast(Event, getattr(events, data["event"])(**{**fields, "cell_keys": tuple(data["cell_keys"])}))


def _end_with(driver: int) -> None:
    """End this process when the driver is gone, however it went."""
    while os.getppid() == driver:
        time.sleep(0.5)
    os._exit(1)


def _exit_of(code: int, printed: str) -> Exit:
    if code == 0:
        return Exit()
    if code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
        hint = "; the system ends processes so when memory runs out" if name == "SIGKILL" else ""
        return Exit("killed", f"the worker process was ended by {name}{hint}", printed)
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "it said nothing")
    return Exit("error", f"the worker process ended with code {code}: {last}", printed)


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _visible_gpu(index: int) -> str:
    """The index-th GPU that this process itself may see."""
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    return visible[index] if index < len(visible) else str(index)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- Ray -------------------------------------------------------------------------------------------------------------------------


class RayCluster:
    """Tasks on a Ray cluster: one of its own on the loopback interface unless an address is given.

    cluster.settings go to `ray.init` (num_cpus, num_gpus, …), but for cpus_per_task, which is the CPU share of one task.

    At an address, slots follow the nodes that join and leave, and a head that is lost is waited for.
    """

    def __init__(self, runtime: Runtime, workers: int) -> None:
        cluster = runtime.cluster
        self._ray = _import_ray(own=not cluster.address)
        self._address, self._settings, self._workers = cluster.address, dict(cluster.settings), workers
        cpus = self._settings.pop("cpus_per_task", None)
        self.threads = int(cpus or (max(1, count_cores() // workers) if not cluster.address else 1))
        self.dashboard = ""
        self._started = self._connect(self._address, self._settings)
        self._alive: set[str] = set()
        nodes = self._joined(JOIN_SECONDS)
        has_gpu = any(node.get("GPU", 0) for node in nodes)
        gpus = cluster.gpus_per_task if runtime.device != "cpu" and (has_gpu or runtime.device == "cuda") else 0.0
        self._asked = {"CPU": float(self.threads), "GPU": gpus}
        self.share = min(1.0, gpus)
        self.most = self._count_most(nodes)
        self._check(nodes)
        self.slots = self._count_slots(nodes)
        self._head = "" if self._started else str(self._ray.get_runtime_context().gcs_address)
        self._looked = self._answered = time.monotonic()
        self._shared: list[str] = []            # what tasks look for first: the store, its probe, folders of models
        # Workers of an own cluster inherit the environment; a runtime_env would keep Ray from using those it started ahead.
        options: dict[str, Any] = {} if self._started else {"runtime_env": {"env_vars": process_environment(self.threads)}}
        if gpus:
            options["max_calls"] = 1            # a fresh process per task; on the CPU a process keeps its imports (5 s) and no more
        self._remote = self._ray.remote(
            num_cpus=self.threads, num_gpus=gpus, max_retries=0, num_returns="streaming", **options
        )(_stream)
        self._running: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}        # where a task said that it runs
        self._around: dict[int, set[str]] = {}  # the nodes of the time when it was submitted
        self._heard: dict[int, float] = {}

    def _connect(self, address: str, settings: dict[str, Any]) -> bool:
        """Join the cluster at an address, or start one here; True when it was started here."""
        if self._ray.is_initialized():
            return False
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if address:
                context = self._ray.init(address=address, **quiet, **settings)
                self.dashboard = str(getattr(context, "dashboard_url", "") or "")
                return False
            own: dict[str, Any] = {
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "num_cpus": count_cores(),
            }
            # "local", because a stale cluster file makes a plain init join what no longer runs.
            with _environment(process_environment(self.threads)):
                self._ray.init(address="local", **{**own, **quiet, **settings})
        except Exception as error:              # Ray raises its own, OSError, ValueError, ConnectionError and RuntimeError
            where = f"the Ray cluster at {address} cannot be reached" if address else "Ray cannot start on this machine"
            way_out = "check `ray status` there" if address else "run with cluster=local to do without it"
            raise ScheduleError(f"{where}: {_first_line(error)}; {way_out}") from error
        return True

    def _joined(self, seconds: float) -> list[dict[str, float]]:
        """What each living node has, once some node takes tasks or the time is over: a cluster's nodes may still be starting."""
        ends = time.monotonic() + seconds
        while True:
            nodes = self._living()
            if any(node.get("CPU", 0) for node in nodes) or time.monotonic() > ends:
                return nodes
            time.sleep(POLL_SECONDS)

    def _living(self) -> list[dict[str, float]]:
        """What each living node has."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        self._alive = {str(node["NodeID"]) for node in nodes}
        return [node["Resources"] for node in nodes]

    def _count_slots(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """Tasks that run at once: what fits on each node."""
        wanted = [(name, amount) for name, amount in self._asked.items() if amount]
        fit = sum(min(int(node.get(name, 0) / amount) for name, amount in wanted) for node in nodes)
        return max(1, fit if self._address else min(self._workers, fit))

    def _count_most(self, nodes: Sequence[Mapping[str, float]]) -> int:
        return int(max((node.get("GPU", 0) for node in nodes), default=0)) if self._asked["GPU"] else 0

    def width(self, devices: int) -> int:
        return 1 if devices <= 1 else max(1, -int(-devices // self._asked["GPU"]))

    def _check(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """A request that no node can meet would wait in silence."""
        wanted = self._asked
        if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
            return
        asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        have = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in wanted) for node in nodes) or "none"
        total = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in wanted)
        raise ScheduleError(
            f"no node of the cluster can take a task, which asks for {asked}. Nodes have: {have} (in all {total}). "
            "Lower cluster.gpus_per_task, set device=cpu, or add a node."
        )

    @contextlib.contextmanager
    def shared(self, store: Store, plan: Plan) -> Iterator[None]:
        """Raise ScheduleError naming every node that does not see the store, or a model's folder, of this process.

        Each node is asked for a file that was written just now: a folder of the same name on a disk of its own has none. The file
        stays for the tasks, which look for it too: they may run on nodes that join later.
        """
        cells = [cell for each in plan.passes for cell in each.cells] + [cell for each in plan.scorings for cell in each.cells]
        folders = {folder for cell in cells if (folder := _local(cell.model))}
        with store.probe() as probe:
            self._shared = [str(store.place), probe.name, *sorted(folders)]
            asked = {}
            for node in self._ray.nodes():
                if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
                    place = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    look = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(_missing_paths)
                    asked[look.remote(self._shared)] = node.get("NodeManagerHostname") or node["NodeManagerAddress"]
            answered, silent = self._ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
            problems = [f"node {asked[each]} did not answer within {PROBE_SECONDS:g} s" for each in silent]
            for each in answered:
                try:
                    problems += [f"node {asked[each]} does not see {what}" for what in self._ray.get(each)]
                except self._ray.exceptions.RayError as error:
                    problems.append(f"node {asked[each]}: {_first_line(error)}")
            if problems:
                raise self._not_shared(problems, "Nothing was started. ")
            yield
        self._shared = []

    def _not_shared(self, problems: Sequence[str], so_far: str = "") -> ScheduleError:
        return ScheduleError(
            f"{'; '.join(problems)}. {so_far}Results and models must lie where all nodes see them: set runs= to a folder on a "
            "shared file system or to an object store, and name models by a path that all see or by their hub id"
        )

    def submit(self, number: int, task: Task) -> None:
        devices = getattr(task, "devices", 1)
        remote = self._remote.options(num_gpus=max(devices, self._asked["GPU"])) if devices > 1 else self._remote
        self._running[number] = remote.remote(encode(task), self._shared)
        self._heard[number], self._around[number] = time.monotonic(), self._alive

    def wait(self) -> list[Message]:
        lost = self._look()
        if lost:
            return lost
        numbers = {stream: number for number, stream in self._running.items()}
        if not numbers:
            return []
        ready, _ = self._ray.wait(list(numbers), num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        messages = [message for stream in ready if (message := self._read(numbers[stream])) is not None]
        return messages + self._lost()

    def _read(self, number: int) -> Message | None:
        self._heard[number] = time.monotonic()
        try:
            news = self._ray.get(next(self._running[number]))
        except StopIteration:
            return self._forget(number, Exit())
        except self._ray.exceptions.OutOfMemoryError as error:
            return self._forget(number, Exit("out_of_memory", f"the node ran out of memory: {_first_line(error)}"))
        except (self._ray.exceptions.NodeDiedError, self._ray.exceptions.ObjectLostError) as error:
            return self._forget(number, Exit("lost", f"the node of the task was lost: {_first_line(error)}"))
        except self._ray.exceptions.RayTaskError as error:
            return self._forget(number, Exit("error", f"the task broke off: {_first_line(error.cause or error)}"))
        except self._ray.exceptions.RayError as error:
            return self._forget(number, Exit("killed", f"the worker process was ended: {_first_line(error)}"))
        if isinstance(news, tuple):             # a task's first word is where it runs, and what it does not see there
            self._nodes[number], name, missing = news
            if missing:
                raise self._not_shared([f"node {name} does not see {what}" for what in missing])
            return None
        return Message(number, news)

    def _look(self) -> list[Message]:
        """Every LOOK_SECONDS: slots for the nodes of now. The tasks of a head that was lost, when another has taken its place."""
        now = time.monotonic()
        if not self._head or now - self._looked < LOOK_SECONDS:
            return []
        self._looked = now
        if _answers(self._head):
            self._answered = now
            nodes = self._living()
            self.slots, self.most = self._count_slots(nodes), self._count_most(nodes)
            return []
        if now - self._answered < HEAD_SECONDS:
            return []
        end = Exit("head_lost", f"the head of the cluster at {self._head} no longer answers")
        lost = [self._forget(number, end) for number in list(self._running)]
        self._ray.shutdown()                    # before Ray ends this process
        self._rejoin()
        return lost

    def _rejoin(self) -> None:
        """Join the cluster that takes the lost one's place. Raises ScheduleError where none does."""
        log.warning("the head of the cluster at %s no longer answers; waiting %g s for it", self._head, RETURN_SECONDS)
        ends = time.monotonic() + RETURN_SECONDS
        while time.monotonic() < ends:
            time.sleep(POLL_SECONDS)
            if not _answers(self._head):
                continue
            with contextlib.suppress(ScheduleError):                           # it is only just starting
                self._connect(self._address, self._settings)
                nodes = self._joined(ends - time.monotonic())
                self._check(nodes)
                self.slots, self.most = self._count_slots(nodes), self._count_most(nodes)
                self._looked = self._answered = time.monotonic()
                return
            self._ray.shutdown()
        raise ScheduleError(
            f"the head of the cluster at {self._head} is lost, and none took its place within {RETURN_SECONDS:g} s. "
            "What was finished is in the store: start the cluster again, then the same command goes on"
        )

    def _lost(self) -> list[Message]:
        """Tasks on nodes that Ray has given up: their streams stay silent for minutes.

        One that has not yet said where it runs counts as lost with any node of its time; if it only waited, it waits again.
        """
        now = time.monotonic()
        silent = [number for number in self._running if now - self._heard[number] > SILENCE_SECONDS]
        if not silent:
            return []
        self._living()
        alive, lost = self._alive, []
        for number in silent:
            self._heard[number] = now
            gone = ({self._nodes[number]} if number in self._nodes else self._around[number]) - alive
            if gone:
                names = ", ".join(sorted(node[:12] for node in gone))
                self.cancel(number)
                lost.append(Message(number, Exit("lost", f"node {names} no longer answers")))
        return lost

    def _forget(self, number: int, end: Exit) -> Message:
        for known in (self._running, self._nodes, self._around, self._heard):
            known.pop(number, None)
        return Message(number, end)

    def cancel(self, number: int) -> None:
        stream = self._running[number]
        self._forget(number, Exit())
        with contextlib.suppress(Exception):    # a task that ended meanwhile
            self._ray.cancel(stream, force=True)

    def close(self) -> None:
        for number in list(self._running):
            self.cancel(number)
        if self._started:
            self._ray.shutdown()


def _stream(data: Mapping[str, Any], shared: Sequence[str]) -> Iterator[Any]:
    """The body of a Ray task: its node, the node's name, and which of the `shared` paths that does not see; then the events."""
    import ray

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    missing = _missing_paths(shared)
    yield ray.get_runtime_context().get_node_id(), socket.gethostname(), missing
    if not missing:
        yield from work.run(decode(data))


def _answers(address: str) -> bool:
    """Whether a program listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True


def _missing_paths(shared: Sequence[str]) -> list[str]:
    """The body of a probe: what this node does not see. shared: the store, the probe that was written in it, other paths."""
    if not shared:
        return []
    runs, probe, *paths = shared
    try:
        store = Store(runs)
        seen, why = store.files.exists(store.root / probe), "where this process writes"
    except StoreError as error:                 # no package, no credentials, no way there
        seen, why = False, str(error)
    return [f"{runs}, {why}"] * (not seen) + [path for path in paths if not os.path.exists(path)]


def _local(model: Model) -> str | None:
    """The folder that a model's source names, or None for the embedded model and for a hub id."""
    return str(sources.model_folder(model)) if os.path.isabs(os.path.expanduser(model.source)) else None


def _import_ray(own: bool = True) -> Any:
    """Ray, set up before it is loaded. own: for a cluster that is started here, and must not be reached from elsewhere."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")    # a task without a GPU must not see all of them
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if own:
        # Else Ray replaces 127.0.0.1 by the machine's address and listens on every interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ScheduleError(f"Ray cannot be imported ({error}); install it, or run with cluster=local to do without it") from error
    return ray


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


__all__ = ["Executor", "InProcess", "Processes", "RayCluster", "decode", "encode", "make_executor", "run"]
