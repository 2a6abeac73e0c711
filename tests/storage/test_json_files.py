"""Infinities and NaN in JSON."""

from __future__ import annotations

import json
import math

import pytest
from stored import make_cell

from harness.core.cell import Evaluation, freeze, score_key
from harness.storage.store import Store

PERPLEXITY = Evaluation("wikitext2", "perplexity", freeze({"length": 2048}), data_digest="w")


ARC = Evaluation("arc_easy", "lm_eval_tasks", freeze({"task": "arc_easy"}), data_digest="a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_infinities_survive_in_valid_json(store: Store, value: float) -> None:
    cell = make_cell()
    key = store.open_cell(cell)
    store.write_score(key, score_key(cell, ARC), {"metrics": {"arc_easy/acc": value}})
    json.loads(store.score_path(key, score_key(cell, ARC)).read_text(), parse_constant=pytest.fail)
    read = store.record(cell).metrics()["arc_easy/acc"]
    assert read == value or (math.isnan(read) and math.isnan(value))
