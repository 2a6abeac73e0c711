"""Kinds of failure: which errors mean that memory ran out, and that every kind has its texts."""

from __future__ import annotations

import json

import pytest

from harness.core.errors import HarnessError
from harness.core.events import Failed
from harness.core.failures import FailureKind, failure_kind, is_out_of_memory

ON_THE_HOST = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"
)


class OutOfMemoryError(RuntimeError):
    """Named as torch's class is."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(ON_THE_HOST),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity"),
        RuntimeError("CUDA error: out of memory"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
        OutOfMemoryError("no words of it"),
    ],
)
def test_memory_that_ran_out_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error) and failure_kind(error) is FailureKind.OUT_OF_MEMORY


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory of the question"),
        RuntimeError("shape mismatch"),
        HarnessError("no such model"),
        KeyError("memory"),
    ],
)
def test_other_errors_are_errors(error: Exception) -> None:
    assert not is_out_of_memory(error) and failure_kind(error) is FailureKind.ERROR


def test_what_the_allocator_of_torch_raises_is_recognised() -> None:
    """The message itself, whatever the installed torch says."""
    torch = pytest.importorskip("torch")
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert failure_kind(raised.value) is FailureKind.OUT_OF_MEMORY


def test_records_hold_the_value() -> None:
    """Old records are read by these names."""
    names = "error out_of_memory killed timeout lost head_lost no_node cancelled".split()
    assert [kind.value for kind in FailureKind] == names
    assert json.dumps({"kind": FailureKind.KILLED}) == '{"kind": "killed"}'
    for name in names:
        assert FailureKind(name) == name and f"{FailureKind(name)}" == name


def test_every_kind_has_its_texts() -> None:
    for kind in FailureKind:
        assert kind.sentence and kind.remedy
    assert len({kind.sentence for kind in FailureKind}) == len(FailureKind)


def test_an_event_names_a_kind_that_exists() -> None:
    assert Failed(0.0, kind="lost").kind is FailureKind.LOST
    with pytest.raises(ValueError, match="nonsense"):
        Failed(0.0, kind="nonsense")
