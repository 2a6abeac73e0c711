"""Runs what a plan has missing, here or on a cluster, and yields the events. The one importer of Ray.

Three executors give the same events for the same plan:

    local, one worker     in this process, one task after the other: no start-up, and a debugger stops where it should
    local, more workers   a fresh process per task on this machine, without Ray
    ray                   workers of a Ray cluster, started here (loopback only) or reached at an address

On GPUs every task has a fresh process, because what a task leaves behind on a card would be counted against the next one; on CPUs
Ray's workers are used again, because importing torch takes longer than many a task. Evaluations are submitted as checkpoints
appear. A task that is killed, or a cell that ran out of memory in company, is tried once more by a changed plan: each unfinished
checkpoint alone. What was alone already is not tried again in this run; a node that was lost changes the plan by itself. The next
run of the sweep starts from whatever the store holds.
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
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

from harness import events, provenance, work
from harness.cell import Cell, Evaluation, Model, cell_key, from_json, quantize_key, to_json
from harness.errors import ScheduleError
from harness.events import Event, Failed, Quantized, Scored, TaskStarted
from harness.plan import Plan, count_cores, count_gpus
from harness.sweep import Runtime
from harness.work import EvaluateTask, QuantizeTask, Task

POLL_SECONDS = 1.0                              # how long an executor waits for events before deadlines are looked at
SILENCE_SECONDS = 90.0                          # after which Ray is asked whether a task's node still lives
STOP_SECONDS = 5.0                              # between asking a process to end and ending it
PRINTED_BYTES = 4000                            # of what a worker printed last, kept with its failure
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
    """Runs tasks somewhere. slots: how many at once; threads: CPU threads of each (0: as they are)."""

    slots: int
    threads: int

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


def run(plan: Plan, command: str = "") -> Iterator[Event]:
    """Everything that the plan has missing, as events. Closing the generator ends all tasks.

    Raises ScheduleError when no worker could ever take the tasks.
    """
    if not plan.passes and not plan.scorings:
        return
    executor = make_executor(plan.sweep.runtime, plan.workers)
    board = _Board(plan, executor, command or provenance.command_line())
    try:
        while board.submit() or board.running:
            for message in executor.wait():
                yield from board.receive(message)
            yield from board.deadlines()
    finally:
        executor.close()


def make_executor(runtime: Runtime, workers: int) -> Executor:
    """The executor that a sweep's `cluster` names."""
    if runtime.cluster.kind == "local" and not runtime.cluster.address:
        # A deadline needs a process that can be ended.
        if workers == 1 and not runtime.cluster.task_timeout_seconds:
            return InProcess()
        return Processes(workers, runtime)
    return RayCluster(runtime, workers)


# --- what to do next --------------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """A submitted task. unfinished: what has neither result nor failure: cell keys, or (cell key, evaluation) pairs."""

    task: Task
    unfinished: set[Any]
    retried: bool
    deadline: float


