"""Runs tasks on a Ray cluster, started on this machine (loopback only) or reached at an address. The only importer of Ray."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.core.cell import Model
from harness.core.errors import ScheduleError, StoreError
from harness.core.failures import FailureKind
from harness.core.sweep import Runtime
from harness.core.text import first_line
from harness.data import model_folders
from harness.execution import worker
from harness.execution.executors.base import (
    POLL_SECONDS,
    RETURN_SECONDS,
    Exit,
    Message,
    gpus_of,
    process_environment,
)
from harness.execution.tasks import Task, decode, encode
from harness.planning.plan import Plan
from harness.planning.resources import count_cores
from harness.storage.store import Store

log = logging.getLogger(__name__)

# Without a message of a task for so long, Ray is asked whether its node is alive.
SILENCE_SECONDS = 90.0
PROBE_SECONDS = 60.0  # for every node of a cluster to answer which shared paths it sees
REFRESH_SECONDS = 5.0  # between two checks of a cluster's head and nodes
# without an answer, after which the head counts as lost; Ray ends the driver after 60
HEAD_SECONDS = 20.0
JOIN_SECONDS = 60.0  # for the first node that can run tasks to join a cluster


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


class RayCluster:
    """Runs tasks on a Ray cluster: one that it starts on the loopback interface, unless an address is given.

    cluster.settings go to `ray.init` (num_cpus, num_gpus, …), except cpus_per_task, the CPUs of one task.

    At an address, the worker slots follow the nodes that join and leave, and a lost head is waited for.
    """

    def __init__(self, runtime: Runtime, workers: int) -> None:
        cluster = runtime.cluster
        self._ray = _import_ray(own=not cluster.address)
        self._address, self._settings, self._workers = (
            cluster.address,
            dict(cluster.settings),
            workers,
        )
        cpus = self._settings.pop("cpus_per_task", None)
        self.threads = int(cpus or (max(1, count_cores() // workers) if not cluster.address else 1))
        self.dashboard = ""
        self._started = self._connect(self._address, self._settings)
        self._alive: set[str] = set()
        nodes = self._joined(JOIN_SECONDS)
        has_gpu = any(node.get("GPU", 0) for node in nodes)
        gpus = (
            cluster.gpus_per_task
            if runtime.device != "cpu" and (has_gpu or runtime.device == "cuda")
            else 0.0
        )
        self._task_resources = {"CPU": float(self.threads), "GPU": gpus}
        self.gpu_fraction = min(1.0, gpus)
        self.max_gpus = self._count_max_gpus(nodes)
        self._check(nodes)
        self.worker_slots = self._count_worker_slots(nodes)
        self._head = "" if self._started else str(self._ray.get_runtime_context().gcs_address)
        self._refreshed = self._answered = time.monotonic()
        # Paths that a task checks first: the store, its probe, folders of models.
        self._shared: list[str] = []
        # Workers of a cluster started here inherit the environment; with a runtime_env Ray would not use its prestarted workers.
        options: dict[str, Any] = (
            {}
            if self._started
            else {"runtime_env": {"env_vars": process_environment(self.threads)}}
        )
        if gpus:
            options["max_calls"] = (
                1  # a new process per task; on a CPU a process is reused, which saves its imports (5 s)
            )
        self._remote = self._ray.remote(
            num_cpus=self.threads, num_gpus=gpus, max_retries=0, num_returns="streaming", **options
        )(_stream)
        self._running: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}  # where a task runs, from its first message
        self._nodes_at_submit: dict[
            int, set[str]
        ] = {}  # the nodes that were alive when it was submitted
        self._last_message: dict[int, float] = {}

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
        except (
            Exception
        ) as error:  # Ray raises its own, OSError, ValueError, ConnectionError and RuntimeError
            where = (
                f"the Ray cluster at {address} cannot be reached"
                if address
                else "Ray cannot start on this machine"
            )
            way_out = (
                "check `ray status` there"
                if address
                else "run with cluster=local, which does not use Ray"
            )
            raise ScheduleError(f"{where}: {first_line(error)}; {way_out}") from error
        return True

    def _joined(self, seconds: float) -> list[dict[str, float]]:
        """Resources of each living node, once a node can run tasks or the time is over: nodes may still be starting."""
        ends = time.monotonic() + seconds
        while True:
            nodes = self._living()
            if any(node.get("CPU", 0) for node in nodes) or time.monotonic() > ends:
                return nodes
            time.sleep(POLL_SECONDS)

    def _living(self) -> list[dict[str, float]]:
        """Resources of each living node."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        self._alive = {str(node["NodeID"]) for node in nodes}
        return [node["Resources"] for node in nodes]

    def _count_worker_slots(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """Tasks that run at once: as many as fit on each node. 0 while no node of a cluster at an address can run one."""
        wanted = [(name, amount) for name, amount in self._task_resources.items() if amount]
        fit = sum(min(int(node.get(name, 0) / amount) for name, amount in wanted) for node in nodes)
        return fit if self._address else max(1, min(self._workers, fit))

    def _count_max_gpus(self, nodes: Sequence[Mapping[str, float]]) -> int:
        return (
            int(max((node.get("GPU", 0) for node in nodes), default=0))
            if self._task_resources["GPU"]
            else 0
        )

    def width(self, gpus: float) -> int:
        return (
            max(1, math.ceil(gpus / self._task_resources["GPU"]))
            if self._task_resources["GPU"]
            else 1
        )

    def waits(self, number: int) -> bool:
        """The first message of a task says where it runs."""
        return number not in self._nodes

    def _check(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """Raise ScheduleError where no node has the resources of one task: it would wait without end."""
        wanted = self._task_resources
        if any(
            all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes
        ):
            return
        asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        have = (
            "; ".join(
                ", ".join(f"{node.get(name, 0):g} {name}" for name in wanted) for node in nodes
            )
            or "none"
        )
        total = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in wanted)
        raise ScheduleError(
            f"no node of the cluster can run a task, which asks for {asked}. Nodes have: {have} (in total {total}). "
            "Lower cluster.gpus_per_task, set device=cpu, or add a node."
        )

    @contextlib.contextmanager
    def shared(self, store: Store, plan: Plan) -> Iterator[None]:
        """Raise ScheduleError naming every node that does not see the store, or a model's folder, of this process.

        Each node looks for a file that was just written, which a folder of the same name on another disk does not have. The file
        stays while tasks run, because they check for it too: they may run on nodes that join later.
        """
        cells = [cell for each in plan.passes for cell in each.cells] + [
            cell for each in plan.scorings for cell in each.cells
        ]
        folders = {folder for cell in cells if (folder := _local(cell.model))}
        with store.probe() as probe:
            self._shared = [str(store.place), probe.name, *sorted(folders)]
            asked = {}
            for node in self._ray.nodes():
                if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
                    place = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                        node["NodeID"], soft=False
                    )
                    look = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(
                        _missing_paths
                    )
                    asked[look.remote(self._shared)] = (
                        node.get("NodeManagerHostname") or node["NodeManagerAddress"]
                    )
            answered, silent = self._ray.wait(
                list(asked), num_returns=len(asked), timeout=PROBE_SECONDS
            )
            problems = [
                f"node {asked[each]} did not answer within {PROBE_SECONDS:g} s" for each in silent
            ]
            for each in answered:
                try:
                    problems += [
                        f"node {asked[each]} does not see {what}" for what in self._ray.get(each)
                    ]
                except self._ray.exceptions.RayError as error:
                    problems.append(f"node {asked[each]}: {first_line(error)}")
            if problems:
                raise self._not_shared(problems, "Nothing was started. ")
            yield
        self._shared = []

    def _not_shared(self, problems: Sequence[str], so_far: str = "") -> ScheduleError:
        return ScheduleError(
            f"{'; '.join(problems)}. {so_far}Results and models must be where all nodes see them: set runs= to a folder on a "
            "shared file system or to an object store, and name models by a path that all see or by their hub id"
        )

    def submit(self, number: int, task: Task) -> None:
        gpus, asked = gpus_of(task), self._task_resources["GPU"]
        remote = self._remote.options(num_gpus=gpus) if asked and gpus > asked else self._remote
        self._running[number] = remote.remote(encode(task), self._shared)
        self._last_message[number], self._nodes_at_submit[number] = time.monotonic(), self._alive

    def wait(self) -> list[Message]:
        lost = self._refresh()
        if lost:
            return lost
        numbers = {stream: number for number, stream in self._running.items()}
        if not numbers:
            return []
        ready, _ = self._ray.wait(
            list(numbers), num_returns=1, timeout=POLL_SECONDS, fetch_local=False
        )
        messages = [
            message for stream in ready if (message := self._read(numbers[stream])) is not None
        ]
        return messages + self._tasks_of_lost_nodes()

    def _read(self, number: int) -> Message | None:
        self._last_message[number] = time.monotonic()
        try:
            news = self._ray.get(next(self._running[number]))
        except StopIteration:
            return self._forget(number, Exit())
        except self._ray.exceptions.OutOfMemoryError as error:
            return self._failed(number, FailureKind.OUT_OF_MEMORY, error)
        except (self._ray.exceptions.NodeDiedError, self._ray.exceptions.ObjectLostError) as error:
            return self._failed(number, FailureKind.LOST, error)
        except self._ray.exceptions.RayTaskError as error:
            return self._failed(number, FailureKind.ERROR, error.cause or error)
        except self._ray.exceptions.RayError as error:
            return self._failed(number, FailureKind.KILLED, error)
        # The first message of a task: where it runs, and the shared paths that are missing there.
        if isinstance(news, tuple):
            self._nodes[number], name, missing = news
            if missing:
                raise self._not_shared([f"node {name} does not see {what}" for what in missing])
            return None
        return Message(number, news)

    def _refresh(self) -> list[Message]:
        """Every REFRESH_SECONDS: count worker slots again. Returns the tasks of a lost head, once another head runs."""
        now = time.monotonic()
        if not self._head or now - self._refreshed < REFRESH_SECONDS:
            return []
        self._refreshed = now
        if _is_listening(self._head):
            self._answered = now
            nodes = self._living()
            self.worker_slots, self.max_gpus = (
                self._count_worker_slots(nodes),
                self._count_max_gpus(nodes),
            )
            return []
        if now - self._answered < HEAD_SECONDS:
            return []
        kind = FailureKind.HEAD_LOST
        end = Exit(kind, f"{kind.sentence} at {self._head}")
        lost = [self._forget(number, end) for number in list(self._running)]
        self._ray.shutdown()  # before Ray ends this process
        self._rejoin()
        return lost

    def _rejoin(self) -> None:
        """Join the cluster that runs again at the address of a lost head. Raises ScheduleError where none does."""
        log.warning(
            "the head of the cluster at %s no longer answers; waiting %g s for it",
            self._head,
            RETURN_SECONDS,
        )
        ends = time.monotonic() + RETURN_SECONDS
        while time.monotonic() < ends:
            time.sleep(POLL_SECONDS)
            if not _is_listening(self._head):
                continue
            with contextlib.suppress(ScheduleError):  # the head is still starting
                self._connect(self._address, self._settings)
                nodes = self._joined(ends - time.monotonic())
                self._check(nodes)
                self.worker_slots, self.max_gpus = (
                    self._count_worker_slots(nodes),
                    self._count_max_gpus(nodes),
                )
                self._refreshed = self._answered = time.monotonic()
                return
            self._ray.shutdown()
        raise ScheduleError(
            f"the head of the cluster at {self._head} is lost, and none took its place within {RETURN_SECONDS:g} s. "
            f"Finished work is in the store: {FailureKind.HEAD_LOST.remedy}"
        )

    def _tasks_of_lost_nodes(self) -> list[Message]:
        """The tasks of nodes that Ray counts as dead: the streams of such tasks send nothing for minutes.

        A task that has not sent where it runs counts as lost with any node of the time of its submission; it is submitted again.
        """
        now = time.monotonic()
        silent = [
            number for number in self._running if now - self._last_message[number] > SILENCE_SECONDS
        ]
        if not silent:
            return []
        self._living()
        alive, lost = self._alive, []
        for number in silent:
            self._last_message[number] = now
            gone = (
                {self._nodes[number]} if number in self._nodes else self._nodes_at_submit[number]
            ) - alive
            if gone:
                names = ", ".join(sorted(node[:12] for node in gone))
                self.cancel(number)
                kind = FailureKind.LOST
                reason = f"{kind.sentence}: node {names} no longer answers"
                lost.append(Message(number, Exit(kind, reason)))
        return lost

    def _failed(self, number: int, kind: FailureKind, error: BaseException) -> Message:
        return self._forget(number, Exit(kind, f"{kind.sentence}: {first_line(error)}"))

    def _forget(self, number: int, end: Exit) -> Message:
        for known in (self._running, self._nodes, self._nodes_at_submit, self._last_message):
            known.pop(number, None)
        return Message(number, end)

    def cancel(self, number: int) -> None:
        stream = self._running[number]
        self._forget(number, Exit())
        with contextlib.suppress(Exception):  # the task has ended meanwhile
            self._ray.cancel(stream, force=True)

    def close(self) -> None:
        for number in list(self._running):
            self.cancel(number)
        if self._started:
            self._ray.shutdown()


