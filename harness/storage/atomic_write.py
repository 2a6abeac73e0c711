"""Files that are written completely or not at all."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

from harness.core.errors import StoreError


def write_aside(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Let `write` fill a neighbour of `path`, flush it to the disk, rename it. A reader sees the complete file or none.

    durable False leaves out the flush. Raises StoreError when the disk refuses; then leaves no neighbour behind.
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
        raise StoreError(explain_os_error(path, error)) from error


def share(path: Path) -> None:
    """Give a file, or every file below a folder, the permissions of a new file under the process's umask.

    Some libraries write their files for the owner alone, so that a group with whom a folder is shared cannot read them.
    """
    folder = path if path.is_dir() else path.parent
    sample = folder / f".{uuid.uuid4().hex}"
    sample.touch(0o666)
    mode = stat.S_IMODE(sample.stat().st_mode)
    sample.unlink()
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain_os_error(path: Path, error: OSError) -> str:
    """The error of the disk in words, with a remedy."""
    ways_out = {
        errno.EACCES: "no permission; make it writable, or keep the results elsewhere with runs=FOLDER",
        errno.EPERM: "no permission; make it writable, or keep the results elsewhere with runs=FOLDER",
        errno.EROFS: "the file system is read-only; keep the results elsewhere with runs=FOLDER",
        errno.ENOSPC: "the disk is full; free some space and run the same command again, nothing finished is lost",
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, nothing finished is lost",
        errno.ENOTDIR: "a file stands where a folder should be",
    }
    return f"cannot write {path}: {ways_out.get(error.errno or 0, error.strerror or str(error))}"
