"""The process that a task runs in: device, threads, memory limits, usage."""

from __future__ import annotations

import gc
import os
import time

from harness.core.errors import HarnessError

USAGE_SECONDS = 15.0  # between two readings of a process's use


def prepare(device: str, threads: int, gpu_fraction: float = 1.0, devices: int = 1) -> str:
    """Set this process up for a task and return its device (the first of several). Raises HarnessError where it does not exist.

    gpu_fraction: of the GPU's memory that this process may allocate, 0 to 1; a task that needs more fails itself, and no other.
    """
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads > 0:
        torch.set_num_threads(threads)
    # Hessians in TF32 are no longer positive definite
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":  # no GPU driver is loaded
        return device
    available = torch.cuda.is_available()
    if device == "auto" and not available:
        return "cpu"
    if not available:
        raise HarnessError(
            f'device "{device}": torch finds no CUDA device in this process; use device=cpu or device=auto'
        )
    if devices > 1:
        if torch.cuda.device_count() < devices:
            raise HarnessError(
                f"the task needs {devices} GPUs, and this process sees {torch.cuda.device_count()}"
            )
        for index in range(devices):
            torch.cuda.set_per_process_memory_fraction(1.0, index)
        return "cuda:0"
    device = "cuda" if device == "auto" else device
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, gpu_fraction), torch.device(device).index or 0
    )
    torch.cuda.reset_peak_memory_stats()
    return device


def device_name(device: str) -> str:
    """ "cpu", or the name of the GPU."""
    if device == "cpu":
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def release(device: str) -> None:
    """Free the memory of a finished cell before the next one is loaded."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()


def peak_memory(device: str) -> int:
    """Peak bytes: allocated on the GPU, or resident in this process."""
    from harness.evaluation.meters import peak_memory_bytes  # imports torch

    return peak_memory_bytes(device)


def thread_count() -> int:
    """CPU threads of one operation in this process."""
    import torch

    return torch.get_num_threads()


class UsageMeter:
    """Reads the CPU and memory use of this process after USAGE_SECONDS, then every USAGE_SECONDS per cell that it is sent for."""

    def __init__(self, device: str) -> None:
        import psutil

        self._device, self._process = device, psutil.Process()
        self._due = time.monotonic() + USAGE_SECONDS
        self._process.cpu_percent()  # the first reading covers no time

    def now(self, cells: int) -> dict[str, float] | None:
        """CPU percent and memory in MB; None where the last reading is recent. cells: number of cells that it is sent for."""
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + USAGE_SECONDS * max(1, cells)
        facts = {
            "cpu_percent": self._process.cpu_percent(),
            "memory_megabytes": self._process.memory_info().rss / 1e6,
        }
        if self._device != "cpu":
            import torch

            facts["gpu_memory_megabytes"] = torch.cuda.memory_reserved(self._device) / 1e6
        return facts
