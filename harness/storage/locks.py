"""File locks that know their owner."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from harness.core.errors import StoreError
from harness.storage.atomic_write import explain_os_error


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock or runs a sweep.

    started  start of the process, seconds since the epoch, for messages
    birth    distinguishes the process from a later one with the same id; unlike `started` it does not depend on the clock
    """

    host: str
    pid: int
    started: float
    birth: str = ""

    @classmethod
    def current(cls) -> Owner:
        import psutil

        return cls(_host(), os.getpid(), psutil.Process().create_time(), _birth(os.getpid()) or "")

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this host, so that this process can know whether it lives."""
        return self.host == _host()

    @property
    def is_dead(self) -> bool:
        """Whether it is certainly dead; a process of another host never counts as dead."""
        if not self.is_here:
            return False
        birth = _birth(self.pid)
        return birth is None or bool(self.birth and birth and birth != self.birth)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host.partition('/')[0]}, running since {since}"


T = TypeVar("T")
Waiting = Callable[[Owner | None], None]


def wait_until(
    attempt: Callable[[], tuple[T | None, Owner | None]],
    path: Path | str,
    timeout: float | None,
    on_wait: Waiting | None,
) -> T:
    """Try until the lock is taken. attempt: returns (the lock, None) or (None, its holder). Raises StoreError after `timeout`."""
    began, pause, reported = time.monotonic(), 0.01, False
    while True:
        held, owner = attempt()
        if held is not None:
            return held
        if on_wait is not None and not reported:
            on_wait(owner)
            reported = True
        if timeout is not None and time.monotonic() - began >= timeout:
            holder = str(owner) if owner else "another process"
            raise StoreError(
                f"{path} is held by {holder}; waited {timeout:g} s. Wait for it to end, or end it"
            )
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)  # 10 ms growing to 1 s


def try_lock(path: Path) -> tuple[int | None, Owner | None]:
    """(descriptor, None) when taken, (None, holder) when not. A guard file makes taking, writing the owner and breaking atomic."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        guard = os.open(path.with_suffix(".guard"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(explain_os_error(path, error)) from error
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read_owner(descriptor)
            os.close(descriptor)
            if owner is not None and owner.is_dead:
                # A child that outlived its parent holds it; the next try makes a new file.
                path.unlink(missing_ok=True)
            return None, owner
        owner = Owner.current()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(dataclasses.asdict(owner)).encode(), 0)
        return descriptor, None
    except OSError as error:
        raise StoreError(
            f"cannot lock {path}: {error.strerror}; the file system of runs/ must support file locks"
        ) from error
    finally:
        os.close(guard)


def _read_owner(descriptor: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


@functools.cache
def _host() -> str:
    """Host name and process namespace: containers may share a host name but count processes each from 1."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"


def _birth(pid: int) -> str | None:
    """Distinguishes processes of the same id: clock ticks from boot to its start; None when it does not run."""
    import psutil

    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return ""  # alive, and its start cannot be read
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
