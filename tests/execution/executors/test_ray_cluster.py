"""Ray clusters: heads and nodes that are lost and come back, the same checkpoints, shared stores."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from executions import check_recovery, disturb, moved, plan_of

from harness.core.errors import ScheduleError
from harness.core.sweep import Cluster, Sweep
from harness.execution import dispatch
from harness.execution.dispatch import make_executor
from harness.execution.executors import base, ray_cluster
from harness.execution.executors.base import Exit
from harness.storage.store import Store

Make = Callable[..., Sweep]


class FakeRay:
    """A cluster whose nodes a test chooses. init: fails as often as `refusals` says."""

    def __init__(self, *nodes: dict[str, float], refusals: int = 0) -> None:
        self.resources, self.refusals, self.joined, self.shut = nodes, refusals, 0, 0
        self.cancelled: list[str] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeID": f"n{number}", "Resources": held}
            for number, held in enumerate(self.resources)
        ]

    def is_initialized(self) -> bool:
        return False

    def init(self, **settings: Any) -> None:
        self.refusals -= 1
        if self.refusals >= 0:
            raise ConnectionError("no cluster yet")
        self.joined += 1

    def shutdown(self) -> None:
        self.shut += 1

    def cancel(self, stream: str, force: bool) -> None:
        self.cancelled.append(stream)


def joined(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> ray_cluster.RayCluster:
    """A `RayCluster` in the state in which its cluster was just reached."""
    cluster = object.__new__(ray_cluster.RayCluster)
    cluster._ray, cluster._address, cluster._settings, cluster._workers = (
        ray,
        "10.0.0.1:6379",
        {},
        1,
    )
    cluster._task_resources, cluster._head, cluster._started, cluster.worker_slots = (
        {"CPU": 2.0, "GPU": 0.0},
        "10.0.0.1:6379",
        False,
        1,
    )
    cluster._refreshed = cluster._answered = clock[0]
    cluster._running, cluster._nodes, cluster._last_message, cluster._nodes_at_submit = (
        {7: "stream"},
        {},
        {7: 0.0},
        {7: {"n0", "n1"}},
    )
    cluster._alive = {"n0", "n1"}

    class Time:
        monotonic = staticmethod(lambda: clock[0])

        @staticmethod
        def sleep(seconds: float) -> None:
            clock[0] += seconds

    monkeypatch.setattr(ray_cluster, "time", Time)
    return cluster


def test_a_lost_head_is_waited_for_and_joined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, back = [0.0], [100.0]
    ray = FakeRay({"CPU": 4.0}, {"CPU": 3.0}, refusals=2)
    cluster = joined(ray, monkeypatch, clock)
    monkeypatch.setattr(ray_cluster, "_is_listening", lambda address: clock[0] >= back[0])
    clock[0] = ray_cluster.HEAD_SECONDS - 1
    assert cluster._refresh() == [] and not ray.shut  # a hiccup
    clock[0] = ray_cluster.HEAD_SECONDS + ray_cluster.REFRESH_SECONDS
    (message,) = cluster._refresh()
    assert (
        message.number == 7 and isinstance(message.news, Exit) and message.news.kind == "head_lost"
    )
    assert ray.joined == 1 and clock[0] >= 100 and not cluster._running
    assert cluster.worker_slots == 3  # two tasks of two CPUs on the first node, one on the second
    cluster._running, back[0] = {8: "stream"}, 1e9
    clock[0] += ray_cluster.HEAD_SECONDS + 1
    with pytest.raises(
        ScheduleError,
        match=r"10\.0\.0\.1:6379 is lost, and none took its place .* the same command",
    ):
        cluster._refresh()


@pytest.mark.parametrize(("said", "lost"), [(None, True), ("n0", False), ("n1", True)])
def test_a_silent_task_is_lost_with_its_node(
    monkeypatch: pytest.MonkeyPatch, said: str | None, lost: bool
) -> None:
    """Also one whose node went before it said where it runs."""
    clock = [0.0]
    ray = FakeRay({"CPU": 2.0}, {"CPU": 2.0})
    cluster = joined(ray, monkeypatch, clock)
    cluster._nodes = {} if said is None else {7: said}
    clock[0] = ray_cluster.SILENCE_SECONDS + 1
    assert (
        cluster._tasks_of_lost_nodes() == [] and 7 in cluster._running
    )  # silent, but nobody is gone
    ray.resources = ({"CPU": 2.0},)
    assert cluster._tasks_of_lost_nodes() == []  # asked once per SILENCE_SECONDS
    clock[0] *= 2
    found = cluster._tasks_of_lost_nodes()
    assert [message.number for message in found] == [7] * lost and (
        7 not in cluster._running
    ) == lost
    assert ray.cancelled == ["stream"] * lost


def test_nodes_that_join_later_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    ray = FakeRay({"CPU": 2.0})
    cluster = joined(ray, monkeypatch, clock)
    monkeypatch.setattr(ray_cluster, "_is_listening", lambda address: True)
    ray.resources = ({"CPU": 2.0}, {"CPU": 16.0}, {})
    clock[0] = ray_cluster.REFRESH_SECONDS + 1
    assert cluster._refresh() == [] and cluster.worker_slots == 9
    ray.resources = ({},)
    clock[0] += ray_cluster.REFRESH_SECONDS + 1
    assert cluster._refresh() == [] and cluster.worker_slots == 0  # nothing but a head
    began = clock[0]
    assert (
        cluster._joined(60.0) == [{}] and clock[0] > began + 60
    )  # nothing but a head: waited for, then told
    with pytest.raises(ScheduleError, match="asks for 2 CPU"):
        cluster._check([{}])


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Any]:
    """One Ray cluster of two processors on the loopback interface."""
    with ray_cluster._environment(base.process_environment(1)):
        ray = ray_cluster._import_ray()
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=2,
            num_gpus=0,
            log_to_driver=False,
            logging_level=40,
            _node_ip_address="127.0.0.1",
        )
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_checkpoints_and_survives_a_kill(
    own_cluster: Any, demo_sweep: Make, tmp_path: Path
) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4,w3", "baseline=false")
    list(dispatch.run(plan_of(sweep)))
    on_ray = moved(sweep, tmp_path / "ray", Cluster("ray", workers=2))
    check_recovery(disturb(on_ray), on_ray, sweep)


@pytest.mark.slow
def test_ray_refuses_what_no_node_can_take(own_cluster: Any, demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4")
    wanting = dataclasses.replace(sweep.runtime, device="cuda", cluster=Cluster("ray", workers=1))
    with pytest.raises(ScheduleError, match=r"1 GPU.*gpus_per_task"):
        make_executor(wanting, 1)
    many = dataclasses.replace(
        sweep.runtime, cluster=Cluster("ray", workers=1, settings={"cpus_per_task": 64})
    )
    with pytest.raises(ScheduleError, match="64 CPU"):
        make_executor(many, 1)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_store_is_named(
    own_cluster: Any, demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In seconds, before any work. Here the one node looks for a file that is not there."""
    sweep = demo_sweep("method=rtn", "scheme=w4")
    plan, store = plan_of(sweep), Store(sweep.runtime.runs)
    executor = make_executor(
        dataclasses.replace(sweep.runtime, cluster=Cluster("ray", workers=1)), 1
    )
    assert isinstance(executor, ray_cluster.RayCluster)
    with executor.shared(store, plan):
        assert list(
            store.root.glob(".probe*")
        )  # for the tasks, which may run on nodes that join later
    assert not list(store.root.glob(".probe*"))

    @contextlib.contextmanager
    def elsewhere(self: Store) -> Iterator[Path]:
        yield self.root / ".probe.gone"

    monkeypatch.setattr(Store, "probe", elsewhere)
    with pytest.raises(
        ScheduleError,
        match=r"node .* does not see .*runs, where this process writes\. Nothing was started",
    ):
        executor.shared(store, plan).__enter__()
