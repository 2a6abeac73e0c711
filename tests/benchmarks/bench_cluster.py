"""Scheduling on a simulated cluster: `python tests/benchmarks/bench_cluster.py [--cells 1000] [--launcher] [--tracking]`.

Four Ray nodes with eight made-up GPUs each on this machine, and a grid of cells of mixed cost whose work is sleeping: starting a
process, loading a model, quantizing, scoring. Everything else is real: configuration, plan, the scheduler, Ray's
scheduling and streams, the driver with its records of state. What is measured:

    planning      seconds from words to a plan, configuration and imports included, limit 10 of CPU time
    busy          share of GPU time spent in tasks until nothing was left to start, limit 0.9; `working` leaves the start of
                  processes out
    loads         model loads in all, and the most of one GPU, model and task, limit 1
    driver        peak memory of the driver, limit 1 GB
    --launcher    the same grid and costs by Hydra's Ray launcher on the same nodes, one job per cell; needs hydra-ray-launcher
    --tracking    16 workers and MLflow in SQLite, cells with layer errors, a score and items: seconds of tracking as a share of
                  the workers' seconds, limit 0.01

Worker processes are kept between tasks, unlike on real GPUs: 32 GPUs' processes on two cores would wait for those cores. Their
start is part of the simulated time instead, for both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START, LOAD = 1.6, 3.0  # seconds; a cell costs 1 to 9 to quantize and as much to score
MODELS = 5
HERE = Path(__file__).resolve()


def cost(key: str, stage: str) -> float:
    """Between 1 and 9 seconds, the same for a cell wherever it is asked."""
    return (
        1.0 + 8.0 * int(hashlib.sha256(f"{stage}{key}".encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    )


def log_line(folder: str, **facts: Any) -> None:
    """One line per task and process; appended whole."""
    with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a") as lines:
        lines.write(json.dumps(facts) + "\n")


def gpu() -> str:
    """Which of the cluster's GPUs this task has."""
    import ray

    context = ray.get_runtime_context()
    return f"{context.get_node_id()[:8]}:{context.get_accelerator_ids()['GPU'][0]}"


def simulate(data: dict[str, Any], shared: list[str]) -> Iterator[Any]:
    """The body of a task: as `ray_cluster._stream` and `worker.run`, with sleep for work and true events."""
    import ray

    from harness.core.cell import cell_key
    from harness.core.events import Progress, Quantized, Scored, TaskEnded, TaskStarted, Usage
    from harness.execution.process import UsageMeter
    from harness.execution.tasks import QuantizeTask, decode
    from harness.storage.store import Store

    began, meter = time.time(), UsageMeter("cpu")
    task = decode(data)
    keys, store = tuple(map(cell_key, task.cells)), Store(task.runs)
    yield ray.get_runtime_context().get_node_id(), "simulated", []
    time.sleep(START)
    yield TaskStarted(time.time(), keys, worker=f"{os.getpid()}", device="simulated")
    time.sleep(LOAD)
    if isinstance(task, QuantizeTask):
        for step, key in enumerate(keys, start=1):
            time.sleep(cost(key, "quantize"))
            yield Progress(time.time(), keys, stage="block", step=step, steps=len(keys))
            if (facts := meter.now(len(keys))) is not None:
                yield Usage(time.time(), keys, facts)
        for cell, key in zip(task.cells, keys, strict=True):
            write_manifest(store, cell)
            yield Quantized(time.time(), (key,), record={})
    else:
        for cell, key, wanted in zip(task.cells, keys, task.evaluations, strict=True):
            for evaluation in wanted:
                time.sleep(cost(key, evaluation.name))
                write_score(store, cell, evaluation)
                yield Scored(time.time(), (key,), evaluation=evaluation.name)
                if (facts := meter.now(1)) is not None:
                    yield Usage(time.time(), (key,), facts)
    (model,) = {cell.model.name for cell in task.cells}
    log_line(
        task.command,
        began=began,
        ended=time.time(),
        start=START,
        gpu=gpu(),
        model=model,
        cells=len(keys),
    )
    yield TaskEnded(time.time(), keys, seconds=time.time() - began)


