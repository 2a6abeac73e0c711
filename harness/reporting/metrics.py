"""Metrics: which come first, and which direction is better."""

from __future__ import annotations

from collections.abc import Iterable

from harness.core import plugins
from harness.core.cell import Cell
from harness.core.sweep import Column, Sweep
from harness.reporting.table_data import PUBLISHED_ONLY
from harness.storage.record import Record

LOWER_IS_BETTER = (
    "perplexity",
    "bits_per_weight",
    "bits_per_weight_total",
    "bytes",
    "seconds",
    "peak_memory_bytes",
)


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
        dict.fromkeys(m for m in shown if not m.startswith(("checkpoint/", "quantize/")))
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
