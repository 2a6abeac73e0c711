"""Files of a store on a file system: written aside and renamed, locked by the operating system. Loads without torch.

`Disk` is the plain case; `objects.Objects` has the same calls for an object store, where every node has a mirror of its own. Both
name files by paths below the store's root, so that the store need not know which it has.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.storage.atomic_write import write_aside
from harness.storage.locks import Waiting, try_lock, wait_until


@dataclass(frozen=True)
class Entry:
    """A file of a store: where it is, its size, and when it was last written (seconds since the epoch)."""

    path: Path
    bytes: int
    modified: float


class StorageBackend(Protocol):
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

    def lock(
        self, path: Path, timeout: float | None = None, on_wait: Waiting | None = None
    ) -> AbstractContextManager[None]: ...

    def free_bytes(self, root: Path) -> int | None:
        """Bytes that may still be written; None where nobody can know."""

    def prefetched(self, folders: Sequence[Path], paths: Sequence[Path]) -> StorageBackend:
        """The same files as they are now, for many reads: those in `folders` and `paths` at once, where that is faster."""


class LocalDisk:
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
                except FileNotFoundError:  # renamed or removed meanwhile
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
    def lock(
        self, path: Path, timeout: float | None = None, on_wait: Waiting | None = None
    ) -> Iterator[None]:
        descriptor = wait_until(lambda: try_lock(path), path, timeout, on_wait)
        try:
            yield
        finally:
            os.close(
                descriptor
            )  # frees it; so does the operating system when the process ends, however it ends

    def free_bytes(self, root: Path) -> int | None:
        return free_disk(root)

    def prefetched(self, folders: Sequence[Path], paths: Sequence[Path]) -> StorageBackend:
        return self


def free_disk(path: Path) -> int:
    """Bytes free on the disk that holds `path`, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
