"""Files of a store on a file system: written aside and renamed, locked by the operating system. Loads without torch.

`Disk` is the plain case; `objects.Objects` has the same calls for an object store, where every node has a mirror of its own. Both
name files by paths below the store's root, so that the store need not know which it has.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from harness.errors import StoreError


@dataclass(frozen=True)
class Entry:
    """A file of a store: where it is, its size, and when it was last written (seconds since the epoch)."""

    path: Path
    bytes: int
    modified: float


@dataclass(frozen=True)
class Owner:
    """Who holds a lock or runs a sweep.

    started  start of the process, seconds since the epoch, for people
    birth    tells the process from a later one that was given the same id; unlike `started` it does not move with the clock
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
        """Whether it is a process of this host, of which this process can know whether it lives."""
        return self.host == _host()

    @property
    def is_dead(self) -> bool:
        """Certainly dead; a process of another host is never certainly dead."""
        if not self.is_here:
            return False
        birth = _birth(self.pid)
        return birth is None or bool(self.birth and birth and birth != self.birth)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host.partition('/')[0]}, running since {since}"


T = TypeVar("T")
Waiting = Callable[[Owner | None], None]


class Files(Protocol):
    """Where the files of a store are. Paths lie below its root. Reading raises OSError, writing StoreError.

    state_seconds   how often the state of a running sweep may be written
    parallel        calls that are worth making at once
    """

    state_seconds: float
    parallel: int

    def read(self, path: Path) -> bytes: ...

    def write(self, path: Path, fill: Callable[[Path], object], durable: bool = True) -> None:
        """Let `fill` write a neighbour of `path`, which then takes its place: readers see the whole file or none."""

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all that is in it; what is not there is no error."""

    def exists(self, path: Path) -> bool: ...

    def names(self, folder: Path) -> list[str]:
        """Files and folders in it, sorted, without those whose names start with a dot."""

    def walk(self, folder: Path) -> Iterator[Entry]:
        """Every file below it, hidden ones too."""

    def local(self, path: Path) -> Path:
        """The file as one of this machine. Raises FileNotFoundError."""

    def keep(self, path: Path) -> None:
        """A file of this machine was written or removed: the store follows."""

    def making(self, folder: Path) -> AbstractContextManager[None]:
        """Hold a folder of checkpoints in which this process writes; what others finished of it is there."""

    def reading(self, folder: Path) -> AbstractContextManager[None]:
        """Hold a complete checkpoint for reading; its files are there, with the sizes and hashes of its manifest."""

    def lock(self, path: Path, timeout: float | None = None, on_wait: Waiting | None = None) -> AbstractContextManager[None]: ...

    def free_bytes(self, root: Path) -> int | None:
        """Bytes that may still be written; None where nobody can know."""

    def prefetched(self, folders: Sequence[Path], paths: Sequence[Path]) -> Files:
        """The same files as they are now, for many reads: those in `folders` and `paths` at once, where that is faster."""


class Disk:
    """A folder that every process reaches by the same path."""

    state_seconds = 1.0
    parallel = 1

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def write(self, path: Path, fill: Callable[[Path], object], durable: bool = True) -> None:
        write_aside(path, fill, durable)

    def remove(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def exists(self, path: Path) -> bool:
        return path.exists()

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, folder: Path) -> Iterator[Entry]:
        for place, _, names in os.walk(folder):
            for name in sorted(names):
                path = Path(place, name)
                try:
                    status = path.stat()
                except FileNotFoundError:       # renamed or removed meanwhile
                    continue
                yield Entry(path, status.st_size, status.st_mtime)

    def local(self, path: Path) -> Path:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return path

    def keep(self, path: Path) -> None:
        pass

    @contextmanager
    def making(self, folder: Path) -> Iterator[None]:
        yield

    @contextmanager
    def reading(self, folder: Path) -> Iterator[None]:
        yield

    @contextmanager
    def lock(self, path: Path, timeout: float | None = None, on_wait: Waiting | None = None) -> Iterator[None]:
        descriptor = wait_until(lambda: _try_lock(path), path, timeout, on_wait)
        try:
            yield
        finally:
            os.close(descriptor)                # frees it; so does the operating system when the process ends, however it ends

    def free_bytes(self, root: Path) -> int | None:
        return free_disk(root)

    def prefetched(self, folders: Sequence[Path], paths: Sequence[Path]) -> Files:
        return self


def wait_until(
    attempt: Callable[[], tuple[T | None, Owner | None]], path: Path | str, timeout: float | None, on_wait: Waiting | None
) -> T:
    """Try until the lock is taken. attempt: (what is held, None) or (None, who holds it). Raises StoreError after `timeout`."""
    began, pause, told = time.monotonic(), 0.01, False
    while True:
        held, owner = attempt()
        if held is not None:
            return held
        if on_wait is not None and not told:
            on_wait(owner)
            told = True
        if timeout is not None and time.monotonic() - began >= timeout:
            holder = str(owner) if owner else "another process"
            raise StoreError(f"{path} is held by {holder}; waited {timeout:g} s. Wait for it to end, or end it")
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)           # 10 ms growing to 1 s


def bytes_of(text: str, where: str) -> int:
    """The bytes of "200GB", "1.5TB", "500 MB" or a plain number; units are decimal. Raises StoreError for anything else.

    >>> bytes_of("1.5GB", "store.quota")
    1500000000
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", str(text).lower())
    if found is None:
        raise StoreError(f'{where}: "{text}" is no size; write for example 500MB, 200GB or 1.5TB')
    return int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}[found[2]])


def free_disk(path: Path) -> int:
    """Bytes free on the disk that holds `path`, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_aside(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Let `write` fill a neighbour of `path`, flush it to the disk, rename it. A reader sees the whole file or none.

    durable False leaves out the flush. Raises StoreError when the disk refuses; leaves no neighbour behind then.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            if durable:
                _flush(aside)
            os.replace(aside, path)
            if durable:
                _flush(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(_explain(path, error)) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(path: Path, error: OSError) -> str:
    ways_out = {
        errno.EACCES: "no permission; make it writable, or keep the results elsewhere with runs=FOLDER",
        errno.EPERM: "no permission; make it writable, or keep the results elsewhere with runs=FOLDER",
        errno.EROFS: "the file system is read-only; keep the results elsewhere with runs=FOLDER",
        errno.ENOSPC: "the disk is full; free some space and run the same command again, nothing finished is lost",
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, nothing finished is lost",
        errno.ENOTDIR: "a file stands where a folder should be",
    }
    return f"cannot write {path}: {ways_out.get(error.errno or 0, error.strerror or str(error))}"


def _try_lock(path: Path) -> tuple[int | None, Owner | None]:
    """(descriptor, None) when taken, (None, holder) when not. A guard makes taking, naming the owner and breaking one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        guard = os.open(path.with_suffix(".guard"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(_explain(path, error)) from error
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read_owner(descriptor)
            os.close(descriptor)
            if owner is not None and owner.is_dead:
                path.unlink(missing_ok=True)    # held through a child that outlived it; the next try makes a new file
            return None, owner
        owner = Owner.current()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(dataclasses.asdict(owner)).encode(), 0)
        return descriptor, None
    except OSError as error:
        raise StoreError(f"cannot lock {path}: {error.strerror}; the file system of runs/ must support file locks") from error
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
    """What tells a process from others of the same id: clock ticks from boot to its start; None when it does not run."""
    import psutil

    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return ""                               # alive; nothing more may be known
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
