"""Answers that take long to find, kept between processes in `cache_folder()/answers/`.

An answer is kept under the digest of its question, and the question holds everything that the answer depends on: values, and
for files a stamp of their names, sizes and times of change. A stamp costs a look at the folder; nothing is read. The code is
part of every question, so that a new version, an edited source file or another installed package asks again. A lost, damaged or
unwritable cache costs time alone. Answers are JSON; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.cell import digest
from harness.core.package import PACKAGE
from harness.data.digests import cache_folder, write_cache

# Two writes within the resolution of a file system's clock leave one time: what changed just now is not kept.
SETTLED_SECONDS = 2.0
MOST_FILES = 20_000  # in the folders of one question; with more, looking costs what asking costs
MOST_ANSWERS = 400  # files; then the older half is deleted


@dataclass(frozen=True)
class Stamp:
    """What identifies the state of files: a digest, and when the newest of them changed (seconds since the epoch)."""

    text: str
    newest: float

    @property
    def is_settled(self) -> bool:
        """Whether another change of these files would be seen in the stamp."""
        return time.time() - self.newest > SETTLED_SECONDS


UNKNOWN = Stamp("", float("inf"))  # of folders with too many files: never settled


def stamp_of(paths: Iterable[Path]) -> Stamp:
    """The stamp of files and of all files below folders, hidden and compiled ones left out; an absent path counts as such."""
    found: list[list[Any]] = []
    newest = 0.0
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            found.append([str(path), None])
            continue
        if not path.is_dir():
            found.append([str(path), status.st_size, status.st_mtime_ns])
            newest = max(newest, status.st_mtime)
            continue
        found.append([str(path), "folder"])
        for name, size, nanoseconds in _files_below(str(path), ""):
            if len(found) > MOST_FILES:
                return UNKNOWN
            found.append([name, size, nanoseconds])
            newest = max(newest, nanoseconds / 1e9)
    return Stamp(digest(found), newest)


def _files_below(folder: str, prefix: str) -> Iterable[tuple[str, int, int]]:
    """(name below the folder, size, time of change) of every file, in the order of the names."""
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        try:
            if entry.is_dir():
                yield from _files_below(entry.path, f"{prefix}{entry.name}/")
            else:
                status = entry.stat()
                yield f"{prefix}{entry.name}", status.st_size, status.st_mtime_ns
        except OSError:  # it vanished, or is a broken link
            yield f"{prefix}{entry.name}", -1, 0


@functools.cache
def code_stamp() -> Stamp:
    """The stamp of the harness's own files, of a person's plugins, and of what is installed beside them."""
    named = os.environ.get("HARNESS_PLUGINS", "")
    own = [Path(entry) for entry in named.split(os.pathsep) if entry]
    code = stamp_of([PACKAGE, *own])
    installed = [
        [place, os.stat(place).st_mtime_ns]
        for place in sys.path
        if place.endswith("-packages") and os.path.isdir(place)
    ]
    return Stamp(digest([code.text, installed, sys.version]), code.newest)


def find(kind: str, question: Any) -> Any:
    """The kept answer to a question, or None. kind: a word for the file's name; question: a JSON value."""
    try:
        return json.loads(_path(kind, question).read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(kind: str, question: Any, answer: Any) -> None:
    """Keep the answer to a question, both JSON values. The caller has seen that the stamps of the question are settled."""
    write_cache(_path(kind, question), {"answer": answer})
    _prune()


def answered(kind: str, question: Any, stamps: Iterable[Stamp], ask: Callable[[], Any]) -> Any:
    """The kept answer to a question, else ask(), which is kept unless a stamp that went into the question is not settled."""
    found = find(kind, question)
    if found is None:
        found = ask()
        if all(stamp.is_settled for stamp in (code_stamp(), *stamps)):
            keep(kind, question, found)
    return found


@dataclass
class Book:
    """Many short answers about one thing, in one file: `ask` them, then `save`.

    about  a JSON value that holds what all answers depend on besides their own questions
    stamp  of the files behind it; where it is not settled, answers are found and not kept
    """

    about: Any
    stamp: Stamp
    _answers: dict[str, Any] | None = field(default=None, repr=False)
    _is_new: bool = False

    def ask(self, question: Any, find_out: Callable[[], Any], keeps: Callable[[Any], bool]) -> Any:
        """The answer to a question (a JSON value), from the book or from find_out(). keeps: whether an answer may be kept."""
        if self._answers is None:
            self._answers = find("checks", self._identity()) or {}
        name = digest(question)
        if name not in self._answers:
            answer = find_out()
            if not keeps(answer):
                return answer
            self._answers[name], self._is_new = answer, True
        return self._answers[name]

    def save(self) -> None:
        """Write what is new in the book."""
        if self._is_new and self.stamp.is_settled and code_stamp().is_settled:
            keep("checks", self._identity(), self._answers)
            self._is_new = False

    def _identity(self) -> Any:
        return [code_stamp().text, self.stamp.text, self.about]


def _path(kind: str, question: Any) -> Path:
    return cache_folder() / "answers" / f"{kind}-{digest(question)[:32]}.json"


def _prune() -> None:
    """Delete the older half of the answers where there are too many."""
    with contextlib.suppress(OSError):
        files = [(entry.stat().st_mtime, entry.path) for entry in os.scandir(_path("", 0).parent)]
        if len(files) > MOST_ANSWERS:
            for _, path in sorted(files)[: len(files) // 2]:
                os.unlink(path)
