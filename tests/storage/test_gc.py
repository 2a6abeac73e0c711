"""Collecting garbage: only what no cell uses and nobody works on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core.cell import cell_key, quantize_key
from harness.core.errors import StoreError
from harness.storage import gc
from harness.storage.json_files import write_json
from harness.storage.store import Store


@pytest.fixture
def store(tmp_path: Path, demo_sweep: Callable[..., Any]) -> Store:
    """Two cells with checkpoints, a checkpoint of a cell that is gone, a half-written file; all from yesterday."""
    store = Store(tmp_path / "runs")
    for cell in demo_sweep("method=rtn", "scheme=w4").cells:
        store.open_cell(cell)
        write_json(store.checkpoint_folder(quantize_key(cell)) / "manifest.json", {})
    write_json(store.checkpoint_folder("f" * 64) / "manifest.json", {})
    (store.checkpoint_folder("f" * 64) / "block-0.safetensors").write_bytes(b"0" * 1000)
    (store.root / "cells" / ".score.json.0123456789ab").write_text("{")
    age(store.root)
    return store


def age(folder: Path) -> None:
    yesterday = time.time() - 86400
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (yesterday, yesterday))


def test_only_what_nobody_needs_is_found_and_goes(store: Store) -> None:
    kept = {
        path
        for path in store.root.rglob("*")
        if "ffff" not in str(path) and not path.name.startswith(".score")
    }
    found = gc.find(store)
    assert [each.path.name for each in found] == ["f" * 64, ".score.json.0123456789ab"] and found[
        0
    ].bytes > 1000
    assert store.checkpoint_folder("f" * 64).exists()  # finding deletes nothing
    assert gc.remove(store, found) == sum(each.bytes for each in found)
    assert kept <= set(store.root.rglob("*")) and not store.checkpoint_folder("f" * 64).exists()
    assert gc.find(store) == []


def test_what_is_young_or_held_stays(store: Store) -> None:
    (store.checkpoint_folder("f" * 64) / "block-1.safetensors").write_bytes(b"0")
    assert [each.path.name for each in gc.find(store)] == [".score.json.0123456789ab"]
    found = gc.find(store, young_seconds=-10)
    with store.lock(f"checkpoint-{'f' * 64}"):
        gc.remove(store, [each for each in found if each.path.is_dir()])
    assert store.checkpoint_folder("f" * 64).exists()


def test_a_cell_that_cannot_be_read_stops_the_collection(store: Store) -> None:
    path = store.cell_folder(store.cell_keys()[0]) / "cell.json"
    path.write_text("{")
    with pytest.raises(StoreError, match=r"no readable cell\.json"):
        gc.find(store)


def test_an_empty_folder_is_no_store(tmp_path: Path) -> None:
    assert gc.find(Store(tmp_path / "nothing")) == []


def test_the_checkpoint_of_every_known_cell_counts_as_used(
    store: Store, demo_sweep: Callable[..., Any]
) -> None:
    for cell in demo_sweep("method=rtn", "scheme=w4").cells:
        assert store.cell(cell_key(cell)) is not None
        assert all(
            each.path.name != quantize_key(cell) for each in gc.find(store, young_seconds=-10)
        )
