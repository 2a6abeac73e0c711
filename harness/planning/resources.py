"""What this machine has: cores, GPUs, memory, disk quota, and what one task gets of it."""

from __future__ import annotations

import functools
import os
from typing import TypeVar

from harness.core import plugins
from harness.core.cell import Evaluation
from harness.core.sweep import Runtime
from harness.core.units import bytes_of, size

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ASSUMED_SLOTS = 4  # of a cluster elsewhere, in estimates
MEMORY_SHARE = 0.9  # of what is free; the rest is for the process and the allocator's gaps

T = TypeVar("T")


def count_workers(runtime: Runtime) -> int:
    """Tasks that run at once on this machine: as configured, else one per share of a GPU, else one per two cores.

    A cluster at an address decides for itself how many it runs; for it this is 4 per configured default, used in estimates alone.
    """
    if runtime.cluster.workers:
        return runtime.cluster.workers
    if runtime.cluster.address:
        return ASSUMED_SLOTS
    if uses_gpu(runtime):
        return max(1, int(count_gpus() / max(runtime.cluster.gpus_per_task, 1 / 16)))
    return max(1, count_cores() // 2)


def count_cores() -> int:
    """Cores that this process may use; a container or a batch system may allow fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # no affinity on this operating system
        return os.cpu_count() or 1


@functools.cache
def count_gpus() -> int:
    """CUDA devices that torch can use on this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_memory(runtime: Runtime) -> tuple[int | None, str]:
    """Bytes free on the device that tasks of this machine would use, and its name; None for a cluster that is elsewhere."""
    if runtime.cluster.address:
        return None, "the cluster"
    if uses_gpu(runtime):
        import torch

        return min(torch.cuda.mem_get_info(index)[0] for index in range(count_gpus())), "the GPU"
    return available_memory(), "this machine"


def available_memory() -> int:
    """Bytes of main memory that processes may still take."""
    import psutil

    return int(psutil.virtual_memory().available)


def measures_device(evaluation: Evaluation) -> bool:
    """It measures the device that it is on: several, or one that waits for main memory, are another."""
    facts = plugins.find("evaluator").get(evaluation.evaluator)
    return facts is not None and bool(facts.get("exclusive", False))


def uses_gpu(runtime: Runtime) -> bool:
    """Whether tasks on this machine run on a GPU."""
    return runtime.device != "cpu" and count_gpus() > 0


def gpu_share(runtime: Runtime) -> float:
    """The share of a GPU's memory that one task has; its process takes no more (`work.prepare`)."""
    cluster = runtime.cluster
    if cluster.kind == "local" and not cluster.address:
        return min(1.0, count_gpus() / count_workers(runtime)) if uses_gpu(runtime) else 1.0
    return min(1.0, cluster.gpus_per_task) or 1.0


def quota_bytes(runtime: Runtime) -> int | None:
    """What the store may take, or None."""
    return bytes_of(runtime.store.quota, "store.quota") if runtime.store.quota else None


def over_quota(runtime: Runtime, used: int, needed: int) -> str:
    """A sentence where the store would take more than its quota, else ""."""
    quota = quota_bytes(runtime)
    if quota is None or used + needed <= quota:
        return ""
    return (
        f"the checkpoints take about {size(needed)}, and {runtime.runs} holds {size(used)} of its quota of {size(quota)}; "
        f"harness gc --dry-run --runs {runtime.runs} says what may go, and store.quota=SIZE raises the quota"
    )
