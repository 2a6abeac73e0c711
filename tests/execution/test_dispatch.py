"""Scheduling: the same events everywhere, changed plans after kills, no process left behind.

The policy is tested against a scripted executor; the executors that start processes are tested with the embedded model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.core.cell import cell_key, quantize_key
from harness.core.errors import ScheduleError, StoreError
from harness.core.events import Event, Failed, Progress, Quantized, Scored, TaskEnded, TaskStarted
from harness.core.sweep import Cluster, Runtime, Sweep
from harness.execution import dispatch, failures, scheduler
from harness.execution.dispatch import make_executor
from harness.execution.executors import base, processes, ray_cluster
from harness.execution.executors.base import Exit, Message
from harness.execution.executors.in_process import InProcess
from harness.execution.executors.processes import Processes
from harness.execution.tasks import (
    EvaluateTask,
    QuantizeTask,
    Task,
    decode,
    decode_event,
    encode,
    encode_event,
)
from harness.planning.plan import Plan
from harness.planning.planner import make
from harness.planning.render import render
from harness.storage import store as store_module
from harness.storage.files import LocalDisk
from harness.storage.store import Store

Make = Callable[..., Sweep]
SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")


def plan_of(sweep: Sweep) -> Plan:
    return make(sweep, Store(sweep.runtime.runs))


class Script:
    """An executor that does what a function says of each task: events, then how the task ends."""

    threads = 1
    gpu_fraction = 0.0
    max_gpus = 0

    def width(self, gpus: float) -> int:
        return max(1, int(gpus)) if self.max_gpus else 1

    def waits(self, number: int) -> bool:
        return False

    def __init__(self, act: Callable[[Task], list[Event | Exit]], worker_slots: int = 1) -> None:
        self.act, self.worker_slots = act, worker_slots
        self.tasks: list[Task] = []
        self.queue: list[Message] = []
        self.cancelled: list[int] = []
        self.closed = False

    def submit(self, number: int, task: Task) -> None:
        self.tasks.append(task)
        self.queue += [Message(number, news) for news in self.act(task)]

    def wait(self) -> list[Message]:
        return [self.queue.pop(0)] if self.queue else []

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def close(self) -> None:
        self.closed = True


def well(task: Task) -> list[Event | Exit]:
    """Every task succeeds."""
    if isinstance(task, QuantizeTask):
        return [*(Quantized(0.0, (cell_key(cell),)) for cell in task.cells), Exit()]
    pairs = [(c, e) for c, wanted in zip(task.cells, task.evaluations, strict=True) for e in wanted]
    return [*(Scored(0.0, (cell_key(c),), evaluation=e.name) for c, e in pairs), Exit()]


def play(plan: Plan, script: Script, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    monkeypatch.setattr(dispatch, "make_executor", lambda runtime, workers: script)
    events = list(dispatch.run(plan, "harness run test"))
    assert script.closed
    return events


def names(task: Task) -> set[str]:
    return {f"{cell.method.name} {cell.scheme.name}" for cell in task.cells}


def test_evaluations_follow_their_checkpoints(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(well)
    events = play(
        plan_of(demo_sweep("method=rtn,gptq", "scheme=w4,w3", *SMALL)), script, monkeypatch
    )
    assert [type(task).__name__ for task in script.tasks] == ["QuantizeTask", "EvaluateTask"] * 2
    assert names(script.tasks[0]) == names(script.tasks[1]) == {"none full", "rtn w4", "rtn w3"}
    assert sum(isinstance(event, Scored) for event in events) == 5


def test_ready_cells_are_spread_over_free_slots(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(well, worker_slots=2)
    play(plan_of(demo_sweep("method=rtn", "scheme=w8,w4,w3", *SMALL)), script, monkeypatch)
    assert sorted(len(task.cells) for task in script.tasks if isinstance(task, EvaluateTask)) in (
        [1, 1, 2],
        [2, 2],
        [1, 3],
    )


def test_the_poisonous_checkpoint_of_a_pass_is_found_by_halves(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, QuantizeTask) and "gptq w3" in names(task):
            return [Exit("killed", "ended by SIGKILL", "last words")]
        return well(task)

    script = Script(act)
    events = play(
        plan_of(demo_sweep("method=gptq", "scheme=w4,w3,w2", *SMALL)), script, monkeypatch
    )
    tried = [
        names(task)
        for task in script.tasks
        if isinstance(task, QuantizeTask) and "none full" not in names(task)
    ]
    assert tried == [
        {"gptq w4", "gptq w3", "gptq w2"},
        {"gptq w4", "gptq w3"},
        {"gptq w2"},
        {"gptq w4"},
        {"gptq w3"},
    ]
    first, second, last = [event for event in events if isinstance(event, Failed)]
    assert first.retry and len(first.cell_keys) == 3 and first.kind == "killed" and second.retry
    assert not last.retry and len(last.cell_keys) == 1 and last.detail == "last words"
    assert sum(isinstance(event, Scored) for event in events) == 3  # none, w4, w2


def test_a_killed_evaluation_blames_the_cell_it_was_at(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, EvaluateTask) and "rtn w4" in names(task):
            done = [event for event in well(task)[:-1] if isinstance(event, Scored)]
            position = next(i for i, cell in enumerate(task.cells) if cell.scheme.name == "w4")
            return [*done[:position], Exit("killed", "gone")]
        return well(task)

    script = Script(act)
    events = play(
        plan_of(demo_sweep("method=rtn", "scheme=w8,w4,w3,w2", *SMALL)), script, monkeypatch
    )
    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.retry for event in failed] == [True, False]
    assert all(len(event.cell_keys) == 1 for event in failed)
    assert sum(isinstance(event, Scored) for event in events) == 4
    alone = [
        names(task)
        for task in script.tasks
        if isinstance(task, EvaluateTask) and len(task.cells) == 1
    ]
    assert {"rtn w4"} in alone


def test_memory_that_ran_out_in_company_is_tried_alone(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, QuantizeTask) and "gptq w3" in names(task) and len(task.cells) > 1:
            (poor,) = [cell for cell in task.cells if cell.scheme.name == "w3"]
            others = [Quantized(0.0, (cell_key(cell),)) for cell in task.cells if cell is not poor]
            return [
                Failed(
                    0.0, (cell_key(poor),), stage="block 0", kind="out_of_memory", reason="full"
                ),
                *others,
                Exit(),
            ]
        return well(task)

    script = Script(act)
    events = play(plan_of(demo_sweep("method=gptq", "scheme=w4,w3", *SMALL)), script, monkeypatch)
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.retry
    assert {"gptq w3"} in [names(task) for task in script.tasks if isinstance(task, QuantizeTask)]
    assert sum(isinstance(event, Scored) for event in events) == 3


def test_a_lost_node_is_tried_as_it_was(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [Exit("lost", "node gone")]

    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, QuantizeTask) and "rtn w4" in names(task) and losses:
            return [losses.pop()]
        return well(task)

    script = Script(act)
    events = play(plan_of(demo_sweep("method=rtn", "scheme=w4,w3", *SMALL)), script, monkeypatch)
    tried = [names(task) for task in script.tasks if isinstance(task, QuantizeTask)]
    assert tried[0] == tried[1]
    assert sum(isinstance(event, Scored) for event in events) == 3


def test_a_checkpoint_without_memory_is_tried_with_nothing_beside_it_and_then_no_more(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never unchanged: in company, alone, alone on the machine; and nothing is started beside the last try."""
    beside = []

    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, QuantizeTask) and "gptq w3" in names(task):
            return [Exit("out_of_memory", "the node ran out of memory")]
        return well(task)

    script = Script(act, worker_slots=2)
    submit = script.submit

    def watched(number: int, task: Task) -> None:
        beside.append((names(task), len(script.queue)))
        submit(number, task)

    monkeypatch.setattr(script, "submit", watched)
    events = play(
        one_pass(plan_of(demo_sweep("method=gptq", "scheme=w4,w3", *SMALL))), script, monkeypatch
    )
    tried = [running for cells, running in beside if "gptq w3" in cells and "gptq w4" not in cells]
    assert len([event for event in events if isinstance(event, Failed) and not event.retry]) == 1
    assert tried[-1] == 0 and beside[-1][0] == {
        "gptq w3"
    }  # the last try ran by itself, after all else
    assert len(tried) <= 3 and sum(isinstance(event, Scored) for event in events) == 2