def _stream(data: Mapping[str, Any], shared: Sequence[str]) -> Iterator[Any]:
    """The body of a Ray task. Yields (node id, host name, the `shared` paths that are missing there), then the events."""
    import ray

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    missing = _missing_paths(shared)
    yield ray.get_runtime_context().get_node_id(), socket.gethostname(), missing
    if not missing:
        yield from worker.run(decode(data))


def _is_listening(address: str) -> bool:
    """Whether a program listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True


def _missing_paths(shared: Sequence[str]) -> list[str]:
    """The body of a probe: the paths that this node does not see. shared: the store, the probe file in it, other paths."""
    if not shared:
        return []
    runs, probe, *paths = shared
    try:
        store = Store(runs)
        found = (
            [] if store.files.exists(store.root / probe) else [f"{runs}, where this process writes"]
        )
    except (
        StoreError
    ) as error:  # no package, no credentials, no connection; the error names the store
        found = [str(error)]
    return found + [path for path in paths if not os.path.exists(path)]


def _local(model: Model) -> str | None:
    """The folder that a model's source names, or None for the embedded model and for a hub id."""
    return (
        str(model_folders.model_folder(model))
        if os.path.isabs(os.path.expanduser(model.source))
        else None
    )


def _import_ray(own: bool = True) -> Any:
    """Import Ray with its environment set. own: for a cluster that is started here and must not be reached from other machines."""
    # A task without a GPU must not see all GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if own:
        # Otherwise Ray replaces 127.0.0.1 by the machine's address and listens on every interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ScheduleError(
            f"Ray cannot be imported ({error}); install it, or run with cluster=local, which does not use Ray"
        ) from error
    return ray
