"""The scheduler: passes cut for the slots there are, priorities, ranks, and what no node can take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from harness.core.cell import cell_key
from harness.core.events import Event, Failed, Quantized
from harness.core.sweep import First, Sweep
from harness.execution import failures, scheduler
from harness.execution.executors.base import Exit, Message
from harness.execution.scheduler import Scheduler
from harness.execution.tasks import EvaluateTask, Task
from harness.planning.plan import Plan
from harness.planning.planner import make
from harness.planning.render import render
from harness.storage.store import Store

Make = Callable[..., Sweep]


SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")


class Cluster:
    """Slots that a test changes. Tasks wait until it lets them begin, and end when it says so."""

    threads, gpu_fraction = 1, 0.0

    def __init__(self, worker_slots: int, max_gpus: int = 0) -> None:
        self.worker_slots, self.max_gpus = worker_slots, max_gpus
        self.held: dict[int, Task] = {}
        self.begun: set[int] = set()

    def width(self, gpus: float) -> int:
        return max(1, int(gpus))

    def submit(self, number: int, task: Task) -> None:
        self.held[number] = task

    def waits(self, number: int) -> bool:
        return number not in self.begun

    def wait(self) -> list[Message]:
        return []

    def cancel(self, number: int) -> None:
        del self.held[number]

    def close(self) -> None:
        pass

    @property
    def sizes(self) -> list[int]:
        return [len(task.cells) for task in self.held.values()]


def planned(demo_sweep: Make, *words: str) -> Plan:
    sweep = demo_sweep("baseline=false", *words)
    return make(sweep, Store(sweep.runtime.runs))


def finish(on: Scheduler, cluster: Cluster, number: int) -> list[Event]:
    keys = tuple(map(cell_key, cluster.held.pop(number).cells))
    return [
        event
        for news in (Quantized(0.0, keys), Exit())
        for event in on.receive(Message(number, news))
    ]


def test_passes_are_split_for_idle_slots_and_joined_for_busy_ones(demo_sweep: Make) -> None:
    """Whatever the plan guessed: nodes that join get a share, and what waits for nodes that left is joined again."""
    schemes = ",".join(f"w{bits}{end}" for bits in range(2, 9) for end in ("", "sym", "g32"))
    plan = planned(
        demo_sweep, "method=gptq", f"scheme={schemes}", "cluster=local", "cluster.workers=4"
    )
    total, cluster = plan.checkpoints, Cluster(worker_slots=21)
    on = Scheduler(plan, cluster, "")
    assert total == 21 and len(plan.passes) == 4 and on.submit() and cluster.sizes == [1] * total
    cluster.worker_slots = 2  # nodes left before any task began
    on.submit()
    made: list[Event] = []
    assert len(cluster.held) == 2
    while cluster.held:
        cluster.begun |= set(cluster.held)
        made += finish(on, cluster, min(cluster.held))
        on.submit()
    assert sorted(key for event in made for key in event.cell_keys) == sorted(
        map(cell_key, plan.missing)
    )  # each once
    cluster = Cluster(worker_slots=1)
    on = Scheduler(plan, cluster, "")
    on.submit()
    cluster.begun, first = {1}, cluster.sizes[0]
    assert first > max(len(each.cells) for each in plan.passes)  # larger than any pass of the plan
    cluster.worker_slots = 5
    on.submit()
    assert (
        len(cluster.held) == 5
        and sum(cluster.sizes) == total
        and max(cluster.sizes[1:]) - min(cluster.sizes[1:]) <= 1
    )


def test_no_task_at_the_end_takes_the_share_of_slots_that_are_busy(demo_sweep: Make) -> None:
    """One free slot does not take every cell that is ready: the others will be free before it is done."""
    schemes = ",".join(f"w{bits}{end}" for bits in (2, 3, 4, 8) for end in ("", "sym", "g32"))
    plan, cluster = (
        planned(demo_sweep, "method=gptq", f"scheme={schemes}", "cluster=local", *SMALL),
        Cluster(worker_slots=2),
    )
    on = Scheduler(plan, cluster, "")
    on.submit()
    ready = sum(cluster.sizes)
    cluster.begun = {1, 2}
    for number in (1, 2):
        list(
            on.receive(
                Message(number, Quantized(0.0, tuple(map(cell_key, cluster.held[number].cells))))
            )
        )
    list(on.receive(Message(1, Exit())))
    del cluster.held[1]
    on.submit()
    assert (
        isinstance(cluster.held[3], EvaluateTask) and len(cluster.held[3].cells) == 6 < ready
    )  # half of the twelve


def test_what_was_tried_is_not_joined_and_memory_is_kept(demo_sweep: Make) -> None:
    plan, cluster = (
        planned(demo_sweep, "method=gptq", "scheme=w2,w3,w4,w8"),
        Cluster(worker_slots=1),
    )
    on = Scheduler(
        dataclasses.replace(
            plan, passes=tuple(dataclasses.replace(each, limit=2) for each in plan.passes)
        ),
        cluster,
        "",
    )
    on.submit()
    assert cluster.sizes == [2]
    del cluster.held[1]
    list(on.receive(Message(1, Exit("killed", "SIGKILL"))))
    for expected in (2, 1, 1):
        on.submit()
        ((number, task),) = cluster.held.items()
        assert len(task.cells) == expected
        finish(on, cluster, number)


def test_behind_another_a_driver_begins_nothing_and_takes_back_what_waits(demo_sweep: Make) -> None:
    cluster = Cluster(worker_slots=4)
    on = Scheduler(planned(demo_sweep, "method=gptq", "scheme=w2,w3,w4,w8"), cluster, "")
    on.submit()
    cluster.begun, on.behind = {1}, "sweep b"
    assert not on.submit() and set(cluster.held) == {1} and on.waits  # what runs is finished
    finish(on, cluster, 1)
    assert not on.submit() and not cluster.held and on.waits
    on.behind = ""
    assert on.submit() and sum(cluster.sizes) == 3 and not on.waits


def test_what_no_node_can_take_any_more_is_given_up(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(
        scheduler, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time)
    )
    plan = planned(demo_sweep, "method=rtn", "scheme=w4", *SMALL)
    scorings = tuple(dataclasses.replace(each, devices=4, min_gpus=4) for each in plan.scorings)
    cluster = Cluster(worker_slots=4, max_gpus=4)
    on = Scheduler(dataclasses.replace(plan, passes=(), scorings=scorings), cluster, "")
    assert on.submit()
    cluster.worker_slots = cluster.max_gpus = 2  # the node that could take it is lost
    assert (
        not on.submit()
        and not cluster.held
        and not list(on.unplaced())
        and on.waits
        and not on.wants
    )
    cluster.worker_slots = cluster.max_gpus = 4
    assert not list(on.unplaced()) and on.submit()  # and back
    cluster.worker_slots = cluster.max_gpus = 2
    assert not on.submit() and not list(on.unplaced())
    clock[0] += scheduler.RETURN_SECONDS + 1
    (failed,) = on.unplaced()
    assert (
        isinstance(failed, Failed)
        and failed.kind == "no_node"
        and "takes 4 GPUs of one node" in failed.reason
    )
    assert not on.waits and not on.submit()


def test_memory_that_ran_out_on_gpus_is_remembered_with_their_number(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", "baseline=false", *SMALL)
    store = Store(sweep.runtime.runs)
    store.open_cells(sweep.cells)
    failures.ran_out(store, [cell_key(sweep.cells[0])], "evaluate", 1, 10**9, devices=2)
    plan = planned(demo_sweep, "method=rtn", "scheme=w3", *SMALL)
    assert [(each.batch_size, each.devices) for each in plan.scorings] == [(1, 4)]
    assert any("is scored in batches of 1, on 4 GPUs, because" in note for note in plan.notes)
    for max_gpus, expected in (
        (4, (4, False)),
        (2, (1, True)),
    ):  # more than any node has: main memory
        cluster = Cluster(worker_slots=4, max_gpus=max_gpus)
        on = Scheduler(dataclasses.replace(plan, passes=()), cluster, "")
        on.submit()
        (task,) = cluster.held.values()
        assert (
            isinstance(task, EvaluateTask)
            and (task.devices, task.offload) == expected
            and task.batch_size == 1
        )


def test_cells_of_an_earlier_rank_come_first(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn,gptq", "scheme=w4,w3", "baseline=false")
    keys = frozenset(
        cell_key(cell)
        for cell in sweep.cells
        if cell.method.name == "gptq" and cell.scheme.name == "w3"
    )
    plan = make(
        dataclasses.replace(sweep, first=(First("scheme: w3", keys),)), Store(sweep.runtime.runs)
    )
    assert [each.priority_tier for each in plan.passes] == [0, 1, 1] and {
        cell_key(c) for c in plan.passes[0].cells
    } == keys
    assert "first   1. scheme: w3: 1 cell to do" in render(plan)
    cluster = Cluster(worker_slots=1)
    Scheduler(plan, cluster, "").submit()
    assert {cell_key(cell) for cell in cluster.held[1].cells} == keys
