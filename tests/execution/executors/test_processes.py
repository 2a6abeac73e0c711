"""Worker processes: the GPUs that they see, their end, and recovery after a kill."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from executions import check_recovery, disturb, moved, plan_of, worker

from harness.core.events import TaskStarted
from harness.core.sweep import Cluster, Sweep
from harness.execution import dispatch
from harness.execution.executors import base, processes
from harness.execution.executors.processes import Processes
from harness.execution.tasks import EvaluateTask, QuantizeTask

Make = Callable[..., Sweep]


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


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 120
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid), f"process {pid} was left behind"


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
