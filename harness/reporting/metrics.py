"""Metrics: which come first, which direction is better, and what is known to be wrong with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from harness.core import plugins
from harness.core.cell import Cell
from harness.core.sweep import Column, Sweep
from harness.reporting.table_data import PUBLISHED_ONLY
from harness.storage.record import Record

LOWER_IS_BETTER = (
    "perplexity",
    "bits_per_weight",
    "bits_per_weight_total",
    "bits_per_original_weight",
    "bytes",
    "seconds",
    "peak_memory_bytes",
)


BITS_WITH_BASE = re.compile(r"delta/bits_with_base\(([1-9]\d*)\)")
LAYER_ERRORS = ("output_error", "weight_error")  # of a matrix; the first that a cell has is shown


def number_of(metrics: Mapping[str, float], name: str) -> float | None:
    """A metric of a cell; None where it has none.

    "delta/bits_with_base(k)" is computed: bits per weight of each of k models that share one base, (bits of the base) / k + bits of
    the difference.
    """
    shared = BITS_WITH_BASE.fullmatch(name)
    if shared is None:
        return metrics.get(name)
    base = metrics.get("delta/base_bits_per_weight")
    own = metrics.get("checkpoint/bits_per_weight")
    return None if base is None or own is None else base / int(shared[1]) + own


def layer_error_name(record: Record) -> str | None:
    """The error that a cell's layers are compared by; None where no layer has one."""
    rows = record.layer_errors
    return next(
        (
            name
            for name in LAYER_ERRORS
            if any(
                isinstance(value := row.get(name), int | float)
                and math.isfinite(value)
                and value > 0
                for row in rows
            )
        ),
        None,
    )


def problems_of(record: Record, metrics: Iterable[str] | None = None) -> list[str]:
    """Sentences about items without a score and warnings of evaluators; of the scores that have these metrics (None: any)."""
    wanted = None if metrics is None else set(metrics)
    found: list[str] = []
    for name, score in record.scores.items():
        problems = _problems(score)
        if problems and (wanted is None or wanted & set(score["metrics"])):
            count = problems.get("unscored", 0)
            items = score.get("items") or score.get("details", {}).get("items")
            known = f" of {items}" if items else ""
            noun = "item has" if count == 1 else "items have"
            found += [f"{name}: {count}{known} {noun} no score."] if count else []
            found += [f"{name}: {sentence}" for sentence in problems.get("sentences", ())]
    return found


def problem_metrics(record: Record) -> frozenset[str]:
    """Names of the metrics whose evaluation left items without a score, or warned."""
    return frozenset(
        name for score in record.scores.values() if _problems(score) for name in score["metrics"]
    )


def _problems(score: Mapping[str, Any]) -> Mapping[str, Any]:
    problems = score.get("problems") or {}
    return problems if problems.get("unscored") or problems.get("sentences") else {}


def headline(records: Iterable[Record]) -> list[str]:
    """The first metric of each evaluation that any record has a score of: perplexity, acc, …; in order of appearance."""
    found: dict[str, None] = {}
    for record in records:
        for name in record.scores:
            metrics = record.scores[name]["metrics"]
            if metrics:
                preferred = [
                    m
                    for m in metrics
                    if m.rsplit("/", 1)[-1] in ("perplexity", "acc", "exact_match")
                ]
                found.setdefault((preferred or list(metrics))[0])
    return list(found)


def quality_metrics(sweep: Sweep, records: Iterable[Record]) -> list[str]:
    """What a sweep is about: the scores its tables show, or the headline of every evaluation where it has no tables."""
    shown = [
        c.metric
        for table in sweep.tables
        for c in table.columns
        if c.metric not in ("mean", PUBLISHED_ONLY)
    ]
    return list(
        dict.fromkeys(m for m in shown if not m.startswith(("checkpoint/", "quantize/", "delta/")))
    ) or headline(records)


def better_is_higher(metric: str, cells: Iterable[Cell] = ()) -> bool | None:
    """Whether larger is better, as the evaluator of the metric says in its literals; None where nobody says."""
    short = metric.rpartition("/")[2]
    for cell in cells:
        for evaluation in cell.evaluations:
            own = metric.removeprefix(f"{evaluation.name}/")
            if own != metric:
                found = plugins.find("evaluator").get(evaluation.evaluator)
                short = own.partition("/")[0]  # "exact_match/strict-match" is an exact_match
                says = (
                    (found.get("metrics", {}) if found else {})
                    .get(short, {})
                    .get("higher_is_better")
                )
                if says is not None:
                    return bool(says)
    if short in LOWER_IS_BETTER:
        return False
    return True if short in ("acc", "acc_norm", "exact_match") else None


def is_perplexity(column: Column) -> bool:
    """Whether a column shows perplexities."""
    return any(name.endswith("perplexity") for name in (column.metric, *column.of))
