"""A store in an object store: nodes that share no disk, hashes on reading, leases. fsspec's memory file system stands for a bucket;
a real S3 server on the loopback interface where s3fs and moto are installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.cli.status import status
from harness.config.grid import load_sweep
from harness.core.cell import cell_key, quantize_key, score_key
from harness.core.errors import StoreError
from harness.core.events import Progress, Quantized
from harness.core.sweep import Sweep
from harness.execution import driver
from harness.execution.tasks import QuantizeTask
from harness.execution.worker import run
from harness.planning.planner import make
from harness.planning.render import render, require
from harness.storage import files, gc, object_store
from harness.storage.store import Store

SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")


def sweep_at(url: str, *overrides: str) -> Sweep:
    calibration = ("calibration=demo", "calibration.samples=4", "calibration.length=64")
    where = (f"runs={url}", "tracking=none", "device=cpu", "cluster=local", "cluster.workers=1")
    return load_sweep(
        None,
        ["model=demo", "method=gptq", "scheme=w4,w3", *calibration, *where, *SMALL, *overrides],
    )


def on_disk(sweep: Sweep, folder: Path) -> Sweep:
    return dataclasses.replace(sweep, runtime=dataclasses.replace(sweep.runtime, runs=folder))


def test_a_sweep_over_nodes_that_share_no_disk(
    url: str, node: Callable[[str], None], tmp_path: Path
) -> None:
    """Quantized on one node, evaluated on another, read on a third: the table and the checkpoints are those of a folder."""
    sweep = sweep_at(url)
    for cell in sweep.cells:
        events = list(run(QuantizeTask((cell,), url, "cpu")))
        assert any(isinstance(event, Quantized) for event in events)
    node("b")
    summary = driver.run(sweep)
    assert summary.exit_code == 0, summary
    plain = on_disk(sweep, tmp_path / "runs")
    assert driver.run(plain).exit_code == 0
    node("c")
    store, folder = Store(url), Store(plain.runtime.runs)
    assert not any(path.is_file() for path in store.root.rglob("*"))  # nothing came by disk
    for cell in sweep.cells:
        here, there = store.record(cell), folder.record(cell)
        assert here.complete and not here.problems
        quality = {
            name: value
            for name, value in there.metrics().items()
            if not name.startswith("quantize/")
        }
        assert quality == {
            name: value
            for name, value in here.metrics().items()
            if not name.startswith("quantize/")
        }
        items = store.items(cell_key(cell), score_key(cell, cell.evaluations[0]))
        assert items is not None and items.equals(
            folder.items(cell_key(cell), score_key(cell, cell.evaluations[0]))
        )
        with store.reading(quantize_key(cell)) as place:
            blocks = {path.name: path.read_bytes() for path in place.glob("*.safetensors")}
        same = {
            path.name: path.read_bytes()
            for path in folder.checkpoint_folder(quantize_key(cell)).glob("*.safetensors")
        }
        assert blocks == same and same
        assert b"scored" in store.files.read(store.log_path(cell_key(cell)))
        assert b"quantized" in store.files.read(
            store.log_path(cell_key(cell))
        )  # of another node, kept
    again = make(sweep, store)
    assert not again.missing and "nothing to do" in render(again) and url in render(again)
    assert "3 of 3 cells done" in status(store.snapshot(sweep.cells), sweep.name, sweep.cells)
    assert [r.cell_key for r in store.snapshot().records()] == sorted(map(cell_key, sweep.cells))
    assert store.used_bytes() > 100_000 and gc.find(store, young_seconds=-1) == []


def test_a_pass_goes_on_where_another_node_was_lost(
    url: str, node: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_at(url, "scheme=w4", "baseline=false")
    events = run(QuantizeTask(sweep.cells, url, "cpu"))
    next(event for event in events if isinstance(event, Progress) and event.step == 2)
    events.close()  # type: ignore[attr-defined]
    node("b")
    kept: list[str] = []
    upload = object_store.ObjectStore.upload
    monkeypatch.setattr(
        object_store.ObjectStore,
        "upload",
        lambda self, path: (kept.append(path.name), upload(self, path)),
    )
    assert any(isinstance(event, Quantized) for event in run(QuantizeTask(sweep.cells, url, "cpu")))
    blocks = [name for name in kept if name.endswith(".safetensors")]
    assert blocks == [
        "block-00002.safetensors",
        "block-00003.safetensors",
    ]  # those of the first node came up with it


def test_hashes_are_checked_on_reading(url: str, node: Callable[[str], None]) -> None:
    sweep = sweep_at(url, "scheme=w4", "baseline=false")
    list(run(QuantizeTask(sweep.cells, url, "cpu")))
    store, key = Store(url), quantize_key(sweep.cells[0])
    path = store.checkpoint_folder(key) / "block-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    store.files.upload(path)  # damaged where it is stored
    node("b")
    other = Store(url)
    with (
        pytest.raises(StoreError, match=r"block-00001\.safetensors: is damaged.*SHA-256"),
        other.reading(key),
    ):
        pass
    path.write_bytes(whole)
    store.files.upload(path)
    with other.reading(key) as place:
        (place / path.name).write_bytes(b"short")  # damaged in the mirror alone
    with other.reading(key) as place:
        assert (place / path.name).read_bytes() == whole
    report = path.with_suffix(".json")
    report.write_bytes(report.read_bytes().replace(b'"', b"'", 1))  # as long as before
    store.files.upload(report)
    node("c")
    with (
        pytest.raises(StoreError, match=r"block-00001\.json: is damaged.*SHA-256"),
        Store(url).reading(key),
    ):
        pass


def test_the_mirror_is_bounded(
    url: str, node: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_at(url, "baseline=false")
    list(run(QuantizeTask(sweep.cells, url, "cpu")))
    node("b")
    store, keys = Store(url), [quantize_key(cell) for cell in sweep.cells]
    with store.reading(keys[0]) as place:
        one = sum(entry.bytes for entry in files.LocalDisk().walk(place))
    monkeypatch.setenv("HARNESS_CACHE_LIMIT", str(int(one * 1.5)))
    with store.reading(keys[1]):
        assert not store.checkpoint_folder(keys[0]).exists()
        with store.reading(keys[0]):  # what is held stays, whatever the limit
            assert store.checkpoint_folder(keys[1]).exists()


def test_what_no_cell_uses_goes(url: str, node: Callable[[str], None]) -> None:
    sweep = sweep_at(url, "scheme=w4", "baseline=false")
    list(run(QuantizeTask(sweep.cells, url, "cpu")))
    store = Store(url)
    store.files.write(
        store.checkpoint_folder("f" * 64) / "manifest.json", lambda path: path.write_text("{}")
    )
    found = gc.find(store, young_seconds=-1)
    assert [each.path.name for each in found] == ["f" * 64] and store.where(
        found[0].path
    ).startswith(url)
    assert gc.remove(store, found) == found[0].bytes and store.manifest("f" * 64) is None
    assert store.manifest(quantize_key(sweep.cells[0])) is not None


def test_a_quota_is_in_the_plan_and_stops_a_run(url: str, node: Callable[[str], None]) -> None:
    plan = make(sweep_at(url, "store.quota=1GB"), Store(url))
    assert "left of the quota of 1.0 GB" in render(plan)
    require(plan)
    (problem,) = make(sweep_at(url, "store.quota=10kB"), Store(url)).problems
    assert "quota of 10 kB" in problem and "harness gc --dry-run" in problem


S3 = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server of its own on the loopback interface, with a bucket."""
    if not all(importlib.util.find_spec(name) for name in ("s3fs", "moto", "flask")):
        pytest.skip("s3fs and moto[server] are not installed")
    server = subprocess.Popen(
        [sys.executable, "-c", S3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None and server.stdin is not None
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{int(server.stdout.readline())}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("harness-test")
    yield "s3://harness-test/some/prefix"
    server.stdin.close()
    server.wait()


@pytest.mark.slow
def test_worker_processes_on_s3(bucket: str, node: Callable[[str], None], tmp_path: Path) -> None:
    """Two worker processes, conditional writes, the same table as on a disk, and no credential in any object."""
    sweep = sweep_at(bucket, "cluster.workers=2")
    summary = driver.run(sweep)
    assert summary.exit_code == 0, summary.text
    plain = on_disk(sweep, tmp_path / "runs")
    driver.run(plain)
    node("b")
    store = Store(bucket)
    places = (store, Store(plain.runtime.runs))
    made = [
        [place.record(cell).scores["demo_perplexity"]["metrics"] for cell in sweep.cells]
        for place in places
    ]
    assert made[0] == made[1]
    held = store.files
    assert isinstance(held, object_store.ObjectStore)
    assert held.leases.create("harness-test/once", b"1") and not held.leases.create(
        "harness-test/once", b"2"
    )
    assert not any(b"planted-secret" in held.read(entry.path) for entry in held.walk(store.root))
    shutil.rmtree(store.root, ignore_errors=True)
    assert "3 of 3 cells done" in status(store.snapshot(sweep.cells), sweep.name, sweep.cells)
