"""Answers that changed: nothing between a model and itself, closed forms, and what a table and a record show of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from harness.core.cell import (
    Cell,
    Evaluation,
    Method,
    Model,
    Part,
    Scheme,
    baseline_of,
    freeze,
    score_key,
)
from harness.core.sweep import Column, Table
from harness.evaluation.flips import METRICS, of_items, with_flips
from harness.reporting import tables
from harness.storage.store import Store

ARC = Evaluation("arc", "lm_eval_tasks", freeze({"task": "arc_easy"}), data_digest="a")
QUANTIZED = Cell(
    Model("m", "m", digest="d"),
    Method("rtn", rounding=Part("rtn")),
    Scheme("w4"),
    evaluations=(ARC,),
)
BEFORE = {
    "log_likelihoods": [[0.0, -1.0], [0.0, -1.0], [-1.0, 0.0], [-1.0, 0.0]],
    "chosen": [0, 0, 1, 1],
}
AFTER = {
    "log_likelihoods": [[0.0, -1.0], [-1.0, 0.0], [0.0, -1.0], [-2.0, 0.0]],
    "chosen": [0, 1, 0, 1],
}


def fill(
    store: Store, cell: Cell, answers: Mapping[str, Any], right: list[bool], prompts: str = "p"
) -> str:
    key = store.open_cell(cell)
    items = {
        "id": [f"t/{n}" for n in range(4)],
        "prompt_hash": [f"{prompts}{n}" for n in range(4)],
        "correct": right,
        **answers,
    }
    score = {"metrics": {"arc/acc": sum(right) / 4}, "stderr": {}, "details": {}}
    store.write_score(key, score_key(cell, ARC), score, items)
    return key


def test_equal_accuracies_hide_what_flips_show(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, baseline_of(QUANTIZED), BEFORE, [True, True, False, False])
    fill(store, QUANTIZED, AFTER, [True, False, True, False])
    record = with_flips(store.record(QUANTIZED), store)
    metrics = record.metrics()
    assert metrics["arc/acc"] == store.record(baseline_of(QUANTIZED)).metrics()["arc/acc"]
    assert (metrics["arc/flips"], metrics["arc/flips_lost"], metrics["arc/flips_won"]) == (
        0.5,
        0.25,
        0.25,
    )
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))  # of two choices: a closed form
    swapped = (2 * p - 1) * 1.0
    last = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert metrics["arc/choice_kl"] == pytest.approx((2 * swapped + last) / 4)
    assert "arc/flips" not in store.record(QUANTIZED).metrics(), (
        "the store keeps what was measured alone"
    )


def test_a_model_and_itself_answer_alike(tmp_path: Path) -> None:
    items = pandas.DataFrame(
        {**BEFORE, "correct": [True] * 4} | {f"{k}_before": v for k, v in BEFORE.items()}
    )
    items["correct_before"] = True
    # a common factor says nothing
    items["log_likelihoods"] = [np.asarray(row) + 7.0 for row in items["log_likelihoods"]]
    assert of_items(items) == {metric: pytest.approx(0.0, abs=1e-12) for metric in METRICS}


def test_items_may_have_unequal_numbers_of_choices_and_impossible_ones() -> None:
    before, now = [[0.0, -1.0], [0.0, -math.inf, -1.0]], [[-1.0, 0.0], [0.0, -5.0, -1.0]]
    items = pandas.DataFrame(
        {
            "log_likelihoods": now,
            "chosen": [1, 0],
            "log_likelihoods_before": before,
            "chosen_before": [0, 0],
        }
    )
    p = 1 / (1 + math.exp(-1))
    rest = math.log(1 + math.exp(-5) / (1 + math.exp(-1)))  # an impossible choice became possible
    assert of_items(items)["choice_kl"] == pytest.approx((2 * p - 1 + rest) / 2)


@pytest.mark.parametrize("other", [{"prompts": "q"}, None])
def test_other_items_are_no_comparison(tmp_path: Path, other: dict[str, str] | None) -> None:
    store = Store(tmp_path)
    fill(store, QUANTIZED, AFTER, [True] * 4)
    if other is not None:
        fill(store, baseline_of(QUANTIZED), BEFORE, [True] * 4, **other)
    assert set(with_flips(store.record(QUANTIZED), store).metrics()) == {"arc/acc"}


def test_a_table_may_ask_for_them(tmp_path: Path, demo_sweep: Callable[..., Any]) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_facts")
    baseline, cell = sweep.cells
    (evaluation,) = cell.evaluations
    store = Store(sweep.runtime.runs)
    for each, answers in ((baseline, BEFORE), (cell, AFTER)):
        items = {"id": [0, 1, 2, 3], "prompt_hash": list("abcd"), "correct": [True] * 4, **answers}
        score = {"metrics": {"demo_facts/acc": 1.0}, "stderr": {}, "details": {}}
        store.write_score(store.open_cell(each), score_key(each, evaluation), score, items)
    table = Table("t", columns=(Column("demo_facts/flips", higher_is_better=False),))
    data = tables.build(
        dataclasses.replace(sweep, tables=(table,)),
        table,
        [store.record(c) for c in sweep.cells],
        store,
    )
    assert [row.values[0].number for row in data.rows] == [None, 0.5]


def test_likelihoods_that_are_no_numbers_give_no_number() -> None:
    """The largest of NaN is no answer: every metric of the flips is NaN, never a share."""
    items = pandas.DataFrame(
        {
            "chosen": [0, 1],
            "chosen_before": [0, 1],
            "correct": [True, False],
            "correct_before": [True, False],
            "log_likelihoods": [[np.nan, np.nan], [-1.0, -2.0]],
            "log_likelihoods_before": [[-1.0, -2.0], [-1.0, -2.0]],
        }
    )
    found = of_items(items)
    assert set(found) == {"flips", "flips_lost", "flips_won", "choice_kl"}
    assert all(np.isnan(value) for value in found.values())
    items["log_likelihoods"] = [[-1.0, -np.inf], [-1.0, -2.0]]
    assert of_items(items)["flips"] == 0 and of_items(items)["choice_kl"] == np.inf