class _Board:
    """Which task comes next, and what its news means for the others."""

    def __init__(self, plan: Plan, executor: Executor, command: str) -> None:
        self.executor, self.command, self.runtime = executor, command, plan.sweep.runtime
        self.running: dict[int, _Job] = {}
        self._number = 0
        self._quantize = collections.deque((each.cells, False) for each in plan.passes)
        unmade = {quantize_key(cell) for each in plan.passes for cell in each.cells}
        self._waiting: dict[str, list[tuple[Cell, tuple[Evaluation, ...]]]] = {}
        self._ready: dict[Model, list[tuple[Cell, tuple[Evaluation, ...]]]] = {}
        self._alone: collections.deque[tuple[Cell, tuple[Evaluation, ...]]] = collections.deque()
        for scoring in plan.scorings:
            for cell, evaluations in zip(scoring.cells, scoring.evaluations, strict=True):
                if quantize_key(cell) in unmade:
                    self._waiting.setdefault(cell_key(cell), []).append((cell, evaluations))
                else:
                    self._ready.setdefault(cell.model, []).append((cell, evaluations))

    def submit(self) -> bool:
        """Fill the free slots; True when anything was submitted."""
        submitted = False
        while (free := self.executor.slots - len(self.running)) > 0 and self._submit_one(free):
            submitted = True
        return submitted

    def _submit_one(self, free: int) -> bool:
        """Scores before checkpoints: a number to look at is worth more than a checkpoint to wait with."""
        if self._alone:
            self._start_evaluate([self._alone.popleft()], retried=True)
        elif any(self._ready.values()):
            model = max(self._ready, key=lambda model: len(self._ready[model]))
            share = max(1, -(-len(self._ready[model]) // free))
            chosen, self._ready[model] = self._ready[model][:share], self._ready[model][share:]
            self._start_evaluate(chosen, retried=False)
        elif self._quantize:
            cells, retried = self._quantize.popleft()
            task = QuantizeTask(cells, **self._common())
            self._start(task, set(map(cell_key, cells)), retried)
        else:
            return False
        return True

    def _start_evaluate(self, chosen: Sequence[tuple[Cell, tuple[Evaluation, ...]]], retried: bool) -> None:
        cells, evaluations = tuple(cell for cell, _ in chosen), tuple(wanted for _, wanted in chosen)
        task = EvaluateTask(cells, evaluations, batch_size=self.runtime.batch_size, **self._common())
        self._start(task, {(cell_key(cell), e.name) for cell, wanted in chosen for e in wanted}, retried)

    def _start(self, task: Task, unfinished: set[Any], retried: bool) -> None:
        limit = self.runtime.cluster.task_timeout_seconds
        self._number += 1
        self.running[self._number] = _Job(task, unfinished, retried, time.monotonic() + limit if limit else float("inf"))
        self.executor.submit(self._number, task)

    def _common(self) -> dict[str, Any]:
        runs, threads = str(self.runtime.runs.absolute()), self.executor.threads
        return {"runs": runs, "device": self.runtime.device, "threads": threads, "command": self.command}

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
                        self._ready.setdefault(cell.model, []).append((cell, evaluations))
            case Scored():
                job.unfinished -= {(key, news.evaluation) for key in news.cell_keys}
                yield news
            case Failed():
                yield self._failed(job, news)
            case TaskStarted():
                # A task may have waited for a slot of the cluster; its time counts from here.
                limit = self.runtime.cluster.task_timeout_seconds
                job.deadline = time.monotonic() + limit if limit else float("inf")
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

    def _failed(self, job: _Job, failed: Failed) -> Failed:
        """A failure that the task itself reported; one for lack of memory in company is tried again alone."""
        lost = self._concerned(job, failed)
        job.unfinished -= lost
        retry = failed.kind == "out_of_memory" and not job.retried and len(job.task.cells) > 1 and bool(lost)
        if retry:
            self._again(job, lost)
        return dataclasses.replace(failed, retry=retry)

    def _concerned(self, job: _Job, failed: Failed) -> set[Any]:
        if isinstance(job.task, QuantizeTask):
            return job.unfinished & set(failed.cell_keys)
        named = {(key, name) for key, name in job.unfinished if key in failed.cell_keys}
        return {pair for pair in named if pair[1] == failed.stage} or named

    def _ended(self, job: _Job, end: Exit) -> Iterator[Event]:
        if not job.unfinished:
            return
        unfinished, job.unfinished = job.unfinished, set()
        quantizing = isinstance(job.task, QuantizeTask)
        keys = [key for key in map(cell_key, job.task.cells) if key in unfinished or any(key == pair[0] for pair in unfinished)]
        if not quantizing and end.kind != "lost":
            # Cells are scored in order: the first unfinished one is what the process died of, the others were only behind it.
            behind = {pair for pair in unfinished if pair[0] != keys[0]}
            unfinished -= behind
            self._ready.setdefault(job.task.cells[0].model, []).extend(self._pairs(job, behind))
            keys = keys[:1]
        retry = not job.retried and (end.kind == "lost" or len(job.task.cells) > 1) and bool(end.kind)
        if retry:
            self._again(job, unfinished, together=end.kind == "lost")
        kind, reason = end.kind or "error", end.reason or "the task ended without a result for this cell"
        stage = "quantize" if quantizing else "evaluate"
        yield Failed(time.time(), tuple(keys), stage=stage, kind=kind, reason=reason, detail=end.detail, retry=retry)

    def _again(self, job: _Job, unfinished: set[Any], together: bool = False) -> None:
        """Queue unfinished work once more: each checkpoint or cell by itself, or as it was on another node."""
        if isinstance(job.task, EvaluateTask):
            self._alone.extend(self._pairs(job, unfinished))
            return
        by_checkpoint: dict[str, list[Cell]] = {}
        for cell in job.task.cells:
            if cell_key(cell) in unfinished:
                by_checkpoint.setdefault("" if together else quantize_key(cell), []).append(cell)
        self._quantize.extend((tuple(cells), True) for cells in by_checkpoint.values())

    @staticmethod
    def _pairs(job: _Job, unfinished: set[Any]) -> list[tuple[Cell, tuple[Evaluation, ...]]]:
        assert isinstance(job.task, EvaluateTask)
        pairs = []
        for cell, evaluations in zip(job.task.cells, job.task.evaluations, strict=True):
            left = tuple(evaluation for evaluation in evaluations if (cell_key(cell), evaluation.name) in unfinished)
            if left:
                pairs.append((cell, left))
        return pairs


# --- this process ----------------------------------------------------------------------------------------------------------------


class InProcess:
    """One task after the other in this process."""

    slots = 1
    threads = 0

    def __init__(self) -> None:
        self._current: tuple[int, Iterator[Event]] | None = None

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
    """A fresh process per task on this machine. Each sees one of its GPUs, where there are any.

    A worker reads its task as JSON from its standard input and writes events as lines of JSON to a pipe; what libraries print goes
    to a file, whose end is the detail of a failure.
    """

    def __init__(self, workers: int, runtime: Runtime) -> None:
        self.slots = workers
        self.threads = max(1, count_cores() // workers)
        self._gpus = count_gpus() if runtime.device != "cpu" else 0
        self._news: queue.Queue[Message] = queue.Queue()
        self._running: dict[int, tuple[subprocess.Popen[str], int]] = {}

    def submit(self, number: int, task: Task) -> None:
        taken = {place for _, place in self._running.values()}
        place = next(place for place in range(self.slots) if place not in taken)
        environment = {**os.environ, **process_environment(self.threads)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _visible_gpu(place % self._gpus)
        ours, theirs = os.pipe()
        printed = tempfile.TemporaryFile("w+", errors="replace")
        command = [sys.executable, "-c", "from harness.schedule import serve; serve()", str(theirs), str(os.getpid())]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=printed, stderr=printed, pass_fds=(theirs,), text=True,
        )
        os.close(theirs)
        self._running[number] = process, place
        threading.Thread(target=self._listen, args=(number, process, ours, printed), daemon=True).start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:          # one that died at once is told of by its exit
            json.dump(encode(task), process.stdin)

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
    """

    def __init__(self, runtime: Runtime, workers: int) -> None:
        self._ray = _import_ray()
        cluster = runtime.cluster
        settings = dict(cluster.settings)
        cpus = settings.pop("cpus_per_task", None)
        self.threads = int(cpus or (max(1, count_cores() // workers) if not cluster.address else 1))
        self._started = self._connect(cluster.address, settings)
        resources = self._ray.cluster_resources()
        gpus = cluster.gpus_per_task if runtime.device != "cpu" and (resources.get("GPU", 0) or runtime.device == "cuda") else 0.0
        self._check({"CPU": float(self.threads), "GPU": gpus}, resources)
        fit = [int(resources.get(name, 0) / amount) for name, amount in (("CPU", self.threads), ("GPU", gpus)) if amount]
        self.slots = max(1, min(fit) if cluster.address else min([workers, *fit]))
        # Workers of an own cluster inherit the environment; a runtime_env would keep Ray from using those it started ahead.
        options: dict[str, Any] = {} if self._started else {"runtime_env": {"env_vars": process_environment(self.threads)}}
        if gpus:
            options["max_calls"] = 1            # a fresh process per task; on the CPU a process keeps its imports (5 s) and no more
        self._remote = self._ray.remote(
            num_cpus=self.threads, num_gpus=gpus, max_retries=0, num_returns="streaming", **options
        )(_stream)
        self._running: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._heard: dict[int, float] = {}

    def _connect(self, address: str, settings: dict[str, Any]) -> bool:
        """Join the cluster at an address, or start one here; True when it was started here."""
        if self._ray.is_initialized():
            return False
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if address:
                self._ray.init(address=address, **quiet, **settings)
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

    def _check(self, wanted: Mapping[str, float], resources: Mapping[str, float]) -> None:
        """A request that no node can meet would wait in silence."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
            return
        asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        have = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in wanted) for node in nodes) or "none"
        total = ", ".join(f"{resources.get(name, 0):g} {name}" for name in wanted)
        raise ScheduleError(
            f"no node of the cluster can take a task, which asks for {asked}. Nodes have: {have} (in all {total}). "
            "Lower cluster.gpus_per_task, set device=cpu, or add a node."
        )

    def submit(self, number: int, task: Task) -> None:
        self._running[number] = self._remote.remote(encode(task))
        self._heard[number] = time.monotonic()

    def wait(self) -> list[Message]:
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
        if isinstance(news, str):               # a task's first word is where it runs
            self._nodes[number] = news
            return None
        return Message(number, news)

    def _lost(self) -> list[Message]:
        """Tasks on nodes that Ray has given up: their streams stay silent for minutes."""
        now = time.monotonic()
        silent = [number for number in self._running if now - self._heard[number] > SILENCE_SECONDS]
        if not silent:
            return []
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        lost = []
        for number in silent:
            self._heard[number] = now
            if number in self._nodes and self._nodes[number] not in alive:
                lost.append(self._forget(number, Exit("lost", f"node {self._nodes[number][:12]} no longer answers")))
        return lost

    def _forget(self, number: int, end: Exit) -> Message:
        for known in (self._running, self._nodes, self._heard):
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


def _stream(data: Mapping[str, Any]) -> Iterator[Any]:
    """The body of a Ray task: the node it runs on, then the events."""
    import ray

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield ray.get_runtime_context().get_node_id()
    yield from work.run(decode(data))


def _import_ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")    # a task without a GPU must not see all of them
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ScheduleError(f"Ray cannot be imported ({error}); install it, or run with cluster=local to do without it") from error
    return ray


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


__all__ = ["Executor", "InProcess", "Processes", "RayCluster", "decode", "encode", "make_executor", "run"]
