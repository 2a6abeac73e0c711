"""Runs the missing work of a plan, on this machine or on a cluster, and yields the events.

Three executors give the same events for the same plan:

    local, one worker     in this process, one task after the other: no start-up, and a debugger stops where it should
    local, more workers   a fresh process per task on this machine, without Ray
    ray                   workers of a Ray cluster, started here (loopback only) or reached at an address

On GPUs every task has a new process, because memory that a task leaves on a GPU would be missing for the next one; on CPUs Ray's
workers are reused, because importing torch takes longer than many tasks. Evaluations are submitted as checkpoints appear; the
cheapest pass runs first, for early results, then the longest, so that no long pass is left for the end.

Failed work is retried by a changed plan, or not at all in this run (`core.failures` names the kinds):

    a task dies or hangs       its unfinished checkpoints in two halves, until the checkpoint that causes it has a task of its own
    killed in its own task     once more, with no other task running
    out of memory              one task per checkpoint; then with no other task running, evaluations in batches of 1; then
                               evaluations on twice the GPUs as long as a node has them, at last with blocks in main memory
    a node is lost             unchanged on another node, up to three times
    a cluster's head is lost   unchanged, once a head runs again at the same address

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
from harness.core.failures import FailureKind
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
    """Run the missing work of a plan and yield its events. Closing the generator ends all tasks.

    seconds: the time after which running tasks end and no other begins; finished blocks and scores stay.
    Raises ScheduleError when no worker can run the tasks, StoreError when its quota has no room for the next checkpoints.
    """
    if not plan.passes and not plan.scorings:
        return
    ends = time.monotonic() + seconds if seconds is not None else float("inf")
    executor = make_executor(plan.sweep.runtime, plan.workers)
    too_large = {
        each.cells[0].model.name: each.min_gpus
        for each in plan.scorings
        if each.min_gpus > max(1, executor.max_gpus)
    }
    if too_large:
        executor.close()
        asked = "; ".join(
            f'model "{name}" takes {devices} GPUs of one node to evaluate'
            for name, devices in too_large.items()
        )
        raise ScheduleError(
            f"{asked}, and none has more than {executor.max_gpus}. Nothing was started. Leave the model out, or add a node"
        )
    scheduler = Scheduler(
        plan, executor, command or provenance.command_line(), cheapest_first=seconds is not None
    )
    store, runtime = Store(plan.sweep.runtime.runs), plan.sweep.runtime
    try:
        if isinstance(executor, RayCluster) and executor.dashboard:
            yield Joined(time.time(), dashboard=executor.dashboard)
        with contextlib.ExitStack() as stack:
            coordination = stack.enter_context(
                Coordination(store, plan.sweep.name, runtime.priority)
            )
            if runtime.cluster.address and isinstance(executor, RayCluster):
                stack.enter_context(executor.shared(store, plan))
            sent = Turn(0.0, priority=runtime.priority)
            while time.monotonic() < ends and not coordination.is_cancelled:
                scheduler.behind = coordination.behind
                if (coordination.priority, coordination.behind) != (sent.priority, sent.behind):
                    sent = Turn(
                        time.time(), priority=coordination.priority, behind=coordination.behind
                    )
                    yield sent
                submitted = scheduler.submit()
                coordination.wants = scheduler.wants
                yield from scheduler.unplaced()
                if scheduler.stranded:
                    raise ScheduleError(
                        f"no node of the cluster can run a task, and no such node joined within {RETURN_SECONDS:g} s. Finished "
                        f"work is in the store: {FailureKind.LOST.remedy}"
                    )
                if not submitted and not scheduler.running:
                    if not scheduler.waits:
                        break
                    time.sleep(POLL_SECONDS)
                for message in executor.wait():
                    yield from scheduler.receive(message)
                yield from scheduler.deadlines()
                coordination.refresh()
                yield from scheduler.cancelled(coordination.cancelled)
            if scheduler.full:
                raise StoreError(scheduler.full)
    finally:
        executor.close()


def make_executor(runtime: Runtime, workers: int) -> Executor:
    """The executor that a sweep's `cluster` names."""
    if runtime.cluster.kind == "local" and not runtime.cluster.address:
        # A time limit needs a process that can be ended.
        if workers == 1 and not runtime.cluster.task_timeout_seconds:
            return InProcess(count_gpus() if runtime.device != "cpu" else 0)
        return Processes(workers, runtime)
    return RayCluster(runtime, workers)
