"""Events of failures."""

from __future__ import annotations

from harness.core.errors import HarnessError
from harness.core.failures import is_out_of_memory
from harness.execution.failures import failure


def test_kinds_of_failure() -> None:
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(ValueError("out of memory of the question"))
    failed = failure(HarnessError("what, where\nmore"), ("k",), "stage")
    assert (failed.kind, failed.reason) == ("error", "what, where")
    assert failure(MemoryError(), ("k",), "s").kind == "out_of_memory"
