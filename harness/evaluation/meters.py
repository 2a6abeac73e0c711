"""What a device says of itself while a model runs on it: the energy it used, and who else was on it. No evaluator by itself.

NVIDIA cards answer through their driver's library (NVML) where it is installed, processors through the kernel's energy counters
(RAPL), which often root alone may read, and /proc/stat. Where nobody answers, the value is None: nothing is estimated.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COUNTERS = Path("/sys/class/powercap")  # intel-rapl:<package>/energy_uj, of AMD's processors too
STATISTICS = Path("/proc/stat")
MOST_PROCESSES = 256


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t of NVML's third version."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("memory", ctypes.c_ulonglong),
        ("gpu", ctypes.c_uint),
        ("compute", ctypes.c_uint),
    )


def energy_joules(device: str) -> float | None:
    """Joules that the device has used since its counter began; differences have a meaning. A processor's are all its packages'."""
    if torch.device(device).type == "cuda":
        library, handle = _card(device)
        used = ctypes.c_ulonglong()
        if (
            library is None
            or library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used)) != 0
        ):
            return None
        return used.value / 1000
    try:
        counters = [
            int(path.read_text()) for path in sorted(COUNTERS.glob("intel-rapl:[0-9]/energy_uj"))
        ]
    except (OSError, ValueError):
        return None
    return sum(counters) / 1e6 if counters else None


def other_processes(device: str) -> int | None:
    """How many processes other than this one compute on a card; None where it does not say, or for a processor."""
    if torch.device(device).type != "cuda":
        return None
    library, handle = _card(device)
    count, found = ctypes.c_uint(MOST_PROCESSES), (_Process * MOST_PROCESSES)()
    running = getattr(
        library, "nvmlDeviceGetComputeRunningProcesses_v3", None
    )  # drivers before 510 have older forms
    if running is None or running(handle, ctypes.byref(count), found) != 0:
        return None
    return max(0, count.value - 1)  # by number, not by pid: a container has numbers of its own


@dataclass(frozen=True)
class ProcessorTime:
    """Processor seconds since some start: of this process, and of all processes of the machine; None where it does not say."""

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
        """The share of the machine that other processes had since then, 0 to 1."""
        if self.all is None or earlier.all is None or self.clock <= earlier.clock:
            return None
        others = (self.all - earlier.all) - (self.own - earlier.own)
        return min(1.0, max(0.0, others / ((self.clock - earlier.clock) * (os.cpu_count() or 1))))


def _card(device: str) -> tuple[Any, Any]:
    """NVML and its handle of a torch device; (None, None) where either is missing."""
    library = _nvml()
    handle = ctypes.c_void_p()
    if library is None:
        return None, None
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    return (
        (library, handle)
        if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0
        else (None, None)
    )


@functools.cache
def _nvml() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None
