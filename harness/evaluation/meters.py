"""Measurements of a device while a model runs on it: energy, memory, and which other processes it ran. Not an evaluator.

NVIDIA GPUs are read through their driver's library (NVML, by nvidia-ml-py), processors through the energy counters of the kernel
(RAPL), which often only root may read, and through /proc/stat. Where a reading is missing, the value is None: nothing is estimated.
"""

from __future__ import annotations

import functools
import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COUNTERS = Path("/sys/class/powercap")  # intel-rapl:<package>/energy_uj, of AMD's processors too
STATISTICS = Path("/proc/stat")


def energy_joules(device: str) -> float | None:
    """Joules that the device used since its counter started; only differences have a meaning. Of a processor, all packages."""
    if torch.device(device).type == "cuda":
        millijoules = _ask_card(device, "nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000
    try:
        counters = [
            int(path.read_text()) for path in sorted(COUNTERS.glob("intel-rapl:[0-9]/energy_uj"))
        ]
    except (OSError, ValueError):
        return None
    return sum(counters) / 1e6 if counters else None


def peak_memory_bytes(device: str) -> int:
    """Most memory in use: allocated on the card since the counters were reset, or resident in this process since it began."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if platform.system() == "Darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def other_processes(device: str) -> int | None:
    """Number of processes other than this one that compute on a GPU; None where that is unknown, and for a processor."""
    if torch.device(device).type != "cuda":
        return None
    running = _ask_card(device, "nvmlDeviceGetComputeRunningProcesses")
    # This process is one of them. Counted and not compared by pid, because a container has pids of its own.
    return None if running is None else max(0, len(running) - 1)


@dataclass(frozen=True)
class ProcessorTime:
    """Processor seconds since some start: of this process, and of all processes of the machine (None where that is unknown)."""

    clock: float
    own: float
    all: float | None

    @classmethod
    def now(cls) -> ProcessorTime:
        own = os.times()
        try:
            # user, nice, system, idle, waiting, interrupts, soft interrupts; in ticks
            ticks = [int(text) for text in STATISTICS.read_text().split("\n", 1)[0].split()[1:8]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return cls(time.monotonic(), own.user + own.system, None)
        return cls(time.monotonic(), own.user + own.system, busy)

    def others_share(self, earlier: ProcessorTime) -> float | None:
        """The fraction of the machine that other processes used since `earlier`, 0 to 1."""
        if self.all is None or earlier.all is None or self.clock <= earlier.clock:
            return None
        others = (self.all - earlier.all) - (self.own - earlier.own)
        return min(1.0, max(0.0, others / ((self.clock - earlier.clock) * (os.cpu_count() or 1))))


def _ask_card(device: str, function: str) -> Any:
    """The answer of an NVML function for a torch device; None where the library, the driver or the answer is missing."""
    library = _nvml()
    if library is None:
        return None
    try:
        uuid = torch.cuda.get_device_properties(device).uuid
        return getattr(library, function)(library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except library.NVMLError:
        return None


@functools.cache
def _nvml() -> Any:
    """NVIDIA's bindings of its driver's library, set up; None where the package or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
