"""Sweeps of the embedded model run by executors: plans, workers that are killed, checkpoints compared by their bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from pathlib import Path

from harness.core.cell import cell_key, quantize_key
from harness.core.events import Event, Failed, Progress, Quantized, TaskStarted
from harness.core.sweep import Cluster, Runtime, Sweep
from harness.execution import dispatch
from harness.planning.plan import Plan
from harness.planning.planner import make
from harness.storage.store import Store


def plan_of(sweep: Sweep) -> Plan:
    return make(sweep, Store(sweep.runtime.runs))


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
