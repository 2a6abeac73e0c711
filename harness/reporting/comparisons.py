"""Paired comparisons of two cells, over the items that both scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.core.cell import Cell, Evaluation, baseline_of, cell_key
from harness.evaluation.statistics import Comparison, compare, compare_seeds, holm
from harness.storage.record import Record
from harness.storage.store import Store

ITEM_COLUMNS = {
    "perplexity": ("loss",)
}  # metric -> columns of its items; others are named like the metric
# column of items -> the column that says how much each counts
ITEM_WEIGHTS = {
    "loss": "tokens",
    "kl": "tokens",
    "top1_agreement": "tokens",
    "delta_nll": "targets",
}


def compare_cells(
    rows: Sequence[Sequence[Cell]],
    by_key: Mapping[str, Record],
    metrics: Sequence[str],
    store: Store,
) -> dict[tuple[str, str], Comparison]:
    """(key of a row's first cell, metric) -> paired test against the cells' baseline, Holm over all.

    rows: cells that differ in their seeds alone stand together and are tested as one. Left out: what has no items, or other items
    or weights than its baseline.
    """
    raw: dict[tuple[str, str], Comparison] = {}
    columns: dict[tuple[str, str], Items | None] = {}

    def column(key: str, metric: str) -> Items | None:
        if (key, metric) not in columns:
            columns[key, metric] = _items(by_key[key], metric, store) if key in by_key else None
        return columns[key, metric]

    for row in rows:
        keys, reference = [cell_key(cell) for cell in row], cell_key(baseline_of(row[0]))
        if reference in keys:
            continue
        for metric in metrics:
            theirs = column(reference, metric)
            ours = [each for key in keys if (each := column(key, metric)) is not None]
            if (
                theirs is None
                or len(ours) < len(keys)
                or any(set(each.values) != set(theirs.values) for each in ours)
            ):
                continue
            if any(each.weights != theirs.weights for each in ours):
                continue
            names = list(theirs.values)
            weights = None if theirs.weights is None else [theirs.weights[name] for name in names]
            found = compare_seeds(
                [[each.values[name] for name in names] for each in ours],
                list(theirs.values.values()),
                weights,
            )
            if found is not None:
                raw[keys[0], metric] = found
    adjusted = holm({name: comparison.p_value for name, comparison in raw.items()})
    return {name: replace(comparison, adjusted=adjusted[name]) for name, comparison in raw.items()}


def compare_pair(ours: Record, theirs: Record, metric: str, store: Store) -> Comparison | None:
    """The paired test of two cells on one metric, not corrected; None where they were not scored on the same items."""
    mine, other = _items(ours, metric, store), _items(theirs, metric, store)
    if mine is None or other is None or set(mine.values) != set(other.values):
        return None
    if mine.weights != other.weights:
        return None
    names = list(other.values)
    return compare(
        [mine.values[name] for name in names],
        [other.values[name] for name in names],
        None if other.weights is None else [other.weights[name] for name in names],
    )


@dataclass(frozen=True)
class Items:
    """Item results of one metric by id, and what each item counts; weights None: all the same."""

    values: dict[Any, float]
    weights: dict[Any, float] | None = None


def _items(record: Record, metric: str, store: Store) -> Items | None:
    """Item results of one metric by id; None where the evaluation kept none of it."""
    evaluation = _evaluation_of(record, metric)
    items = None if evaluation is None else store.evaluation_items(record, evaluation)
    if items is None or evaluation is None or "id" not in items or items["id"].duplicated().any():
        return None
    if metric.startswith(f"{evaluation.name}/"):
        own = metric.removeprefix(f"{evaluation.name}/")
    else:  # one task of a group of tasks
        task, _, own = metric.partition("/")
        if "task" not in items or task not in set(items["task"]):
            return None
        items = items[items["task"] == task]
    for name in (own, *ITEM_COLUMNS.get(own, ())):
        if name in items:
            found = {
                column: dict(zip(items["id"], map(float, items[column]), strict=True))
                for column in (name, ITEM_WEIGHTS.get(name, ""))
                if column in items
            }
            return Items(found[name], found.get(ITEM_WEIGHTS.get(name, "")))
    return None


def _evaluation_of(record: Record, metric: str) -> Evaluation | None:
    names = [name for name, score in record.scores.items() if metric in score["metrics"]]
    return next((e for e in reversed(record.cell.evaluations) if e.name in names), None)
