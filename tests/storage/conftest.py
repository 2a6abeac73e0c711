"""Stores for the tests of this folder."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """node("b") makes this process a node with a disk of its own."""

    def be(name: str) -> None:
        folder = tmp_path / "nodes" / name
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("HARNESS_CACHE", str(folder))

    be("a")
    return be


@pytest.fixture
def url() -> str:
    return f"memory://bucket-{uuid.uuid4().hex}/runs"
