"""What a run needs besides its cells, asked before it starts."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from harness.core.sweep import Cluster, Runtime, Tracking
from harness.planning import resources, surroundings
from harness.planning.plan import Pass
from harness.storage.store import Store, StoreError

RUNTIME = Runtime("runs", cluster=Cluster("local"), tracking=Tracking("none"))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = replace(RUNTIME, device="cuda:2")
    monkeypatch.setattr(resources, "count_gpus", lambda: 0)
    (problem,) = surroundings.problems(cuda)
    assert "device=cuda:2" in problem and "device=cpu" in problem
    monkeypatch.setattr(resources, "count_gpus", lambda: 2)
    (problem,) = surroundings.problems(cuda)
    assert "cuda:0 to cuda:1" in problem
    monkeypatch.setattr(resources, "count_gpus", lambda: 3)
    assert not list(surroundings.problems(cuda))
    assert not list(surroundings.problems(RUNTIME))


def test_addresses_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    there = replace(RUNTIME, cluster=Cluster("ray", address=f"127.0.0.1:{port}"))
    (problem,) = surroundings.problems(there)
    assert f"cluster.address=127.0.0.1:{port}" in problem and "cluster=local" in problem
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        open_port = listening.getsockname()[1]
        there = replace(RUNTIME, cluster=Cluster("ray", address=f"ray://127.0.0.1:{open_port}"))
        assert not list(surroundings.problems(there))
    silent = replace(RUNTIME, tracking=Tracking("server", f"http://me:word@127.0.0.1:{port}"))
    assert not list(surroundings.problems(silent))  # results stay, and are published later
    (note,) = surroundings.notes(silent, ())
    assert "harness publish" in note and "word" not in note
    (problem,) = surroundings.problems(replace(RUNTIME, tracking=Tracking("server", "host:5000")))
    assert "http://HOST:PORT" in problem
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (note,) = surroundings.notes(RUNTIME, ())
    assert "RAY_ADDRESS=10.0.0.1:6379 is set and not used" in note
    assert not list(surroundings.notes(there, ()))


def test_memory_that_is_not_free_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from stored import make_cell

    large = Pass((make_cell(),), "", 1.0, 10**9, 0)
    monkeypatch.setattr(resources, "available_memory", lambda: 10**8)
    (note,) = surroundings.notes(replace(RUNTIME, device="cpu"), [large])
    assert "1.0 GB" in note and "100.0 MB" in note
    monkeypatch.setattr(resources, "available_memory", lambda: 10**10)
    assert not list(surroundings.notes(replace(RUNTIME, device="cpu"), [large]))


def test_a_wrong_place_is_refused_and_a_new_one_is_not_made(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="is a file"):
        Store(file / "runs").check_place()
    Store(tmp_path / "new" / "runs").check_place()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