def test_an_evaluation_that_dies_for_memory_is_tried_in_batches_of_one(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, EvaluateTask) and task.batch_size != 1:
            return [Exit("out_of_memory", "the node ran out of memory")]
        return well(task)

    script = Script(act)
    events = play(plan_of(demo_sweep("method=none", "scheme=full", *SMALL)), script, monkeypatch)
    assert [task.batch_size for task in script.tasks if isinstance(task, EvaluateTask)] == [0, 1]
    assert sum(isinstance(event, Scored) for event in events) == 1


def wide(plan: Plan, devices: int) -> Plan:
    """The plan of models that take so many GPUs each."""
    asked = {"devices": devices, "min_gpus": devices}
    return dataclasses.replace(
        plan, scorings=tuple(dataclasses.replace(each, **asked) for each in plan.scorings)
    )


class Cards(Script):
    """Slots are GPUs of one node; a task ends when the scheduler waits. running: GPUs in use by every task, when one begins."""

    gpu_fraction = 1.0

    def __init__(
        self, act: Callable[[Task], list[Event | Exit]], worker_slots: int, max_gpus: int
    ) -> None:
        super().__init__(act, worker_slots)
        self.max_gpus = max_gpus
        self.held: dict[int, int] = {}
        self.used: list[int] = []

    def submit(self, number: int, task: Task) -> None:
        self.held[number] = getattr(task, "devices", 1)
        self.used.append(sum(self.held.values()))
        self.queue.append(Message(number, TaskStarted(0.0, ())))
        super().submit(number, task)

    def wait(self) -> list[Message]:
        messages = super().wait()
        for message in messages:
            if isinstance(message.news, Exit):
                del self.held[message.number]
        return messages