def write_manifest(store: Any, cell: Any) -> None:
    """What a checkpoint of four blocks leaves for tracking: sizes and layer errors, of made-up numbers."""
    from harness.core.cell import quantize_key
    from harness.storage.json_files import write_json

    linears = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ]
    errors = [
        {
            "block": block,
            "linear": linear,
            "output_error": cost(cell.title, f"{block}{linear}") / 100,
            "weight_error": 0.01,
        }
        for block in range(4)
        for linear in [*linears, "mlp.down_proj"]
    ]
    content = {
        "bits_per_weight": 4.25,
        "bits_per_weight_total": 5.4,
        "stored_bytes": 1,
        "seconds": 1.0,
        "layer_errors": errors,
    }
    write_json(store.checkpoint_folder(quantize_key(cell)) / "manifest.json", content)


def write_score(store: Any, cell: Any, evaluation: Any) -> None:
    """A perplexity of 40 windows, made up."""
    from harness.core.cell import cell_key, score_key

    losses = [cost(cell.title, str(window)) / 4 for window in range(40)]
    metrics = {f"{evaluation.name}/perplexity": math.exp(sum(losses) / len(losses))}
    score = {"metrics": metrics, "stderr": {}, "details": {"items": len(losses)}}
    store.write_score(
        cell_key(cell),
        score_key(cell, evaluation),
        score,
        {"id": list(range(len(losses))), "loss": losses},
    )


def grid(runs: Path, count: int, *words: str) -> Any:
    """A sweep of distinct checkpoints: four methods, widths, groups and symmetry over models that differ in name alone."""
    from harness.config.grid import load_sweep

    schemes = [
        f"w{bits}g{group}{end}"
        for bits in range(2, 9)
        for group in (4, 8, 16, 32)
        for end in ("", "sym")
    ]
    base = load_sweep(
        None,
        [
            "model=demo",
            "method=rtn,gptq,awq,awq_gptq",
            f"scheme={','.join(schemes[: -(-count // (4 * MODELS))])}",
            "baseline=false",
            "calibration=demo",
            "evaluations=demo_perplexity",
            f"runs={runs}",
            "device=cuda",
            *words,
        ],
    )
    cells = [
        dataclasses.replace(
            cell, model=dataclasses.replace(cell.model, name=f"model{number}", digest=str(number))
        )
        for number in range(MODELS)
        for cell in base.cells
    ]
    return dataclasses.replace(base, cells=tuple(cells[:count]))


def peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(address: str, count: int, folder: Path, tracking: str = "none") -> dict[str, float]:
    """The sweep by `driver.run`. Runs in a process of its own, for its memory."""
    import ray

    from harness.execution import dispatch, driver
    from harness.execution.executors import ray_cluster
    from harness.planning.planner import make
    from harness.storage.store import Store
    from harness.tracking import mlflow_runs

    log = folder / "tasks"
    log.mkdir()
    before, began = time.process_time(), time.monotonic()
    sweep = grid(
        folder / "runs",
        count,
        "cluster=address",
        f"cluster.address={address}",
        f"tracking={tracking}",
    )
    make(sweep, Store(sweep.runtime.runs))
    planning, planning_cpu = time.monotonic() - began, time.process_time() - before

    class Simulated(ray_cluster.RayCluster):
        """Ray as it is, but for the task's body, which sleeps, and for processes that are used again."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            options = {
                "num_cpus": self.threads,
                "num_gpus": 1,
                "max_retries": 0,
                "num_returns": "streaming",
                "max_calls": 0,
            }
            self._remote = self._ray.remote(**options)(simulate)
            warm(self._ray)

        @contextlib.contextmanager
        def shared(self, store: Any, plan: Any) -> Iterator[None]:
            yield

    dispatch.make_executor = lambda runtime, workers: Simulated(runtime, workers)  # type: ignore[assignment]
    spent = [0.0, 0.0, 0]  # seconds by the clock and of the thread's CPU, states told

    def timed(name: str) -> None:
        plain = getattr(mlflow_runs.MLflowTracker, name)

        def call(self: Any, *given: Any) -> None:
            before, before_cpu = time.monotonic(), time.thread_time()
            plain(self, *given)
            spent[0] += time.monotonic() - before
            spent[1] += time.thread_time() - before_cpu
            spent[2] += name == "cell"

        setattr(mlflow_runs.MLflowTracker, name, call)

    for name in ("cell", "usage", "progress"):
        timed(name)
    began = time.monotonic()
    driver.run(sweep, command=str(log))
    wall = time.monotonic() - began
    costs = {"planning": planning, "planning_cpu": planning_cpu, "wall": wall, "peak": peak_bytes()}
    told = {"tracking": spent[0], "tracking_cpu": spent[1], "told": spent[2]}
    return {**costs, **told, **summary(log, int(ray.cluster_resources()["GPU"]))}


def warm(ray: Any) -> None:
    """Start a worker process for every GPU, before the clock runs."""

    @ray.remote(num_gpus=1, max_calls=0)
    def wait_together(seconds: float) -> None:
        import harness.execution.dispatch
        import harness.execution.worker  # noqa: F401

        time.sleep(seconds)

    gpus = int(ray.cluster_resources()["GPU"])
    ray.get([wait_together.remote(5.0) for _ in range(gpus)])
    ray.get([wait_together.remote(2.0) for _ in range(gpus)])


def summary(log: Path, gpus: int) -> dict[str, float]:
    """Busy shares and loads of what the tasks wrote down."""
    tasks = [json.loads(line) for path in log.iterdir() for line in path.read_text().splitlines()]
    first = min(task["began"] for task in tasks)
    tail = max(task["began"] for task in tasks)  # from here on nothing was left to start
    held = sum(min(task["ended"], tail) - task["began"] for task in tasks if task["began"] < tail)
    starting = sum(
        min(task["start"], tail - task["began"]) for task in tasks if task["began"] < tail
    )
    room = max(1e-9, (tail - first) * gpus)
    span = max(task["ended"] for task in tasks) - first
    return {
        "tasks": len(tasks),
        "busy": held / room,
        "working": (held - starting) / room,
        "until_tail": tail - first,
        "span": span,
        "gpus": len({task["gpu"] for task in tasks}),
        "cells_per_load": sum(task["cells"] for task in tasks) / len(tasks),
    }


LAUNCHED = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import hydra
@hydra.main(version_base=None, config_path=None, config_name="config")
def job(config):
    import os, time
    from bench_cluster import LOAD, START, cost, gpu, log_line
    began = time.time()
    time.sleep(START + LOAD)                    # one load for both halves
    key = f"{config.model}-{config.scheme}"
    time.sleep(cost(key, "quantize") + cost(key, "demo_perplexity"))
    log_line(config.log, began=began, ended=time.time(), start=START, gpu=gpu(), model=str(config.model), cells=1)
from hydra.core.config_store import ConfigStore
ConfigStore.instance().store(name="config", node={"model": 0, "scheme": 0, "log": ""})
import ray
ray.init(address=sys.argv.pop(1), logging_level=40, log_to_driver=False)
from bench_cluster import warm
warm(ray)
job()
"""


