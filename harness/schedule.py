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

import contextlib
import dataclasses
import json
import logging
import math
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
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from harness import events, provenance, sources, work
from harness.board import RETURN_SECONDS, Board, Executor, Exit, Message
from harness.cell import Model, from_json, to_json
from harness.control import Control
from harness.errors import ScheduleError, StoreError
from harness.events import Event, Joined, Turn
from harness.plan import Plan, count_cores, count_gpus
from harness.store import Store
from harness.sweep import Runtime
from harness.work import EvaluateTask, QuantizeTask, Task

POLL_SECONDS = 1.0                              # how long an executor waits for events before deadlines are looked at
SILENCE_SECONDS = 90.0                          # after which Ray is asked whether a task's node still lives
PROBE_SECONDS = 60.0                            # for every node of a cluster to say what it sees
LOOK_SECONDS = 5.0                              # between two looks at a cluster's head and nodes
HEAD_SECONDS = 20.0                             # of silence after which the head counts as lost; Ray ends the driver after 60
JOIN_SECONDS = 60.0                             # for the first node that takes tasks to join a cluster
STOP_SECONDS = 5.0                              # between asking a process to end and ending it
PRINTED_BYTES = 4000                            # of what a worker printed last, kept with its failure
log = logging.getLogger(__name__)

TASKS = {"quantize": QuantizeTask, "evaluate": EvaluateTask}


def run(plan: Plan, command: str = "", seconds: float | None = None) -> Iterator[Event]:
    """Everything that the plan has missing, as events. Closing the generator ends all tasks.

    seconds: after which nothing is begun any more and what runs is ended; finished blocks and scores stay.
    Raises ScheduleError when no worker could ever take the tasks, StoreError when its quota has no room for the next checkpoints.
    """
    if not plan.passes and not plan.scorings:
        return
    ends = time.monotonic() + seconds if seconds is not None else float("inf")
    executor = make_executor(plan.sweep.runtime, plan.workers)
    wide = {each.cells[0].model.name: each.least for each in plan.scorings if each.least > max(1, executor.most)}
    if wide:
        executor.close()
        asked = "; ".join(f'model "{name}" takes {devices} GPUs of one node to evaluate' for name, devices in wide.items())
        raise ScheduleError(f"{asked}, and none has more than {executor.most}. Nothing was started. Leave it out, or add a node")
    board = Board(plan, executor, command or provenance.command_line(), cheapest_first=seconds is not None)
    store, runtime = Store(plan.sweep.runtime.runs), plan.sweep.runtime
    try:
        if isinstance(executor, RayCluster) and executor.dashboard:
            yield Joined(time.time(), dashboard=executor.dashboard)
        with contextlib.ExitStack() as stack:
            control = stack.enter_context(Control(store, plan.sweep.name, runtime.priority))
            if runtime.cluster.address and isinstance(executor, RayCluster):
                stack.enter_context(executor.shared(store, plan))
            told = Turn(0.0, priority=runtime.priority)
            while time.monotonic() < ends and not control.is_cancelled:
                board.behind = control.behind
                if (control.priority, control.behind) != (told.priority, told.behind):
                    told = Turn(time.time(), priority=control.priority, behind=control.behind)
                    yield told
                submitted = board.submit()
                control.wants = board.wants
                yield from board.unplaced()
                if board.stranded:
                    raise ScheduleError(
                        f"no node of the cluster can take a task any more, and none came within {RETURN_SECONDS:g} s. What was "
                        "finished is in the store: start nodes, then the same command goes on"
                    )
                if not submitted and not board.running:
                    if not board.waits:
                        break
                    time.sleep(POLL_SECONDS)
                for message in executor.wait():
                    yield from board.receive(message)
                yield from board.deadlines()
                control.look()
                yield from board.cancelled(control.cancelled)
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


# --- this process ----------------------------------------------------------------------------------------------------------------


class InProcess:
    """One task after the other in this process."""

    slots = 1
    threads = 0
    share = 1.0

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self._current: tuple[int, Iterator[Event]] | None = None

    def width(self, gpus: float) -> int:
        return 1

    def submit(self, number: int, task: Task) -> None:
        self._current = number, work.run(task)

    def waits(self, number: int) -> bool:
        return False

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

    def width(self, gpus: float) -> int:
        """Where tasks share GPUs, one that needs more than its share has the machine to itself."""
        if gpus <= self.share or not self._gpus:
            return 1
        return self.slots if self._gpus < self.slots else math.ceil(gpus / (self._gpus // self.slots))

    def waits(self, number: int) -> bool:
        return False

    def submit(self, number: int, task: Task) -> None:
        devices = getattr(task, "devices", 1)
        taken = {place for _, places in self._running.values() for place in places}
        places = [place for place in range(self.slots) if place not in taken][: self.width(_gpus(task))]
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


def _gpus(task: Task) -> float:
    """GPUs that a task takes: several whole ones, or its share of one."""
    devices = getattr(task, "devices", 1)
    return float(devices) if devices > 1 else task.share


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
        """Tasks that run at once: what fits on each node. 0 while no node of a cluster elsewhere can take one."""
        wanted = [(name, amount) for name, amount in self._asked.items() if amount]
        fit = sum(min(int(node.get(name, 0) / amount) for name, amount in wanted) for node in nodes)
        return fit if self._address else max(1, min(self._workers, fit))

    def _count_most(self, nodes: Sequence[Mapping[str, float]]) -> int:
        return int(max((node.get("GPU", 0) for node in nodes), default=0)) if self._asked["GPU"] else 0

    def width(self, gpus: float) -> int:
        return max(1, math.ceil(gpus / self._asked["GPU"])) if self._asked["GPU"] else 1

    def waits(self, number: int) -> bool:
        """A task's first word is where it runs."""
        return number not in self._nodes

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
        gpus, asked = _gpus(task), self._asked["GPU"]
        remote = self._remote.options(num_gpus=gpus) if asked and gpus > asked else self._remote
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
        found = [] if store.files.exists(store.root / probe) else [f"{runs}, where this process writes"]
    except StoreError as error:                 # no package, no credentials, no way there; it names the store
        found = [str(error)]
    return found + [path for path in paths if not os.path.exists(path)]


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


__all__ = ["InProcess", "Processes", "RayCluster", "decode", "encode", "make_executor", "run"]
