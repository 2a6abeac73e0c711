"""Comparisons of cells: the items that they share, weighted as their metric weights them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from synthetic_sweep import LLAMA, TABLE, cells, make_sweep
from table_sweeps import PERPLEXITY, records, row_of, seeded

from harness.core.cell import Evaluation, cell_key, score_key
from harness.core.sweep import Sweep
from harness.reporting.comparisons import compare_cells
from harness.reporting.render import render
from harness.reporting.table_data import TableData
from harness.reporting.tables import build
from harness.storage.store import Store


def test_ties_are_marked_and_real_differences_are_not(made: tuple[Sweep, Store, TableData]) -> None:
    _, _, data = made
    for bits, tie in (("8", True), ("3", False)):
        assert ("≈" in row_of(data, "gptq", bits)[4]) is tie
        assert ("≈" in row_of(data, "gptq", bits)[7]) is tie
    assert "Holm over" in render(data)


def test_without_items_nothing_is_claimed(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, _ = made
    assert "≈" not in render(build(sweep, TABLE, records(sweep, store)))


def test_tasks_of_a_group_are_tested_on_their_own_items(tmp_path: Path) -> None:
    group = Evaluation("two_tasks", "lm_eval_tasks")
    baseline = dataclasses.replace(cells(LLAMA)[0], evaluations=(group,))
    cell = dataclasses.replace(cells(LLAMA, ("gptq",), (4,))[1], evaluations=(group,))
    sweep = dataclasses.replace(make_sweep(tmp_path), cells=(baseline, cell))
    store = Store(sweep.runtime.runs)
    for each, first in ((baseline, 1.0), (cell, 0.0)):
        task = ["first"] * 40 + ["second"] * 40
        items = {
            "id": [f"{t}/{i}" for i, t in enumerate(task)],
            "task": task,
            "acc": [first] * 40 + [1.0] * 40,
        }
        metrics = {
            "two_tasks/acc": first / 2 + 0.5,
            "first/acc": first,
            "second/acc": 1.0,
            "other/acc": 1.0,
        }
        store.write_score(
            store.open_cell(each), score_key(each, group), {"metrics": metrics}, items
        )
    known = {record.cell_key: record for record in records(sweep, store)}
    names = ["two_tasks/acc", "first/acc", "second/acc", "other/acc"]
    found = compare_cells([(each,) for each in sweep.cells], known, names, store)
    key = cell_key(cell)
    assert {metric: comparison.items for (_, metric), comparison in found.items()} == {
        "two_tasks/acc": 80,
        "first/acc": 40,
        "second/acc": 40,
    }
    assert (
        found[key, "first/acc"].differs
        and found[key, "two_tasks/acc"].differs
        and not found[key, "second/acc"].differs
    )


def test_windows_of_unequal_length_count_by_their_tokens(tmp_path: Path) -> None:
    sweep, store = seeded(tmp_path, {0: 0.05}, seeds=(0,))
    known = {record.cell_key: record for record in records(sweep, store)}
    found = compare_cells([sweep.cells[1:]], known, [PERPLEXITY.metric], store)[
        cell_key(sweep.cells[1]), PERPLEXITY.metric
    ]
    ours, theirs = (
        known[cell_key(cell)].metrics()[PERPLEXITY.metric]
        for cell in (sweep.cells[1], sweep.cells[0])
    )
    # the difference that the table shows
    assert found.difference == pytest.approx(math.log(ours / theirs))
