"""Leases: one process works, others wait; a holder that does not renew its lease loses it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from harness.core.errors import StoreError
from harness.storage import leases, object_store
from harness.storage.store import Store


def test_leases(url: str, node: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One works, the other waits; a holder that shows no sign of life is followed, and finds out before it writes."""
    monkeypatch.setattr(leases, "BEAT_SECONDS", 1e6)
    first, second = Store(url), Store(url)
    waited: list[Any] = []
    order: list[str] = []

    def wait() -> None:
        with second.lock("k", on_wait=waited.append):
            order.append("second")

    with first.lock("k"):
        with pytest.raises(StoreError, match=f"process {os.getpid()}"), second.lock("k", timeout=0):
            pass
        thread = threading.Thread(target=wait)
        thread.start()
        while not waited:
            time.sleep(0.01)
        with second.lock("another", timeout=0):
            order.append("first")
    thread.join()
    assert order == ["first", "second"] and waited[0].pid == os.getpid()

    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.0)
    third = Store(url)
    with first.lock("k"):
        with third.lock("k"):
            (lease,) = first.files.leases.held  # type: ignore[attr-defined]
            assert first.files._fs.exists(lease.following)  # type: ignore[attr-defined]
            lease.lost = True  # as its next beat says
            with pytest.raises(StoreError, match="another took over"):
                first.write_provenance("c", {})
        with third.lock("k", timeout=0):  # free again, and the late one broke nothing
            pass


class ClientError(Exception):
    """As botocore's, which has what the server answered."""

    response: dict[str, dict[str, str]]


@pytest.mark.parametrize(
    "code", ["PreconditionFailed", "ConditionalRequestConflict", "AccessDenied"]
)
def test_object_stores_refuse_conditions_in_several_words(
    code: str, url: str, node: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What s3fs raises where the answer names no condition, as Swift's: an OSError whose cause has the code."""

    answer = ClientError(code)
    answer.response = {"Error": {"Code": code}}
    held = Store(url).files
    assert isinstance(held, object_store.ObjectStore)

    def write(key: str, body: bytes, mode: str = "overwrite") -> None:
        raise OSError(22, "refused") from answer

    monkeypatch.setattr(held._fs, "pipe_file", write)
    if code == "AccessDenied":
        with pytest.raises(OSError, match="refused"):
            held.leases.create("bucket/once", b"1")
    else:
        assert not held.leases.create("bucket/once", b"1")


def test_a_lease_lives_as_long_as_its_holder(
    url: str, node: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.01)
    store = Store(url)
    with store.lock("k"):
        (lease,) = store.files.leases.held  # type: ignore[attr-defined]
        while lease.beat < 3:
            time.sleep(0.01)
        state = json.loads(store.files._fs.cat_file(lease.key))  # type: ignore[attr-defined]
        assert state["beat"] >= 2 and not state["free"]


def test_the_lease_of_a_dead_process_of_this_host_is_free(
    url: str, node: Callable[[str], None]
) -> None:
    store = Store(url)
    with store.lock("k"):
        (lease,) = store.files.leases.held  # type: ignore[attr-defined]
        state = json.loads(lease.body())
        state["owner"]["birth"] = "1"  # its id was given to another process since
        store.files._fs.pipe_file(lease.key, json.dumps(state).encode())  # type: ignore[attr-defined]
        with Store(url).lock("k", timeout=0):
            pass
