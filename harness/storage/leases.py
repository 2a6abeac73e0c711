"""Leases: locks on an object store, renewed while their owner lives."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from dataclasses import dataclass, field

from harness.storage.locks import Owner

BEAT_SECONDS = 5.0  # between two signs of life of a lease
LEASE_SECONDS = 60.0  # without one, after which others take over
creating = (
    threading.Lock()
)  # file systems without conditional writes are those of one process, as memory://


@dataclass
class Lease:
    """A lock that this process holds. key: of its object; lost: another took it over."""

    key: str
    following: str
    token: str
    beat: int = 0
    renewed: float = field(default_factory=time.monotonic)
    lost: bool = False
    ended: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)  # no beat after the end

    def body(self, free: bool = False) -> bytes:
        owner = dataclasses.asdict(Owner.current())
        return json.dumps(
            {"token": self.token, "beat": self.beat, "owner": owner, "free": free}
        ).encode()


def is_refused_condition(error: OSError) -> bool:
    """Whether a conditional write found an object. s3fs says so plainly only where the answer names it, as Amazon's."""
    answer = getattr(error.__cause__, "response", None) or {}
    refused = ("PreconditionFailed", "412", "ConditionalRequestConflict")
    return isinstance(error, FileExistsError) or answer.get("Error", {}).get("Code") in refused
