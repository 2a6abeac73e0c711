"""Bit budgets as rows: what was asked and got, what was measured, and whether the mixed cell is better than a uniform one.

The floor of a budget: the uniform candidate with the least divergence within the limit is the answer, unless the mixed cell is
better on the items of an evaluation by a paired test, one-sided and corrected after Holm over the sizes of the budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.core.budget import Budget, Size
from harness.core.cell import Cell, cell_key
from harness.core.sweep import Sweep
from harness.evaluation.statistics import Comparison, holm
from harness.reporting.comparisons import compare_pair
from harness.reporting.metrics import better_is_higher, headline
from harness.storage.budgets import chosen_cell, outcome
from harness.storage.record import Record
from harness.storage.store import Store

BETTER, NOT_BETTER, WORSE = "mixed better", "mixed not better", "mixed worse"
UNIFORM, ALONE, OPEN = "uniform chosen", "nothing to compare at this size", "not chosen yet"
UNSCORED, UNTESTED = "waiting for scores", "no paired items"
HEADS = (
    "budget",
    "asked",
    "got",
    "shares",
    "KL uniform",
    "KL proposal",
    "KL final",
    "metric",
    "uniform",
    "line",
    "mixed",
    "verdict",
)
NOTE = (
    "KL: nats per token against full precision on calibration windows; final: of the assembly, in brackets that of the checkpoint "
    "where a pass rounded it anew. line: between the uniform cells next to the size."
)


@dataclass(frozen=True)
class BudgetRow:
    """One size of a budget.

    content        of its file in the store; None while nothing is chosen
    bits           stored bits per weight that the choice takes
    shares         name of a candidate -> share of the weights that have it
    uniform, mixed the cells that are compared; None where there is none
    metric         of the comparison; scores of both, and `line`: what a straight line between the uniform candidates next to `bits`
                   gives at `bits`
    p_value        one-sided for "mixed is better", after Holm over the budget's sizes
    answer         the cell that the budget hands out
    """

    name: str
    budget: Budget
    size: Size
    content: Mapping[str, Any] | None = None
    bits: float = math.nan
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    uniform: Cell | None = None
    mixed: Cell | None = None
    metric: str = ""
    uniform_score: float | None = None
    mixed_score: float | None = None
    line: float | None = None
    comparison: Comparison | None = None
    p_value: float | None = None
    verdict: str = OPEN
    answer: Cell | None = None

    def verdict_record(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {
            "verdict": self.verdict,
            "metric": self.metric,
            "p_value": self.p_value,
            "level": self.budget.accept.level,
            "answer": None if self.answer is None else cell_key(self.answer),
        }

    @property
    def text(self) -> str:
        """The verdict in words."""
        words = self.verdict
        if self.p_value is not None:
            words += f" (p = {self.p_value:.2g})"
        if self.content is not None and not self.budget.trials and self.verdict != OPEN:
            words += ", unverified"
        return words


def budget_rows(sweep: Sweep, store: Store) -> list[BudgetRow]:
    """A row for every size of every budget, in the sweep's order."""
    return [row for budget in sweep.budgets for row in _rows_of(sweep, budget, store)]


