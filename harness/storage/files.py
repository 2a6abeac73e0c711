"""Files of a store on a file system: written aside and renamed, locked by the operating system. Loads without torch.

`LocalDisk` is the plain case; `object_store.ObjectStore` has the same methods for an object store, of which every node has a
mirror. Both name files by paths below the root of the store, so that `Store` works with either.
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
    """Access to the files of a store by paths below its root. Reading raises OSError, writing StoreError.

    state_seconds   least seconds between two writes of the state of a running sweep
    parallel        number of calls that are worth making at the same time
    """

    state_seconds: float
    parallel: int

    def read(self, path: Path) -> bytes: ...

    def write(self, path: Path, fill: Callable[[Path], object], durable: bool = True) -> None:
        """Let `fill` write a neighbour of `path`, which then replaces it: readers see the complete file or none."""

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with its contents; no error where there is none."""

    def exists(self, path: Path) -> bool: ...

    def names(self, folder: Path) -> list[str]:
        """Names of files and folders in a folder, sorted, without hidden ones."""

    def walk(self, folder: Path) -> Iterator[Entry]:
        """All files below a folder, hidden ones too."""

    def local(self, path: Path) -> Path:
        """The path of the file on this machine, downloaded where necessary. Raises FileNotFoundError."""

    def upload(self, path: Path) -> None:
        """Copy a file that was written on this machine to the store, or remove it there if it was removed here."""

    def making(self, folder: Path) -> AbstractContextManager[None]:
        """Hold the folder of a checkpoint for writing; blocks that other processes finished are in it."""

    def reading(self, folder: Path) -> AbstractContextManager[None]:
        """Hold a complete checkpoint for reading; its files have the sizes and hashes of its manifest."""

    def lock(
        self, path: Path, timeout: float | None = None, on_wait: Waiting | None = None
    ) -> AbstractContextManager[None]: ...

    def free_bytes(self, root: Path) -> int | None:
        """Bytes that can still be written; None where that is unknown."""

    def prefetched(self, folders: Sequence[Path], paths: Sequence[Path]) -> StorageBackend:
        """A snapshot for many reads: the files in `folders` and `paths` are read at once where that is faster."""


class LocalDisk:
    """A folder that all processes reach by the same path."""

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

    def upload(self, path: Path) -> None:
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
            os.close(descriptor)  # frees it, as the operating system does when the process ends

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
