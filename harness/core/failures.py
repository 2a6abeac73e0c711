"""Kinds of failure: for each kind its name in records, the sentence that states it, how it is retried, and what a person can do.

Every part of the harness that reports a failure names one of these kinds. Whether an error means that memory ran out is decided
here and nowhere else.
"""

from __future__ import annotations

import enum

OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",  # torch's CPU allocator: DefaultCPUAllocator: can't allocate memory: …
    "cannot allocate memory",  # the operating system (ENOMEM)
    "not enough memory",  # torch's CPU allocator on other systems
)


class FailureKind(enum.StrEnum):
    """Why a cell, or a task, failed. The value is what events, records and MLflow hold.

    sentence  what happened, in a clause to which details are appended
    retried   what the scheduler changes when it retries the work; "" for a kind that is never retried
    remedy    what a person can do about it, as an instruction
    """

    sentence: str
    retried: str
    remedy: str

    def __new__(
        cls, value: str, sentence: str = "", retried: str = "", remedy: str = ""
    ) -> FailureKind:
        """A member that equals its value, with its three texts."""
        kind = str.__new__(cls, value)
        kind._value_ = value
        kind.sentence, kind.retried, kind.remedy = sentence, retried, remedy
        return kind

    ERROR = (
        "error",
        "the task ended with an error",
        "retried in smaller tasks",
        "read the traceback with harness show, then rerun the same command",
    )
    OUT_OF_MEMORY = (
        "out_of_memory",
        "memory ran out",
        "retried in a task of its own, then with no other task on the device",
        "set a smaller batch_size= or fewer cluster.workers=, or use a device with more memory",
    )
    KILLED = (
        "killed",
        "the worker process was killed",
        "retried in smaller tasks, then with no other task on the device",
        "the system kills processes when main memory runs out: set fewer cluster.workers=, then rerun the same command",
    )
    TIMEOUT = (
        "timeout",
        "the task ran longer than cluster.task_timeout_seconds",
        "retried in smaller tasks",
        "raise cluster.task_timeout_seconds=, or set it to 0 for no limit",
    )
    LOST = (
        "lost",
        "the node of the task was lost",
        "retried unchanged on another node",
        "restart the node or add another, then rerun the same command",
    )
    HEAD_LOST = (
        "head_lost",
        "the head of the cluster no longer answers",
        "retried unchanged once the head is back",
        "start the cluster again, then rerun the same command",
    )
    NO_NODE = (
        "no_node",
        "no node of the cluster has enough GPUs",
        "",
        "add such a node, then rerun the same command",
    )
    CANCELLED = (
        "cancelled",
        "cancelled with harness cancel",
        "",
        "rerun the same command to finish it",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a device or of the host. torch's own class is known by its name."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(
        words in text for words in OUT_OF_MEMORY_WORDS
    )


def failure_kind(error: BaseException) -> FailureKind:
    """The kind of failure that an error is."""
    return FailureKind.OUT_OF_MEMORY if is_out_of_memory(error) else FailureKind.ERROR


def with_remedy(reason: str, kind: str) -> str:
    """A reason and what a person can do about it, as lines for people show it.

    kind: as a record has it. Of a plain error, and of a kind that this version does not know, the reason alone: the traceback,
    which `harness show` prints, says more.
    """
    known = kind in set(FailureKind) and kind != FailureKind.ERROR
    return f"{reason}; {FailureKind(kind).remedy}" if known else reason