def render_budgets(rows: Sequence[BudgetRow]) -> str:
    """The rows as a Markdown table with notes below it; "" without rows."""
    if not rows:
        return ""
    lines = [texts_of(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(HEADS, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(HEADS), rule, *map(line, lines), "", NOTE]) + "\n"


def _rows_of(sweep: Sweep, budget: Budget, store: Store) -> list[BudgetRow]:
    contents = {size: outcome(store, sweep.name, budget, size) for size in budget.sizes}
    records = {cell_key(cell): store.record(cell) for cell in budget.candidates}
    metric = _metric(budget, list(records.values()))
    rows = [_row(budget, size, contents[size], records, metric, store) for size in budget.sizes]
    higher = better_is_higher(metric, budget.candidates) if metric else None
    found = {
        row.size: _one_sided(row.comparison, bool(higher))
        for row in rows
        if row.comparison is not None and higher is not None
    }
    adjusted = holm(found)
    return [_judged(row, adjusted.get(row.size), bool(higher)) for row in rows]


def _row(
    budget: Budget,
    size: Size,
    content: dict[str, Any] | None,
    records: Mapping[str, Record],
    metric: str,
    store: Store,
) -> BudgetRow:
    row = BudgetRow(budget.name_of(size), budget, size, metric=metric)
    if content is None:
        return row
    cell = chosen_cell(content, budget)
    covered = [0] * len(budget.candidates)
    for group, candidate in zip(content["groups"], content["choice"], strict=True):
        covered[candidate] += group["weights"]
    uniform = None if content["uniform"] is None else budget.candidates[content["uniform"]]
    row = dataclasses.replace(
        row,
        content=content,
        bits=content["bits"] / content["weights"],
        shares={
            name: count / content["weights"]
            for name, count in zip(_names(budget), covered, strict=True)
            if count
        },
        uniform=uniform,
        mixed=cell,
        answer=cell,
        verdict=ALONE,
    )
    ours = store.record(cell)
    mixed_score = ours.metrics().get(metric)
    row = dataclasses.replace(
        row, mixed_score=mixed_score, line=_line(content, records, metric, content["bits"])
    )
    if uniform is None:
        return row
    theirs = records[cell_key(uniform)]
    row = dataclasses.replace(row, uniform_score=theirs.metrics().get(metric))
    if len(set(content["choice"])) == 1:
        return dataclasses.replace(row, verdict=UNIFORM)
    if mixed_score is None or row.uniform_score is None:
        return dataclasses.replace(row, verdict=UNSCORED, answer=None)
    return dataclasses.replace(
        row, verdict=UNTESTED, comparison=compare_pair(ours, theirs, metric, store)
    )


def _judged(row: BudgetRow, p_value: float | None, higher: bool) -> BudgetRow:
    """The row with its verdict, and its answer by the floor."""
    verdict = row.verdict
    if p_value is not None and row.comparison is not None:
        opposite = _one_sided(row.comparison, not higher)
        level = row.budget.accept.level
        verdict = BETTER if p_value < level else WORSE if opposite < level else NOT_BETTER
    kept = verdict in (NOT_BETTER, WORSE, UNTESTED) and row.budget.floor
    return dataclasses.replace(
        row, verdict=verdict, p_value=p_value, answer=row.uniform if kept else row.answer
    )


def _one_sided(found: Comparison, higher: bool) -> float:
    """p-value for "ours is better", from the two-sided test by the sign of the difference."""
    better = found.difference > 0 if higher else found.difference < 0
    return found.p_value / 2 if better else 1 - found.p_value / 2


def _metric(budget: Budget, records: Sequence[Record]) -> str:
    """The metric of the comparison: the first of the evaluation that `accept` names, or of the first with scores."""
    names = headline(records)
    wanted = budget.accept.evaluation
    for record in records:
        metrics = record.scores.get(wanted, {}).get("metrics", {})
        own = [name for name in names if name in metrics]
        if metrics:
            return (own or list(metrics))[0]
    return "" if wanted or not names else names[0]


def _line(
    content: Mapping[str, Any], records: Mapping[str, Record], metric: str, bits: int
) -> float | None:
    """The metric on the straight line between the uniform candidates next to a size; None outside them."""
    points = sorted(
        (each["bits"], value)
        for each in content["candidates"]
        if each["cell_key"] in records
        and (value := records[each["cell_key"]].metrics().get(metric)) is not None
    )
    below = [point for point in points if point[0] <= bits]
    above = [point for point in points if point[0] >= bits]
    if not below or not above:
        return None
    (low, first), (high, second) = below[-1], above[0]
    return first if high == low else first + (second - first) * (bits - low) / (high - low)


def _names(budget: Budget) -> list[str]:
    """Short names of the candidates: their schemes, with their methods where these differ."""
    several = len({cell.method.name for cell in budget.candidates}) > 1
    return [
        f"{cell.method.name} {cell.scheme.name}" if several else cell.scheme.name
        for cell in budget.candidates
    ]


def texts_of(row: BudgetRow) -> list[str]:
    """One text under each of HEADS."""
    content = row.content or {}
    uniform = content.get("uniform")
    candidates = content.get("candidates", [])
    proposals = [each["divergence"] for each in content.get("proposals", {}).values()]
    known = [value for value in proposals if value is not None]
    final = _number(content.get("divergence"))
    if content.get("divergence_made") is not None:
        final += f" ({_number(content['divergence_made'])})"
    return [
        row.budget.name,
        row.size.label,
        "" if math.isnan(row.bits) else f"{row.bits:.3f}",
        ", ".join(f"{name} {share:.0%}" for name, share in row.shares.items()),
        _number(candidates[uniform]["divergence"]) if uniform is not None else "",
        _number(min(known)) if known else "",
        final,
        row.metric,
        _number(row.uniform_score),
        _number(row.line),
        _number(row.mixed_score),
        row.text,
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
