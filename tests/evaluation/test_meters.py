"""Readings of GPUs through NVML: units, this process left out, and None where a reading is missing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.evaluation import meters


class NVMLError(Exception):
    """As pynvml's."""


class Library:
    """What pynvml offers, for one GPU."""

    NVMLError = NVMLError

    def __init__(self, millijoules: int | None, processes: int) -> None:
        self.millijoules, self.processes = millijoules, processes

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1234":
            raise NVMLError("not found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.millijoules is None or handle != "handle":
            raise NVMLError("not supported")
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=number) for number in range(self.processes)]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a library, and the name of the GPU that torch sees."""

    def install(library: Library | None, uuid: str = "1234") -> None:
        monkeypatch.setattr(meters, "_nvml", lambda: library)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid)
        )

    return install


def test_energy_is_in_joules_and_this_process_does_not_count(card: Any) -> None:
    card(Library(16_500, 3))
    assert meters.energy_joules("cuda:0") == 16.5 and meters.other_processes("cuda:0") == 2
    card(Library(0, 0))  # a container that does not see its own process
    assert meters.energy_joules("cuda") == 0 and meters.other_processes("cuda") == 0


@pytest.mark.parametrize("library", [None, Library(None, 1)])
def test_a_missing_reading_is_none(card: Any, library: Library | None) -> None:
    card(library)
    assert meters.energy_joules("cuda:0") is None


def test_a_card_that_the_driver_does_not_know_is_none(card: Any) -> None:
    card(Library(1, 1), uuid="5678")
    assert meters.energy_joules("cuda:0") is None and meters.other_processes("cuda:0") is None


def test_without_a_driver_there_is_no_library() -> None:
    """Where the package is installed and the driver is not, as on a machine without NVIDIA GPUs."""
    pynvml = pytest.importorskip("pynvml")
    meters._nvml.cache_clear()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert meters._nvml() is None
    else:
        assert meters._nvml() is pynvml
    assert meters.other_processes("cpu") is None
