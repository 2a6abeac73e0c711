"""Leases: locks in an object store, which their holder renews while it lives.

A lease is an object that is created only if nobody else created it (a conditional write) and is rewritten every few seconds by a
thread of its holder. A process that waits takes over when the object has not changed for LEASE_SECONDS of the waiter's own clock,
so clocks need not agree. A lease is weaker than a lock of an operating system: a holder that was stopped for longer than that
learns of it at its next renewal or write and gives up; until then two processes may do the same work. Object stores that ignore
the condition are detected and named in a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from harness.core.errors import StoreError
from harness.storage.locks import Owner, Waiting, wait_until

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0  # between two renewals of a lease
LEASE_SECONDS = 60.0  # without a renewal, after which others take over
# A file system without conditional writes is one of a single process (memory://), where a lock does the same.
_creating = threading.Lock()


@dataclass
class Lease:
    """A lock that this process holds.

    key        of its object; following: the key of the lease that would take over
    beat       number of renewals; renewed: time of the last one, on this process's clock
    lost       another process took over, or the last renewal is too old
    ended      released; guard: no renewal may follow the release
    """

    key: str
    following: str
    token: str
    beat: int = 0
    renewed: float = field(default_factory=time.monotonic)
    lost: bool = False
    ended: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)

    def body(self, free: bool = False) -> bytes:
        """The content of its object: token, number of renewals, owner, and whether it was released."""
        owner = dataclasses.asdict(Owner.current())
        return json.dumps(
            {"token": self.token, "beat": self.beat, "owner": owner, "free": free}
        ).encode()


class Leases:
    """The leases that this process holds below a prefix of a file system, and a thread that renews them.

    files   an fsspec file system; `pipe_file(…, mode="create")` is its conditional write
    prefix  of all keys, without a slash at its end
    place   the address of the store, for messages
    """

    def __init__(self, files: Any, prefix: str, place: str) -> None:
        self.held: list[Lease] = []
        self._files, self._prefix, self._place = files, prefix, place
        self._seen: dict[str, tuple[Any, float]] = {}
        self._renewing: threading.Thread | None = None
        self._checked = False

    @contextmanager
    def lock(
        self, name: str, timeout: float | None = None, on_wait: Waiting | None = None
    ) -> Iterator[None]:
        """Hold the lease `name` (a path below the prefix); wait while another process or thread has it.

        timeout   seconds to wait before StoreError names the holder; None waits without end
        on_wait   called once with the holder when there is a wait
        Raises what the file system raises where it cannot be reached.
        """
        key = f"{self._prefix}/{name}"
        lease = wait_until(lambda: self._try(key), f"{self._place}/{name}", timeout, on_wait)
        try:
            yield
        finally:
            self._release(lease)

    def check(self) -> None:
        """Raise StoreError where this process has lost a lease that it holds: another does its work."""
        lost = [lease.key.rpartition("/")[0] for lease in self.held if lease.lost]
        if lost:
            raise StoreError(
                f"this process did not renew its locks for {LEASE_SECONDS:g} s; another took over its work: {', '.join(lost)}"
            )

    def create(self, key: str, body: bytes) -> bool:
        """A conditional write; False where the object exists."""
        with _creating:
            try:
                self._files.pipe_file(key, body, mode="create")
            except TypeError:  # the file system has no conditional writes
                self._files.pipe_file(key, body)
                return True
            except OSError as error:
                if is_refused_condition(error):
                    return False
                raise
            if not self._checked:
                self._checked = True
                self._check_condition(key, body)
        return True

    def _check_condition(self, key: str, body: bytes) -> None:
        """Warn where a second conditional write of an object that exists is not refused."""
        try:
            self._files.pipe_file(key, body, mode="create")
        except OSError as error:
            if not is_refused_condition(error):
                raise
        else:
            log.warning(
                "%s ignores conditional writes: two drivers that start in the same second may do the same work twice "
                "(results stay right)",
                self._place,
            )

    def _try(self, key: str) -> tuple[Lease | None, Owner | None]:
        """(lease, None) when taken, (None, holder) when not.

        Generations of a lease are numbered: the process that creates the next one holds it, and only one process can.
        """
        try:
            generations = sorted(self._files.ls(key, detail=False))
        except FileNotFoundError:
            generations = []
        number = 0
        if generations:
            number = int(generations[-1].rpartition("/")[2])
            try:
                state = json.loads(self._files.cat_file(generations[-1]))
            except (FileNotFoundError, ValueError):
                return None, None  # it is being replaced
            if not state["free"] and not self._is_abandoned(key, number, state):
                return None, Owner(**state["owner"])
        lease = Lease(f"{key}/{number + 1:012}", f"{key}/{number + 2:012}", uuid.uuid4().hex)
        if not self.create(lease.key, lease.body()):
            return None, None
        if json.loads(self._files.cat_file(lease.key))["token"] != lease.token:
            return None, None  # the condition was ignored, and another process wrote after this one
        for old in generations:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(old)
        self.held.append(lease)
        if self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, name="leases", daemon=True)
            self._renewing.start()
        return lease, None

    def _is_abandoned(self, key: str, number: int, state: dict[str, Any]) -> bool:
        """Whether the holder is certainly dead, or has not renewed the lease for LEASE_SECONDS while this process watched."""
        if Owner(**state["owner"]).is_dead:
            return True
        mark, now = (number, state["token"], state["beat"]), time.monotonic()
        seen = self._seen.get(key)
        if seen is None or seen[0] != mark:
            self._seen[key] = mark, now
            return False
        return now - seen[1] > LEASE_SECONDS

    def _renew(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            for lease in list(self.held):
                with (
                    lease.guard,
                    contextlib.suppress(Exception),  # the network may be down for a while
                ):
                    if lease.ended:
                        continue
                    if self._files.exists(lease.following):
                        lease.lost = True
                    else:
                        lease.beat += 1
                        self._files.pipe_file(lease.key, lease.body())
                        lease.renewed = time.monotonic()
                lease.lost = lease.lost or time.monotonic() - lease.renewed > LEASE_SECONDS

    def _release(self, lease: Lease) -> None:
        self.held.remove(lease)
        with lease.guard:
            lease.ended = True
            if not lease.lost:
                with contextlib.suppress(Exception):  # the lease expires by itself
                    self._files.pipe_file(lease.key, lease.body(free=True))


def is_refused_condition(error: OSError) -> bool:
    """Whether a conditional write found an object. s3fs says so plainly only where the answer names it, as Amazon's does."""
    answer = getattr(error.__cause__, "response", None) or {}
    refused = ("PreconditionFailed", "412", "ConditionalRequestConflict")
    return isinstance(error, FileExistsError) or answer.get("Error", {}).get("Code") in refused
