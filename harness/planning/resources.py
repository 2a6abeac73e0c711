"""Cores, GPUs, memory and disk quota of this machine, and the part of them that one task gets."""

from __future__ import annotations

import functools
import glob
import os
from typing import TypeVar

from harness.core import plugins
from harness.core.cell import Evaluation
from harness.core.sweep import Runtime
from harness.core.units import bytes_of, size

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ASSUMED_SLOTS = 4  # of a cluster at an address, in estimates
# of the free memory that a plan uses; the rest is for the process and the allocator's gaps
MEMORY_SHARE = 0.9

# device files of NVIDIA's cards (also embedded ones and below Windows) and of AMD's
GPU_FILES = ("/dev/nvidia*", "/dev/nvhost*", "/dev/dxg", "/dev/kfd")

T = TypeVar("T")


def count_workers(runtime: Runtime) -> int:
    """Tasks that run at once on this machine: as configured, else one per fraction of a GPU, else one per two cores.

    A cluster at an address has as many as its nodes allow; for it this is ASSUMED_SLOTS, used in estimates only.
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
    """CUDA devices that torch can use on this machine. Without a device file of a GPU there is none, and torch is not asked."""
    if os.name == "posix" and not any(glob.glob(pattern) for pattern in GPU_FILES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_memory(runtime: Runtime) -> tuple[int | None, str]:
    """Bytes free on the device that tasks of this machine use, and its name; None for a cluster at an address."""
    if runtime.cluster.address:
        return None, "the cluster"
    if uses_gpu(runtime):
        import torch

        return min(torch.cuda.mem_get_info(index)[0] for index in range(count_gpus())), "the GPU"
    return available_memory(), "this machine"


def available_memory() -> int:
    """Bytes of main memory that processes can still allocate."""
    import psutil

    return int(psutil.virtual_memory().available)


def measures_device(evaluation: Evaluation) -> bool:
    """Whether an evaluation measures its device, so that several GPUs, or blocks in main memory, would change the result."""
    facts = plugins.find("evaluator").get(evaluation.evaluator)
    return facts is not None and bool(facts.get("exclusive", False))


def uses_gpu(runtime: Runtime) -> bool:
    """Whether tasks on this machine run on a GPU."""
    return runtime.device != "cpu" and count_gpus() > 0


def gpu_fraction(runtime: Runtime) -> float:
    """The fraction of a GPU's memory that one task has, 0 to 1; its process allocates no more (`process.prepare`)."""
    cluster = runtime.cluster
    if cluster.kind == "local" and not cluster.address:
        return min(1.0, count_gpus() / count_workers(runtime)) if uses_gpu(runtime) else 1.0
    return min(1.0, cluster.gpus_per_task) or 1.0


def quota_bytes(runtime: Runtime) -> int | None:
    """Bytes that the store may take; None for no limit."""
    return bytes_of(runtime.store.quota, "store.quota") if runtime.store.quota else None


def over_quota(runtime: Runtime, used: int, needed: int) -> str:
    """A sentence where the store would take more than its quota, else ""."""
    quota = quota_bytes(runtime)
    if quota is None or used + needed <= quota:
        return ""
    return (
        f"the checkpoints take about {size(needed)}, and {runtime.runs} holds {size(used)} of its quota of {size(quota)}; "
        f"harness gc --dry-run --runs {runtime.runs} lists what can be deleted, and store.quota=SIZE raises the quota"
    )
