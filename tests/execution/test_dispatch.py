"""Scheduling: the same events everywhere, changed plans after kills, no process left behind.

The policy is tested against a scripted executor; the executors that start processes are tested with the embedded model.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
from executions import one_pass, plan_of

from harness.core.cell import cell_key
from harness.core.errors import ScheduleError, StoreError
from harness.core.events import Event, Failed, Quantized, Scored, TaskStarted
from harness.core.sweep import Cluster, Sweep
from harness.execution import dispatch, failures, scheduler
from harness.execution.dispatch import make_executor
from harness.execution.executors.base import Exit, Message
from harness.execution.executors.in_process import InProcess
from harness.execution.executors.processes import Processes
from harness.execution.tasks import EvaluateTask, QuantizeTask, Task
from harness.planning.plan import Plan
from harness.storage import store as store_module
from harness.storage.files import LocalDisk
from harness.storage.store import Store

Make = Callable[..., Sweep]


SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")


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


def test_the_executor_follows_the_cluster(demo_sweep: Make) -> None:
    runtime = demo_sweep("method=rtn", "scheme=w4").runtime
    assert isinstance(make_executor(runtime, 1), InProcess)
    assert isinstance(make_executor(runtime, 2), Processes)
    timed = dataclasses.replace(runtime, cluster=Cluster("local", task_timeout_seconds=9))
    assert isinstance(make_executor(timed, 1), Processes)  # a deadline needs a process to end
