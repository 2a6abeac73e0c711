"""Metrics: which direction is better, and problems that evaluators recorded."""

from __future__ import annotations

from synthetic_sweep import LLAMA, cells

from harness.reporting.metrics import (
    better_is_higher,
    layer_error_name,
    number_of,
    problem_metrics,
    problems_of,
)
from harness.storage.record import Record


def test_direction_comes_from_the_evaluator() -> None:
    assert better_is_higher("wikitext2/perplexity", cells(LLAMA)) is False
    assert better_is_higher("arc_easy/acc", cells(LLAMA)) is True
    assert better_is_higher("strange/number") is None


def test_problems_of_scores_are_sentences() -> None:
    baseline = cells(LLAMA)[0]
    problems = {"unscored": 2, "sentences": ["3 answers name a choice that does not exist."]}
    scores = {
        "wikitext2": {"metrics": {"wikitext2/perplexity": 7.0}, "problems": {"unscored": 0}},
        "arc_easy": {"metrics": {"arc_easy/acc": 0.5}, "items": 400, "problems": problems},
    }
    record = Record(baseline, "q", "c", scores=scores)
    found = problems_of(record)
    assert len(found) == 2 and "2 of 400" in found[0] and "3 answers" in found[1]
    assert all(sentence.startswith("arc_easy: ") for sentence in found)
    assert problems_of(record, ["wikitext2/perplexity"]) == []
    assert problem_metrics(record) == {"arc_easy/acc"}


def test_bits_of_models_that_share_a_base_are_computed() -> None:
    metrics = {"delta/base_bits_per_weight": 16.0, "checkpoint/bits_per_weight": 1.5}
    assert number_of(metrics, "delta/bits_with_base(1)") == 17.5
    assert number_of(metrics, "delta/bits_with_base(8)") == 3.5
    assert number_of(metrics, "delta/bits_with_base(0)") is None
    assert number_of({"checkpoint/bits_per_weight": 4.0}, "delta/bits_with_base(8)") is None
    assert number_of(metrics, "checkpoint/bits_per_weight") == 1.5


def test_layers_are_compared_by_the_errors_of_their_outputs() -> None:
    rows = [{"block": 0, "linear": "q_proj", "weight_error": 0.1, "output_error": None}]
    cell = cells(LLAMA)[1]
    assert layer_error_name(Record(cell, "q", "c", {"layer_errors": rows})) == "weight_error"
    rows.append({"block": 1, "linear": "q_proj", "weight_error": 0.1, "output_error": 0.01})
    assert layer_error_name(Record(cell, "q", "c", {"layer_errors": rows})) == "output_error"
    assert layer_error_name(Record(cell, "q", "c")) is None
