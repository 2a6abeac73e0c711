"""What `harness gc` finds in a store and may delete: checkpoints that no cell uses, and what killed processes left behind.

A checkpoint is in use while some runs/cells/<key>/cell.json names it, as its own or as the one that a tuning starts from; every
sweep that ran has written those. Nothing of a cell itself is ever deleted. What is younger than an hour may belong to a process
that is at work right now, and a checkpoint whose lock is held certainly does: both stay.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.cell import quantize_key, untuned
from harness.errors import StoreError
from harness.store import Store

YOUNG_SECONDS = 3600.0
ASIDE = re.compile(r"\..+\.(?:[0-9a-f]{12}|\d+\.aside)|\.probe\.[0-9a-f]{32}")     # of the store, of checkpoints, of probes


@dataclass(frozen=True)
class Leftover:
    """Something to delete: a folder or a file, its size and why nobody needs it."""

    path: Path
    bytes: int
    reason: str


def find(store: Store, young_seconds: float = YOUNG_SECONDS) -> list[Leftover]:
    """Everything that may go, checkpoints first. Reads only. Raises StoreError where a cell cannot be read: it may use any."""
    before = time.time() - young_seconds
    return [*_checkpoints(store, before), *_asides(store, before), *_cancelled(store, before)]


def remove(store: Store, found: Sequence[Leftover]) -> int:
    """Delete what was found, but for checkpoints that somebody holds; returns the bytes that are free now."""
    freed = 0
    for each in found:
        if each.path.is_dir():
            try:
                with store.lock(f"checkpoint-{each.path.name}", timeout=0):
                    # The manifest goes first: a folder that is half deleted must not count as a checkpoint.
                    (each.path / "manifest.json").unlink(missing_ok=True)
                    shutil.rmtree(each.path)
            except StoreError:
                continue
        else:
            each.path.unlink(missing_ok=True)
        freed += each.bytes
    return freed


def _checkpoints(store: Store, before: float) -> Iterator[Leftover]:
    folder = store.root / "checkpoints"
    if not folder.is_dir():
        return
    used = set()
    for key in store.cell_keys():
        cell = store.cell(key)
        if cell is None:
            raise StoreError(
                f"{store.cell_folder(key)} has no readable cell.json, so the checkpoints that it uses are not known. Run its sweep "
                "again, or delete the folder; then collect"
            )
        used |= {quantize_key(cell), quantize_key(untuned(cell))}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in used and _newest(path) < before:
            yield Leftover(path, _bytes(path), "no cell uses this checkpoint")


def _asides(store: Store, before: float) -> Iterator[Leftover]:
    if not store.root.is_dir():
        return
    for path in sorted(store.root.rglob(".*")):
        if ASIDE.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < before:
            yield Leftover(path, path.stat().st_size, "half-written by a process that was ended")


def _cancelled(store: Store, before: float) -> Iterator[Leftover]:
    for name in sorted(store.cancelled_names()):
        path = store.root / "cancelled" / name
        if path.stat().st_mtime < before:
            yield Leftover(path, path.stat().st_size, "a cancellation that has been heard or concerns nobody")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _newest(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
