"""Locks: one process works, others wait; locks of dead processes are free."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.core.errors import StoreError
from harness.storage.locks import Owner
from harness.storage.store import Store


def test_one_thread_works_the_other_waits(store: Store) -> None:
    waited: list[Owner | None] = []
    order: list[str] = []

    def second() -> None:
        with store.lock("k", on_wait=waited.append):
            order.append("second")

    with store.lock("k"):
        thread = threading.Thread(target=second)
        thread.start()
        while not waited:
            time.sleep(0.005)
        with (
            pytest.raises(StoreError, match=f"process {os.getpid()}"),
            store.lock("k", timeout=0.05),
        ):
            pass
        with store.lock("another", timeout=0.05):
            order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert waited[0] is not None and waited[0].pid == os.getpid()


def test_the_lock_of_a_killed_process_is_free(store: Store) -> None:
    program = (
        "import sys, time; from harness.storage.store import Store\n"
        "with Store(sys.argv[1]).lock('k'):\n    print('held', flush=True); time.sleep(100)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(store.root)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    with pytest.raises(StoreError, match=f"process {child.pid}"), store.lock("k", timeout=0.05):
        pass
    child.kill()
    child.wait()
    with store.lock("k", timeout=120):
        pass


def test_a_lock_that_outlives_its_process_in_a_child_is_broken(store: Store) -> None:
    program = (
        "import os, sys, time; from harness.storage.store import Store\n"
        "context = Store(sys.argv[1]).lock('k'); context.__enter__()\n"
        "child = os.fork()\n"
        "if child == 0:\n    time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); os._exit(0)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(store.root)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    orphan = int(child.stdout.readline())
    child.wait()
    try:
        with store.lock("k", timeout=120):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)


def _count(root: str, turns: int) -> None:
    store = Store(root)
    path = Path(root) / "count"
    for _ in range(turns):
        with store.lock("count"):
            path.write_text(str(int(path.read_text()) + 1))


def test_many_processes_never_hold_one_lock_together(store: Store) -> None:
    store.root.mkdir()
    (store.root / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count, args=(str(store.root), 15)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (store.root / "count").read_text() == "60"


def test_an_owner_is_dead_only_when_certain() -> None:
    me = Owner.current()
    assert not me.is_dead
    assert dataclasses.replace(me, birth="1").is_dead  # the id was given to another process
    assert not dataclasses.replace(me, host="elsewhere", pid=1).is_dead
