"""What `harness gc` finds in a store and deletes: checkpoints that no cell uses, and files that killed processes left behind.

A checkpoint is in use while a runs/cells/<key>/cell.json names it, as its own or as the one that a tuning starts from; every sweep
that ran has written those. Files of cells are never deleted. Files younger than an hour may belong to a running process, and a
checkpoint whose lock is held does: both stay.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.core.cell import quantize_key, reduction_key, untuned
from harness.core.errors import StoreError
from harness.storage.store import Store

YOUNG_SECONDS = 3600.0
# of the store, of checkpoints, of probes
ASIDE = re.compile(r"\..+\.(?:[0-9a-f]{12}|\d+\.aside)|\.probe\.[0-9a-f]{32}")


@dataclass(frozen=True)
class Leftover:
    """A folder or file to delete, its size and why it is not needed."""

    path: Path
    bytes: int
    reason: str


def find(store: Store, young_seconds: float = YOUNG_SECONDS) -> list[Leftover]:
    """All leftovers, checkpoints first. Reads only. Raises StoreError where a cell cannot be read: it may use any of them."""
    before = time.time() - young_seconds
    return [
        *_checkpoints(store, before),
        *_reduced(store, before),
        *_asides(store, before),
        *_notices(store, before),
    ]


def remove(store: Store, found: Sequence[Leftover]) -> int:
    """Delete the leftovers, except checkpoints that a process holds; returns the bytes that were freed."""
    freed = 0
    for each in found:
        if each.path.parent.name == "checkpoints":
            try:
                with store.lock(f"checkpoint-{each.path.name}", timeout=0):
                    # The manifest is deleted first: an incomplete folder must not count as a checkpoint.
                    store.files.remove(each.path / "manifest.json")
                    store.files.remove(each.path)
            except StoreError:
                continue
        else:
            store.files.remove(each.path)
        freed += each.bytes
    return freed


def _sizes(store: Store, folder: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes, and the time of the last change, of each folder in a folder of the store, by its name."""
    sizes: dict[str, int] = {}
    newest: dict[str, float] = {}
    for entry in store.files.walk(folder):
        key = entry.path.relative_to(folder).parts[0]
        sizes[key] = sizes.get(key, 0) + entry.bytes
        newest[key] = max(newest.get(key, 0.0), entry.modified)
    return sizes, newest


def _checkpoints(store: Store, before: float) -> Iterator[Leftover]:
    folder = store.root / "checkpoints"
    sizes, newest = _sizes(store, folder)
    if not sizes:
        return
    used = set()
    now = store.snapshot()
    for key in now.cell_keys():
        cell = now.cell(key)
        if cell is None:
            raise StoreError(
                f"{store.where(store.cell_folder(key))} has no readable cell.json, so the checkpoints that it uses are not known. "
                "Run its sweep again, or delete the folder; then rerun harness gc"
            )
        used |= {quantize_key(cell), quantize_key(untuned(cell))}
    for key in sorted(sizes.keys() - used):
        if newest[key] < before:
            yield Leftover(folder / key, sizes[key], "no cell uses this checkpoint")


def _reduced(store: Store, before: float) -> Iterator[Leftover]:
    """Reduced models that no cell uses; one that is deleted too early is made again when it is needed."""
    folder = store.root / "reduced"
    sizes, newest = _sizes(store, folder)
    if not sizes:
        return
    now = store.snapshot()
    cells = [cell for key in now.cell_keys() if (cell := now.cell(key)) is not None]
    used = {reduction_key(cell) for cell in cells if cell.method.reduction is not None}
    for key in sorted(sizes.keys() - used):
        if newest[key] < before:
            yield Leftover(folder / key, sizes[key], "no cell uses this reduced model")


def _asides(store: Store, before: float) -> Iterator[Leftover]:
    for entry in sorted(store.files.walk(store.root), key=lambda entry: entry.path):
        if ASIDE.fullmatch(entry.path.name) and entry.modified < before:
            yield Leftover(
                entry.path, entry.bytes, "incomplete, written by a process that was ended"
            )


def _notices(store: Store, before: float) -> Iterator[Leftover]:
    """Old files of drivers, cancellations and priorities; a running driver rewrites its file every few seconds."""
    reasons = {
        "cancelled": "a cancellation that was read, or that concerns no run",
        "priorities": "a priority that was read, or that concerns no run",
        "drivers": "the file of a driver that was ended",
    }
    for folder, reason in reasons.items():
        for entry in sorted(store.files.walk(store.root / folder), key=lambda entry: entry.path):
            if entry.modified < before and not entry.path.name.startswith("."):
                yield Leftover(entry.path, entry.bytes, reason)
