"""The process of a task: its part of a GPU's memory."""

from __future__ import annotations

import pytest

from harness.core.failures import is_out_of_memory
from harness.execution.process import prepare


def test_a_fraction_of_a_gpu_is_a_cap_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card: what torch is asked. A process on the CPU asks no driver for anything."""
    import torch

    asked: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, index: asked.append((share, index)),
    )
    assert (
        prepare("auto", 0, 0.25) == "cuda"
        and prepare("cuda:1", 0, 0.5) == "cuda:1"
        and prepare("cuda", 0) == "cuda"
    )
    assert asked == [(0.25, 0), (0.5, 1), (1.0, 0)]
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: pytest.fail("a CPU task looked for GPUs")
    )
    assert prepare("cpu", 0, 0.25) == "cpu"


@pytest.mark.gpu
def test_the_cap_holds_on_a_card() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        prepare("cuda", 0, 0.1)
        with pytest.raises(torch.OutOfMemoryError) as full:
            torch.empty(int(total * 0.2), dtype=torch.uint8, device="cuda")
        assert is_out_of_memory(full.value)
        torch.empty(int(total * 0.05), dtype=torch.uint8, device="cuda")
    finally:
        prepare("cuda", 0, 1.0)
        torch.cuda.empty_cache()