def launched(address: str, count: int, folder: Path, gpus: int) -> dict[str, float]:
    """The same grid by Hydra's Ray launcher: one job per cell."""
    log = folder / "jobs"
    log.mkdir()
    script = folder / "launched.py"
    script.write_text(LAUNCHED)
    schemes = ",".join(str(number) for number in range(count // MODELS))
    words = [
        sys.executable,
        str(script),
        str(HERE.parent),
        address,
        "--multirun",
        "hydra/launcher=ray",
        "+hydra.launcher.ray.remote.num_gpus=1",
        "+hydra.launcher.ray.remote.max_calls=0",
        f"hydra.sweep.dir={folder}/multirun",
        f"log={log}",
        f"model={','.join(map(str, range(MODELS)))}",
        f"scheme={schemes}",
    ]
    began = time.monotonic()
    with (folder / "launched.log").open("w") as out:
        done = subprocess.run(
            words, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": path()}, cwd=folder
        )
    if done.returncode:
        print((folder / "launched.log").read_text()[-3000:])
        raise SystemExit("Hydra's Ray launcher ended with an error")
    return {"wall": time.monotonic() - began, **summary(log, gpus)}


def path() -> str:
    return os.pathsep.join(
        [str(HERE.parents[2]), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    )


def cluster(nodes: int, gpus: int) -> Any:
    """Ray nodes with made-up GPUs on this machine's loopback interface."""
    from harness.execution.executors import ray_cluster

    ray_cluster._import_ray()
    from ray.cluster_utils import Cluster

    made = Cluster()
    for _ in range(nodes):
        made.add_node(
            num_cpus=gpus, num_gpus=gpus, object_store_memory=80_000_000, include_dashboard=False
        )
    made.wait_for_nodes()
    return made


def isolated(
    what: str, address: str, count: int, folder: Path, tracking: str = "none"
) -> dict[str, float]:
    """`ours` in a process of its own."""
    words = [
        sys.executable,
        str(HERE),
        "--inside",
        json.dumps([what, address, count, str(folder), tracking]),
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path()}
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-5000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def text(who: str, cells: int, found: dict[str, float]) -> str:
    """One line of figures."""
    shares = f"busy {found['busy']:.3f}, working {found['working']:.3f}"
    return (
        f"{who:<11} {cells} cells, {found['tasks']:.0f} tasks on {found['gpus']:.0f} GPUs in {found['span']:.0f} s; "
        f"{shares} for the {found['until_tail']:.0f} s until nothing was left to start; wall {found['wall']:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=8, help="of each node")
    parser.add_argument("--launcher", action="store_true")
    parser.add_argument("--tracking", action="store_true")
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        _, address, count, folder, tracking = json.loads(given.inside)
        print(json.dumps(ours(address, count, Path(folder), tracking)))
        return 0
    machine, load = platform.processor() or platform.machine(), os.getloadavg()[0]
    print(
        f"{machine}, {os.cpu_count()} cores, load {load:.1f} before, {time.strftime('%Y-%m-%d')}",
        flush=True,
    )
    fine = True
    os.environ["PYTHONPATH"] = path()  # workers of the nodes import this file
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        nodes = cluster(given.nodes, given.gpus)
        try:
            (root / "ours").mkdir()
            mine = isolated("ours", nodes.address, given.cells, root / "ours")
            print(text("ours", given.cells, mine))
            planned = f"planning {mine['planning']:.1f} s ({mine['planning_cpu']:.1f} s of CPU)"
            print(f"{'':<11} {planned}, driver {mine['peak'] / 1e6:.0f} MB", flush=True)
            fine &= mine["busy"] >= 0.9 and mine["planning_cpu"] < 10 and mine["peak"] < 1e9
            if given.launcher:
                (root / "theirs").mkdir()
                theirs = launched(
                    nodes.address, given.cells, root / "theirs", given.nodes * given.gpus
                )
                print(text("launcher", given.cells, theirs), flush=True)
        finally:
            nodes.shutdown()
        if given.tracking:
            nodes = cluster(1, 16)
            try:
                (root / "tracked").mkdir()
                seen = isolated("ours", nodes.address, 192, root / "tracked", "sqlite")
            finally:
                nodes.shutdown()
            share = seen["tracking"] / (16 * seen["span"])
            print(
                f"tracking    16 workers, 192 cells in {seen['span']:.0f} s: {seen['told']:.0f} states, metrics and progress "
                f"told in {seen['tracking']:.1f} s ({seen['tracking_cpu']:.1f} s of CPU), {share:.4f} of the workers' time"
            )
            fine &= share <= 0.01
    return int(not fine)


if __name__ == "__main__":
    raise SystemExit(main())
