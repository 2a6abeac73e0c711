"""The store: nothing half-written is ever read, leftovers block nobody, one worker per key."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from stored import make_cell

from harness.core.cell import Cell, Evaluation, cell_key, freeze, quantize_key, score_key
from harness.core.errors import StoreError
from harness.storage.json_files import write_json
from harness.storage.store import Store

PERPLEXITY = Evaluation("wikitext2", "perplexity", freeze({"length": 2048}), data_digest="w")


ARC = Evaluation("arc_easy", "lm_eval_tasks", freeze({"task": "arc_easy"}), data_digest="a")


def fill(store: Store, cell: Cell) -> str:
    key = store.open_cell(cell)
    manifest = {"bits_per_weight": 4.5, "stored_bytes": 10, "seconds": 2}
    write_json(store.checkpoint_folder(quantize_key(cell)) / "manifest.json", manifest)
    perplexity = {"metrics": {"wikitext2/perplexity": 6.25}}
    store.write_score(
        key, score_key(cell, PERPLEXITY), perplexity, {"id": [0, 1], "nll": [1.5, math.inf]}
    )
    accuracy = {"metrics": {"arc_easy/acc": 0.5}, "stderr": {"arc_easy/acc": 0.1}, "details": {}}
    store.write_score(key, score_key(cell, ARC), accuracy)
    return key


def test_a_record_returns_what_was_written(store: Store) -> None:
    cell = make_cell()
    key = fill(store, cell)
    store.write_provenance(key, {"device": "cpu"})
    store.write_provenance(key, {"batch_size": 4})
    record = store.record(cell)
    assert record.complete and not record.problems and not record.missing
    assert record.metrics() == {
        "checkpoint/bits_per_weight": 4.5,
        "checkpoint/bytes": 10.0,
        "quantize/seconds": 2.0,
        "wikitext2/perplexity": 6.25,
        "arc_easy/acc": 0.5,
        "arc_easy/acc_stderr": 0.1,
    }
    assert record.provenance == {"device": "cpu", "batch_size": 4}
    items = store.items(key, score_key(cell, PERPLEXITY))
    assert items is not None and items["nll"].tolist() == [1.5, math.inf]
    assert store.items(key, score_key(cell, ARC)) is None
    assert [r.cell for r in store.records()] == [cell]


def test_a_cell_keeps_the_evaluations_of_every_sweep(store: Store) -> None:
    store.open_cell(make_cell(evaluations=(PERPLEXITY,)))
    key = store.open_cell(make_cell(evaluations=(ARC,)))
    known = store.cell(key)
    assert known is not None and known.evaluations == (PERPLEXITY, ARC)
    assert store.record(make_cell(evaluations=(ARC,))).missing == ("arc_easy",)


def test_one_score_serves_evaluations_of_two_names(store: Store) -> None:
    cell = make_cell(evaluations=(PERPLEXITY, dataclasses.replace(PERPLEXITY, name="mine")))
    key = store.open_cell(cell)
    numbers = {
        "metrics": {"wikitext2/perplexity": 6.25, "part/acc": 0.5},
        "stderr": {"wikitext2/perplexity": 0.1},
    }
    store.write_score(key, score_key(cell, PERPLEXITY), {"evaluation": "wikitext2", **numbers})
    assert store.record(cell).metrics() == {
        "wikitext2/perplexity": 6.25,
        "wikitext2/perplexity_stderr": 0.1,
        "mine/perplexity": 6.25,
        "mine/perplexity_stderr": 0.1,
        "part/acc": 0.5,
    }


def test_a_truncated_score_counts_as_missing_and_is_named(store: Store) -> None:
    cell = make_cell()
    key = fill(store, cell)
    path = store.score_path(key, score_key(cell, ARC))
    whole = path.read_bytes()
    for cut in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:cut])
        record = store.record(cell)
        assert record.missing == ("arc_easy",) and str(path) in record.problems[0]
    path.write_bytes(b'{"details": {}}')
    assert "no metrics" in store.record(cell).problems[0]
    path.write_bytes(whole)
    assert store.record(cell).complete


def test_damaged_items_count_as_missing(store: Store) -> None:
    cell = make_cell()
    key = fill(store, cell)
    path = store.items_path(key, score_key(cell, PERPLEXITY))
    path.write_bytes(path.read_bytes()[:-20])
    assert store.items(key, score_key(cell, PERPLEXITY)) is None
    path.unlink()
    assert "paired tests" in store.record(cell).problems[0]


def test_items_need_equal_columns(store: Store) -> None:
    with pytest.raises(StoreError, match="equal lengths"):
        store.write_score("c", "s", {"metrics": {}}, {"id": [1, 2], "x": [1]})
    with pytest.raises(StoreError, match="no metrics"):
        store.write_score("c", "s", {})
    with pytest.raises(StoreError, match="one type"):
        store.write_score("c", "s", {"metrics": {}}, {"id": [1, "two"]})


def test_failures_come_in_order_and_go_by_stage(store: Store) -> None:
    store.write_failure(
        "c", {"stage": "quantize", "kind": "error", "reason": "singular", "time": 2.0}
    )
    store.write_failure(
        "c", {"stage": "evaluate wikitext2", "kind": "killed", "reason": "memory", "time": 1.0}
    )
    assert [f["reason"] for f in store.failures("c")] == ["memory", "singular"]
    store.clear_failures("c", "quantize")
    assert [f["reason"] for f in store.failures("c")] == ["memory"]
    store.clear_failures("c")
    assert store.failures("c") == []


def test_find_names_the_candidates(store: Store) -> None:
    with pytest.raises(StoreError, match="no cells yet"):
        store.find("ab")
    keys = [store.open_cell(make_cell(name)) for name in ("gptq", "awq")]
    assert store.find(keys[0][:10]) == keys[0]
    with pytest.raises(StoreError, match=r"2 cells(.|\n)*demo · awq · w4g32"):
        store.find("")
    with pytest.raises(StoreError, match=r"no cell(.|\n)*demo · gptq · w4g32"):
        store.find("zz")


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EACCES, "no permission"), (errno.EROFS, "read-only"), (errno.ENOSPC, "disk is full")],
)
def test_check_writable_says_why(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    store.check_writable()
    assert list(store.root.iterdir()) == []
    with pytest.raises(StoreError, match="GB free"):
        store.check_writable(needed_bytes=10**18)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StoreError, match=words):
        store.check_writable()


def test_a_file_in_the_place_of_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(StoreError, match=r"runs"):
        Store(tmp_path / "runs").check_writable()


def test_keys_are_folders(store: Store) -> None:
    cell = make_cell()
    assert store.cell_folder(store.open_cell(cell)) == store.root / "cells" / cell_key(cell)


def test_loads_without_torch() -> None:
    program = (
        "import sys, harness.store, harness.tracking, harness.tables, harness.plots, harness.statistics\n"
        "heavy = {'torch', 'mlflow', 'ray', 'hydra', 'transformers', 'matplotlib', 'pandas', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("what", ["evaluations", "provenance"])
def test_two_drivers_lose_nothing_of_one_record(
    store: Store, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One driver is held between its read and its write until the other has written, or waits for it."""
    key = store.open_cell(make_cell(evaluations=()))
    second_done, first_read = threading.Event(), threading.Event()
    first = threading.Thread(target=lambda: write(store, PERPLEXITY))
    read = Store._read

    def held(self: Store, *arguments: object, **options: object) -> object:
        content = read(self, *arguments, **options)  # type: ignore[arg-type]
        if threading.current_thread() is first:
            first_read.set()
            second_done.wait(0.3)  # in vain where the other waits for the lock, as it should
        return content

    def write(at: Store, evaluation: Evaluation) -> None:
        if what == "evaluations":
            at.open_cell(make_cell(evaluations=(evaluation,)))
        else:
            at.write_provenance(key, {evaluation.name: "done"})

    monkeypatch.setattr(Store, "_read", held)
    first.start()
    assert first_read.wait(60)
    write(Store(store.root), ARC)
    second_done.set()
    first.join()
    record = store.record(make_cell())
    cell = store.cell(key)
    assert cell is not None
    names = (
        {evaluation.name for evaluation in cell.evaluations}
        if what == "evaluations"
        else set(record.provenance)
    )
    assert names >= {"wikitext2", "arc_easy"}
