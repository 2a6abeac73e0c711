"""What a failure is: its kind, the sentence that says it, and what a person can do.

Every part of the harness that reports a failure names one of these kinds; whether memory ran out is asked here and nowhere else.
"""

from __future__ import annotations

import enum

OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",  # torch's CPU allocator: DefaultCPUAllocator: can't allocate memory: …
    "cannot allocate memory",
    "not enough memory",
)


class FailureKind(enum.StrEnum):
    """Why a cell, or a task, did not end well. The value is what events, records and MLflow hold."""

    ERROR = "error"
    OUT_OF_MEMORY = "out_of_memory"
    KILLED = "killed"
    TIMEOUT = "timeout"
    LOST = "lost"
    HEAD_LOST = "head_lost"
    NO_NODE = "no_node"
    CANCELLED = "cancelled"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a device or of the host. Loads no torch: torch's own class is asked by name."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(words in text for words in OUT_OF_MEMORY_WORDS)


def failure_kind(error: BaseException) -> FailureKind:
    """The kind of failure that an error is."""
    return FailureKind.OUT_OF_MEMORY if is_out_of_memory(error) else FailureKind.ERROR