def test_a_model_on_several_gpus_takes_as_many_slots(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Cards(well, worker_slots=4, max_gpus=4)
    events = play(
        wide(plan_of(demo_sweep("method=rtn", "scheme=w8,w4,w3,w2", *SMALL)), 2),
        script,
        monkeypatch,
    )
    scoring_tasks = [task for task in script.tasks if isinstance(task, EvaluateTask)]
    assert {task.devices for task in scoring_tasks} == {2} and sum(
        isinstance(event, Scored) for event in events
    ) == 5
    assert max(script.used) == 4 and len(scoring_tasks) > 1  # two at once, never three


def test_more_gpus_than_a_node_has_are_refused_before_any_work(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Cards(well, worker_slots=8, max_gpus=1)  # eight nodes of one GPU
    with pytest.raises(
        ScheduleError,
        match=r'model "demo" takes 2 GPUs of one node .*none has more than 1\. Nothing was started',
    ):
        play(wide(plan_of(demo_sweep("method=rtn", "scheme=w4", *SMALL)), 2), script, monkeypatch)
    assert not script.tasks and script.closed


def test_memory_that_ran_out_on_a_gpu_is_tried_on_more_and_then_with_blocks_in_main_memory(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never unchanged, and the last step is the last."""

    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, EvaluateTask) and not (task.offload and succeeds):
            return [
                Failed(0.0, (cell_key(cell),), stage="load", kind="out_of_memory")
                for cell in task.cells
            ] + [Exit()]
        return well(task)

    for succeeds in (True, False):
        script = Cards(act, worker_slots=4, max_gpus=4)
        events = play(
            plan_of(demo_sweep("method=none", "scheme=full", *SMALL)), script, monkeypatch
        )
        tried = [
            (t.batch_size, t.devices, t.offload)
            for t in script.tasks
            if isinstance(t, EvaluateTask)
        ]
        assert tried == [(0, 1, False), (1, 1, False), (1, 2, False), (1, 4, False), (1, 1, True)]
        assert sum(isinstance(event, Scored) for event in events) == succeeds
        assert [e.retry for e in events if isinstance(e, Failed)] == [True] * 4 + [False] * (
            not succeeds
        )


def test_what_ran_out_of_memory_is_remembered_for_its_siblings(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of the same method on the same or a larger model walks alone from the start; its plan says why."""

    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, QuantizeTask) and "gptq w4" in names(task) and len(task.cells) > 1:
            return [Exit("out_of_memory", "the node ran out of memory")]
        return well(task)

    sweep = demo_sweep("method=gptq", "scheme=w4,w3", "baseline=false", *SMALL)
    Store(sweep.runtime.runs).open_cells(sweep.cells)
    play(one_pass(plan_of(sweep)), Script(act), monkeypatch)
    siblings = plan_of(demo_sweep("method=gptq,rtn", "scheme=w8,w2", "baseline=false", *SMALL))
    assert sorted(len(each.cells) for each in siblings.passes) == [
        1,
        1,
        2,
    ]  # gptq each alone, rtn together
    assert not any(each.exclusive for each in siblings.passes) and not any(
        each.batch_size for each in siblings.scorings
    )
    assert any(
        "demo · gptq · w8 is quantized in a pass of its own, because demo · gptq · w" in note
        for note in siblings.notes
    )
    store, key = Store(sweep.runtime.runs), cell_key(sweep.cells[0])
    failures.ran_out(store, [key], "quantize", 1, 10**9)  # and then alone
    failures.ran_out(store, [key], "evaluate", 8, 10**9)
    assert (
        store.record(sweep.cells[0]).provenance["out_of_memory_quantize"]["peak_memory_bytes"]
        == 10**9
    )
    again = plan_of(demo_sweep("method=gptq,rtn", "scheme=w8,w2", "baseline=false", *SMALL))
    assert sorted(each.exclusive for each in again.passes) == [False, True, True]
    assert [each.batch_size for each in again.scorings] == [1]
    script = Script(well, worker_slots=2)
    play(again, script, monkeypatch)
    assert {task.batch_size for task in script.tasks if isinstance(task, EvaluateTask)} == {1}


def test_a_run_stops_before_its_store_exceeds_its_quota(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others wrote meanwhile counts; what runs is finished, and nothing more is begun."""
    sweep = demo_sweep("method=rtn", "scheme=w4,w3", "baseline=false", "store.quota=1GB", *SMALL)
    plan, script = plan_of(sweep), Script(well)
    (first,) = plan.passes
    passes = tuple(
        dataclasses.replace(first, cells=(cell,), disk_bytes=4 * 10**8, seconds=1.0, limit=1)
        for cell in first.cells
    )

    def fill(task: Task) -> list[Event | Exit]:
        if isinstance(task, QuantizeTask):
            store = Store(sweep.runtime.runs)
            monkeypatch.setattr(store_module.Store, "used_bytes", lambda self: 7 * 10**8)
            assert store.used_bytes() > 0
        return well(task)

    script.act = fill
    events: list[Event] = []
    monkeypatch.setattr(dispatch, "make_executor", lambda runtime, workers: script)
    with pytest.raises(StoreError, match=r"holds 700\.0 MB of its quota of 1\.0 GB; harness gc"):
        events.extend(dispatch.run(dataclasses.replace(plan, passes=passes), "harness run test"))
    assert [type(task).__name__ for task in script.tasks] == [
        "QuantizeTask",
        "EvaluateTask",
    ] and script.closed


def test_a_measurement_has_its_device_for_itself(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside nothing where tasks share a device; with the others where each has a GPU of its own."""
    sweep = demo_sweep(
        "method=rtn",
        "scheme=w4,w3",
        "evaluations=[demo_perplexity,demo_efficiency]",
        "evaluations.limit=2",
    )
    plan, beside = plan_of(sweep), []

    def seen_apart(task: Task) -> set[str]:
        wanted = task.evaluations if isinstance(task, EvaluateTask) else ()
        return (
            {e.evaluator for each in wanted for e in each if e.evaluator == "efficiency"}
            if script.gpu_fraction < 1
            else set()
        )

    for gpu_fraction, expected in ((0.5, {0}), (1.0, set())):
        script = Script(well, worker_slots=3)
        script.gpu_fraction, submit = gpu_fraction, script.submit
        beside.clear()

        def watched(number: int, task: Task, script: Script = script, submit: Any = submit) -> None:
            if isinstance(task, EvaluateTask) and {
                e.evaluator for wanted in task.evaluations for e in wanted
            } == {"efficiency"}:
                beside.append(sum(isinstance(message.news, Exit) for message in script.queue))
            assert task.gpu_fraction == (1.0 if len(seen_apart(task)) else script.gpu_fraction)
            submit(number, task)

        monkeypatch.setattr(script, "submit", watched)
        events = play(plan, script, monkeypatch)
        assert set(beside) == expected and len(beside) == 3 * len(expected)
        assert sum(isinstance(event, Scored) for event in events) == 6


def test_workers_see_the_gpu_they_were_given_and_none_on_a_cpu(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    class Started(Exception):
        pass

    def start(command: Any, env: dict[str, str], **others: Any) -> Any:
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        raise Started

    monkeypatch.setattr(processes, "count_gpus", lambda: 2)
    monkeypatch.setattr(processes.subprocess, "Popen", start)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runtime = dataclasses.replace(demo_sweep("method=rtn", "scheme=w4").runtime, device="auto")
    for device, gpu_fraction in (("auto", 0.5), ("cpu", 0.0)):
        executor = Processes(4, dataclasses.replace(runtime, device=device))
        assert executor.gpu_fraction == gpu_fraction
        with pytest.raises(Started):
            executor.submit(1, QuantizeTask((), "runs"))
    assert seen == ["0", ""]
    assert base.process_environment(1)["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "1"


class Ended:
    """A process that has ended well."""

    def __init__(self) -> None:
        self.stdin = open(os.devnull, "w")  # closed by who writes to it

    def wait(self, seconds: float = 0.0) -> int:
        return 0


@pytest.mark.parametrize(
    ("workers", "devices", "expected"), [(4, 2, ["0,1", "2,3"]), (2, 3, ["0,1,2"]), (8, 2, ["0,1"])]
)
def test_workers_see_the_gpus_of_their_task(
    demo_sweep: Make,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    devices: int,
    expected: list[str],
) -> None:
    seen: list[str] = []

    def start(command: Any, env: dict[str, str], **others: Any) -> Any:
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return Ended()

    monkeypatch.setattr(processes, "count_gpus", lambda: 4)
    monkeypatch.setattr(processes.subprocess, "Popen", start)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    executor = Processes(
        workers, dataclasses.replace(demo_sweep("method=rtn", "scheme=w4").runtime, device="auto")
    )
    assert executor.max_gpus == 4
    for number in range(workers // executor.width(devices)):
        executor.submit(number, EvaluateTask((), (), "runs", devices=devices))
    assert seen == expected


def test_a_worker_killed_under_one_cell_is_given_it_once_more(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = [Exit("killed", "SIGKILL"), Exit("killed", "SIGKILL")]

    def act(task: Task) -> list[Event | Exit]:
        return [kills.pop()] if isinstance(task, QuantizeTask) and kills else well(task)

    script = Script(act)
    events = play(plan_of(demo_sweep("method=none", "scheme=full", *SMALL)), script, monkeypatch)
    assert [event.retry for event in events if isinstance(event, Failed)] == [True, False]
    kills.append(Exit("killed", "SIGKILL"))
    events = play(
        plan_of(demo_sweep("method=none", "scheme=full", *SMALL)), Script(act), monkeypatch
    )
    assert sum(isinstance(event, Scored) for event in events) == 1


class Clock:
    """The time that a script takes: a second for each wait that brings nothing. A loaded machine does not change it."""

    time = staticmethod(time.time)

    def __init__(self, script: Script) -> None:
        self.now = 0.0
        wait = script.wait

        def counted() -> list[Message]:
            messages = wait()
            self.now += not messages
            return messages

        script.wait = counted  # type: ignore[method-assign]

    def monotonic(self) -> float:
        return self.now


def with_limit(sweep: Sweep, seconds: float) -> Sweep:
    cluster = dataclasses.replace(sweep.runtime.cluster, task_timeout_seconds=seconds)
    return dataclasses.replace(sweep, runtime=dataclasses.replace(sweep.runtime, cluster=cluster))


def test_a_hanging_checkpoint_is_found_and_the_others_finish(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(task: Task) -> list[Event | Exit]:
        return [] if isinstance(task, QuantizeTask) and "gptq w3" in names(task) else well(task)

    script = Script(act)
    monkeypatch.setattr(scheduler, "time", Clock(script))
    sweep = with_limit(demo_sweep("method=gptq", "scheme=w4,w3,w2", *SMALL), 5)
    events = play(one_pass(plan_of(sweep)), script, monkeypatch)
    (last,) = [event for event in events if isinstance(event, Failed) and not event.retry]
    assert last.kind == "timeout" and len(last.cell_keys) == 1
    assert sum(isinstance(event, Scored) for event in events) == 3


def test_a_cancelled_cell_leaves_and_the_others_go_on(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalDisk, "state_seconds", 0.0)
    sweep = demo_sweep("method=gptq", "scheme=w4,w3", *SMALL)
    store, (doomed,) = (
        Store(sweep.runtime.runs),
        [cell_key(c) for c in sweep.cells if c.scheme.name == "w3"],
    )

    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, QuantizeTask) and len(task.cells) == 3:
            store.cancel(doomed)
            return []  # still running when it is cancelled
        return well(task)

    script = Script(act)
    events = play(one_pass(plan_of(sweep)), script, monkeypatch)
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.kind == "cancelled" and failed.cell_keys == (doomed,) and script.cancelled == [1]
    assert sum(isinstance(event, Scored) for event in events) == 2


def test_a_cancelled_sweep_stops(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalDisk, "state_seconds", 0.0)
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    store = Store(sweep.runtime.runs)

    def act(task: Task) -> list[Event | Exit]:
        store.cancel(sweep.name)
        return [*well(task)[:1]]

    script = Script(act)
    assert len(play(plan_of(sweep), script, monkeypatch)) == 1 and len(script.tasks) == 1


def test_after_its_time_a_run_begins_nothing(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, script = plan_of(demo_sweep("method=rtn", "scheme=w4", *SMALL)), Script(well)
    monkeypatch.setattr(dispatch, "make_executor", lambda runtime, workers: script)
    assert (
        list(dispatch.run(plan, "harness run test", seconds=0.0)) == []
        and script.closed
        and not script.tasks
    )


@pytest.mark.parametrize(
    ("worker_slots", "order"), [(2, ["w8", "w3", "w2", "w4"]), (1, ["w8", "w4", "w2", "w3"])]
)
def test_the_cheapest_pass_comes_first_and_then_the_longest(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch, worker_slots: int, order: list[str]
) -> None:
    plan = plan_of(demo_sweep("method=rtn", "scheme=w2,w8,w3,w4", "baseline=false"))
    (first,) = plan.passes
    costs = {"w2": 5.0, "w8": 1.0, "w3": 9.0, "w4": 2.0}
    passes = tuple(
        dataclasses.replace(first, cells=(cell,), seconds=costs[cell.scheme.name])
        for cell in first.cells
    )
    passes = tuple(
        dataclasses.replace(each, limit=number + 1) for number, each in enumerate(passes)
    )  # walks of their own
    script = Script(well, worker_slots=worker_slots)
    play(dataclasses.replace(plan, passes=passes, scorings=()), script, monkeypatch)
    assert [cell.scheme.name for task in script.tasks for cell in task.cells] == order


def test_a_node_may_be_lost_three_times(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(
        lambda task: [Exit("lost", "node gone")] if isinstance(task, QuantizeTask) else well(task)
    )
    events = play(plan_of(demo_sweep("method=none", "scheme=full", *SMALL)), script, monkeypatch)
    assert [event.retry for event in events if isinstance(event, Failed)] == [True, True, False]


def test_a_lost_head_costs_the_work_no_try(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [Exit("head_lost", "the head no longer answers")] * 5

    def act(task: Task) -> list[Event | Exit]:
        return [losses.pop()] if losses else well(task)

    events = play(plan_of(demo_sweep("method=rtn", "scheme=w4", *SMALL)), Script(act), monkeypatch)
    assert [event.retry for event in events if isinstance(event, Failed)] == [True] * 5
    assert sum(isinstance(event, Scored) for event in events) == 2


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


def test_a_failed_cell_is_not_evaluated(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(task: Task) -> list[Event | Exit]:
        if isinstance(task, QuantizeTask):
            return [
                Failed(0.0, (cell_key(task.cells[-1]),), stage="block 2", reason="NaN"),
                *well(task)[:-2],
                Exit(),
            ]
        return well(task)

    script = Script(act)
    events = play(plan_of(demo_sweep("method=rtn", "scheme=w4,w3", *SMALL)), script, monkeypatch)
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert not failed.retry
    assert sum(isinstance(event, Scored) for event in events) == 2


def test_a_task_over_its_time_is_ended(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(lambda task: [] if isinstance(task, QuantizeTask) else well(task))
    monkeypatch.setattr(scheduler, "time", Clock(script))
    sweep = with_limit(demo_sweep("method=none", "scheme=full", *SMALL), 5)
    (failed,) = play(plan_of(sweep), script, monkeypatch)
    assert isinstance(failed, Failed) and failed.kind == "timeout" and script.cancelled == [1]


def test_an_end_without_a_word_is_a_failure(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = play(
        plan_of(demo_sweep("method=none", "scheme=full", *SMALL)),
        Script(lambda task: [Exit()]),
        monkeypatch,
    )
    assert [type(event) for event in events] == [Failed] and "without a result" in str(events[0])


def test_nothing_to_do_starts_nothing(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(
        plan_of(demo_sweep("method=none", "scheme=full")), passes=(), scorings=()
    )
    monkeypatch.setattr(
        dispatch, "make_executor", lambda runtime, workers: pytest.fail("an executor was made")
    )
    assert list(dispatch.run(plan)) == []


def test_events_and_tasks_cross_as_json(demo_sweep: Make) -> None:
    events: list[Event] = [
        TaskStarted(1.0, ("a",), worker="h:1", device="cpu"),
        Progress(1.0, ("a", "b"), "block", 1, 4),
        Quantized(1.0, ("a",), record={"seconds": 1.0}),
        Scored(1.0, ("a",), "e", {"e/m": float("inf")}, {}),
        Failed(1.0, ("a",), "s", "killed", "r", "d", True),
        TaskEnded(1.0, (), 2.0, 3),
    ]
    assert [decode_event(json.loads(json.dumps(encode_event(event)))) for event in events] == events
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    for task in (
        QuantizeTask(sweep.cells, "r"),
        EvaluateTask(sweep.cells, tuple(c.evaluations for c in sweep.cells), "r"),
    ):
        assert decode(json.loads(json.dumps(encode(task)))) == task


def test_the_executor_follows_the_cluster(demo_sweep: Make) -> None:
    runtime = demo_sweep("method=rtn", "scheme=w4").runtime
    assert isinstance(make_executor(runtime, 1), InProcess)
    assert isinstance(make_executor(runtime, 2), Processes)
    timed = dataclasses.replace(runtime, cluster=Cluster("local", task_timeout_seconds=9))
    assert isinstance(make_executor(timed, 1), Processes)  # a deadline needs a process to end


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 120
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid), f"process {pid} was left behind"


def worker(event: Event) -> int:
    assert isinstance(event, TaskStarted)
    return int(event.worker.rpartition(":")[2])


def checkpoint_bytes(sweep: Sweep) -> dict[str, bytes]:
    store = Store(sweep.runtime.runs)
    folders = {
        quantize_key(cell): store.checkpoint_folder(quantize_key(cell)) for cell in sweep.cells
    }
    return {
        f"{key}/{path.name}": path.read_bytes()
        for key, folder in folders.items()
        for path in folder.glob("*.safetensors")
    }


def moved(sweep: Sweep, folder: Path, cluster: Cluster) -> Sweep:
    return dataclasses.replace(
        sweep, runtime=dataclasses.replace(sweep.runtime, runs=folder, cluster=cluster)
    )


def test_closing_ends_the_worker_processes(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4", "cluster=local", "cluster.workers=2")
    events = dispatch.run(plan_of(sweep))
    pid = worker(next(event for event in events if isinstance(event, TaskStarted)))
    assert alive(pid)
    events.close()  # type: ignore[attr-defined]
    wait_gone(pid)


@pytest.mark.slow
def test_processes_survive_a_kill(demo_sweep: Make, tmp_path: Path) -> None:
    """A killed worker's pass is split; the checkpoints are those of an undisturbed run, byte for byte."""
    sweep = demo_sweep("method=gptq", "scheme=w4,w3", "baseline=false")
    list(dispatch.run(plan_of(sweep)))
    disturbed = moved(sweep, tmp_path / "disturbed", Cluster("local", workers=2))
    check_recovery(disturb(disturbed), disturbed, sweep)


def one_pass(plan: Plan) -> Plan:
    """All checkpoints in one pass, however many workers there are."""
    cells = tuple(cell for each in plan.passes for cell in each.cells)
    return dataclasses.replace(plan, passes=(dataclasses.replace(plan.passes[0], cells=cells),))


def disturb(sweep: Sweep) -> list[Event]:
    """Carry a sweep out whose first block is there already, and kill the first worker while it has all of it before it.

    That worker waits for a lock that is held here, so that it is in its task when the signal comes, however slow the machine is.
    """
    begun = dispatch.run(one_pass(plan_of(dataclasses.replace(sweep, runtime=here(sweep)))))
    next(event for event in begun if isinstance(event, Progress))
    begun.close()  # type: ignore[attr-defined]
    seen: list[Event] = []
    with contextlib.ExitStack() as held:
        held.enter_context(
            Store(sweep.runtime.runs).lock(f"checkpoint-{max(map(quantize_key, sweep.cells))}")
        )
        for event in dispatch.run(one_pass(plan_of(sweep))):
            if isinstance(event, TaskStarted) and not seen:
                os.kill(worker(event), signal.SIGKILL)
                held.close()
            seen.append(event)
    return seen


def here(sweep: Sweep) -> Runtime:
    return dataclasses.replace(sweep.runtime, cluster=Cluster("local", workers=1))


def check_recovery(events: list[Event], disturbed: Sweep, undisturbed: Sweep) -> None:
    failed = [event for event in events if isinstance(event, Failed)]
    assert failed and all(event.retry and event.kind == "killed" for event in failed), failed
    assert {k for e in events if isinstance(e, Quantized) for k in e.cell_keys} == set(
        map(cell_key, disturbed.cells)
    )
    assert checkpoint_bytes(disturbed) == checkpoint_bytes(undisturbed)


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


def test_the_plan_is_what_runs(demo_sweep: Make) -> None:
    """In this process, for real: after the run the plan has nothing left."""
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    events = list(dispatch.run(plan_of(sweep)))
    assert sum(isinstance(event, Scored) for event in events) == 2
    assert "nothing to do" in render(plan_of(sweep))
