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
import logging
import time
from collections.abc import Iterator

from harness.core.errors import ScheduleError, StoreError
from harness.core.events import Event, Joined, Turn
from harness.core.sweep import Runtime
from harness.execution import provenance
from harness.execution.coordination import Coordination
from harness.execution.executors.base import POLL_SECONDS, RETURN_SECONDS, Executor
from harness.execution.executors.in_process import InProcess
from harness.execution.executors.processes import Processes
from harness.execution.executors.ray_cluster import RayCluster
from harness.execution.scheduler import Scheduler
from harness.planning.plan import Plan
from harness.planning.resources import count_gpus
from harness.storage.store import Store

log = logging.getLogger(__name__)


def run(plan: Plan, command: str = "", seconds: float | None = None) -> Iterator[Event]:
    """Everything that the plan has missing, as events. Closing the generator ends all tasks.

    seconds: after which nothing is begun any more and what runs is ended; finished blocks and scores stay.
    Raises ScheduleError when no worker could ever take the tasks, StoreError when its quota has no room for the next checkpoints.
    """
    if not plan.passes and not plan.scorings:
        return
    ends = time.monotonic() + seconds if seconds is not None else float("inf")
    executor = make_executor(plan.sweep.runtime, plan.workers)
    wide = {
        each.cells[0].model.name: each.least
        for each in plan.scorings
        if each.least > max(1, executor.most)
    }
    if wide:
        executor.close()
        asked = "; ".join(
            f'model "{name}" takes {devices} GPUs of one node to evaluate'
            for name, devices in wide.items()
        )
        raise ScheduleError(
            f"{asked}, and none has more than {executor.most}. Nothing was started. Leave it out, or add a node"
        )
    board = Scheduler(
        plan, executor, command or provenance.command_line(), cheapest_first=seconds is not None
    )
    store, runtime = Store(plan.sweep.runtime.runs), plan.sweep.runtime
    try:
        if isinstance(executor, RayCluster) and executor.dashboard:
            yield Joined(time.time(), dashboard=executor.dashboard)
        with contextlib.ExitStack() as stack:
            control = stack.enter_context(Coordination(store, plan.sweep.name, runtime.priority))
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
