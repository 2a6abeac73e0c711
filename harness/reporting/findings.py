"""Checks of a study's findings: does a statement hold in our results, and in the published numbers? Loads without torch.

A sweep states findings as data (`core.sweep.Finding`): the rows and the column of a table, and the claim about their numbers.
The same check runs twice, on our numbers and on the published numbers of the same tables. The second run shows that the check
states the paper's claim. A verdict is one of

    holds            in every model that the finding is checked for
    does not hold    in at least one of them, even if numbers of others are missing
    cannot tell yet  numbers are missing, and the known ones do not contradict the finding

and comes with the numbers that it is based on; † marks a number computed on a part of the data. A diverged perplexity is worse
than any number.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.core.sweep import Finding, Sweep, Term
from harness.core.text import letters_and_digits
from harness.evaluation.statistics import pearson
from harness.reporting.published import BASELINES
from harness.reporting.table_data import ColumnHead, Row, TableData, Value
from harness.reporting.tables import build
from harness.storage.record import Record
from harness.storage.store import Store

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot tell yet"
SIDES = ("ours", "published")


@dataclass(frozen=True)
class Answer:
    """The verdict on a finding for one side.

    numbers  those that the verdict is based on, as text
    missing  the names of the numbers that are not known
    """

    verdict: str
    numbers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """A finding with both answers; published is None if the tables of the finding have no published numbers."""

    finding: Finding
    ours: Answer
    published: Answer | None


@dataclass(frozen=True)
class Number:
    """One number with its name; value is None if it is missing."""

    title: str
    value: float | None
    higher_is_better: bool | None

    @property
    def text(self) -> str:
        return f"{self.title} {'—' if self.value is None else f'{self.value:.4g}'}"

    @property
    def quality(self) -> float:
        """The value with a sign such that larger is better; -inf for a number that is not finite."""
        assert self.value is not None
        if not math.isfinite(self.value):
            return -math.inf
        return self.value if self.higher_is_better is not False else -self.value


def check(sweep: Sweep, records: Iterable[Record], store: Store | None = None) -> list[Checked]:
    """Check every finding of a sweep, in its order. Builds each table that a finding names once."""
    wanted = {name for finding in sweep.findings for name in _tables_of(finding)}
    found = list(records)
    tables = {
        table.name: build(sweep, table, found, store)
        for table in sweep.tables
        if table.name in wanted
    }
    return check_tables(sweep, tables)


def check_tables(sweep: Sweep, tables: Mapping[str, TableData]) -> list[Checked]:
    """Check every finding of a sweep, in its order, against the given tables; findings about other tables are left out."""
    made = []
    for finding in sweep.findings:
        if not _tables_of(finding) <= tables.keys():
            continue
        is_published = any(
            head.published for name in _tables_of(finding) for head in tables[name].columns
        )
        theirs = answer(finding, tables, "published") if is_published else None
        made.append(Checked(finding, answer(finding, tables, "ours"), theirs))
    return made


def answer(finding: Finding, tables: Mapping[str, TableData], side: str) -> Answer:
    """The answer for one side: "ours" or "published"."""
    if finding.relate:
        return _relation(finding, tables, side)
    terms = (*finding.better, *finding.above, *finding.value, *finding.loss, *finding.excess)
    terms = tuple(
        replace(t, table=t.table or finding.table, column=t.column or finding.column) for t in terms
    )
    if any(term.model for term in terms):
        return _answer_terms(finding, terms, tables, side)
    models = dict.fromkeys(
        row.model for term in terms for row in tables[term.table].rows if _stands(row, side)
    )
    answers = [
        _answer_terms(finding, tuple(replace(t, model=model) for t in terms), tables, side)
        for model in models
    ]
    answers = [each for each in answers if each.numbers or each.missing]
    if not answers:
        return Answer(UNKNOWN, missing=("no such row",))
    verdicts = [each.verdict for each in answers]
    verdict = FAILS if FAILS in verdicts else UNKNOWN if UNKNOWN in verdicts else HOLDS
    return Answer(
        verdict,
        tuple(n for each in answers for n in each.numbers),
        tuple(m for each in answers for m in each.missing),
    )


def render(checked: Sequence[Checked]) -> str:
    """The answers as lines for a terminal."""
    out: list[str] = []
    for each in checked:
        out.append(each.finding.text)
        if each.finding.source:
            out.append(f"    {each.finding.source}")
        for side in SIDES:
            found: Answer | None = getattr(each, side)
            if found is None:
                continue
            shown = "; ".join((*found.numbers, *(f"missing: {name}" for name in found.missing[:4])))
            more = f" and {len(found.missing) - 4} more" if len(found.missing) > 4 else ""
            out.append(f"    {side:<10} {found.verdict}" + (f" ({shown}{more})" if shown else ""))
        out.append("")
    counts = {
        verdict: sum(each.ours.verdict == verdict for each in checked)
        for verdict in (HOLDS, FAILS, UNKNOWN)
    }
    out.append(
        f"{len(checked)} findings, on our results: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    )
    return "\n".join(out) + "\n"


def _tables_of(finding: Finding) -> set[str]:
    terms = (*finding.better, *finding.above, *finding.value, *finding.loss, *finding.excess)
    named = {term.table or finding.table for term in terms} if not finding.relate else set()
    return named | {reference.partition("/")[0] for reference in (*finding.relate, *finding.over)}


# -- one finding ---------------------------------------------------------------------------------------------------------


def _answer_terms(
    finding: Finding, terms: Sequence[Term], tables: Mapping[str, TableData], side: str
) -> Answer:
    """The answer for terms that name their table, column and model."""
    is_range = bool(finding.value or finding.loss)
    is_loss = bool(finding.loss or finding.excess)
    read: Callable[[TableData, Row, int], Number] = _loss(side) if is_loss else _number(side)
    numbers: list[Number] = []
    missing: list[str] = []
    for term in terms:
        data = tables[term.table]
        column = _column(data, term.column)
        rows = [row for row in data.rows if _stands(row, side) and _fits(row, data, term)]
        found = [read(data, row, column) for row in rows]
        named = _term_title(term)
        if side == "published":  # a dash in the paper is not a missing number
            found = [number for number in found if number.value is not None]
        if not found:
            missing.append(named)
        elif not is_range and len(found) > 1:
            missing.append(f"{named} is {len(found)} rows; say which")
        missing += [number.title for number in found if number.value is None]
        numbers += found if is_range or len(found) == 1 else []
    known = [number for number in numbers if number.value is not None]
    if is_range:
        fails = any(not _within(finding, number) for number in known)
    else:
        compared = _compared(finding, terms, numbers)
        fails = any(not holds for holds in compared if holds is not None)
        missing += (
            []
            if fails or len(numbers) == len(terms)
            else ["a number to compare with"] * (not missing)
        )
    verdict = FAILS if fails else UNKNOWN if missing else HOLDS
    return Answer(verdict, tuple(number.text for number in known), tuple(dict.fromkeys(missing)))


def _within(finding: Finding, number: Number) -> bool:
    assert number.value is not None
    if not math.isfinite(number.value):
        return finding.at_most is None and bool(finding.loss)  # it lost without bound
    low, high = finding.at_least, finding.at_most
    return (low is None or number.value >= low - 1e-9) and (
        high is None or number.value <= high + 1e-9
    )


def _compared(
    finding: Finding, terms: Sequence[Term], numbers: Sequence[Number]
) -> list[bool | None]:
    """Whether each number compares to the next as claimed; None if one of the two is missing."""
    if len(numbers) != len(terms):
        return []
    verdicts: list[bool | None] = []
    for first, second in itertools.pairwise(numbers):
        if first.value is None or second.value is None:
            verdicts.append(None)
        elif finding.better:
            verdicts.append(
                first.quality > second.quality
                and not first.quality - second.quality <= finding.margin
            )
        else:
            verdicts.append(first.value - second.value > finding.margin)
    return verdicts


def _number(side: str) -> Callable[[TableData, Row, int], Number]:
    def read(data: TableData, row: Row, column: int) -> Number:
        value = row.values[column]
        mark = "†" if side == "ours" and value.smoke else ""
        return Number(
            _row_title(row) + mark, _value(value, side), data.columns[column].higher_is_better
        )

    return read


def _loss(side: str) -> Callable[[TableData, Row, int], Number]:
    """A reader of how much worse a row is than the baseline of its model, in the column's unit."""

    def read(data: TableData, row: Row, column: int) -> Number:
        baselines = [
            other
            for other in data.rows
            if other.model == row.model and other.baseline and _stands(other, side)
        ]
        baseline = baselines[0] if baselines else None
        own = _value(row.values[column], side)
        reference = None if baseline is None else _value(baseline.values[column], side)
        better = data.columns[column].higher_is_better
        loss = (
            None
            if own is None or reference is None
            else (reference - own)
            if better is not False
            else (own - reference)
        )
        if loss is not None and not math.isfinite(loss):
            loss = math.inf
        return Number(f"{_row_title(row)} loses", loss, False)

    return read


def _value(value: Value, side: str) -> float | None:
    return value.number if side == "ours" else value.published_number


def _relation(finding: Finding, tables: Mapping[str, TableData], side: str) -> Answer:
    """Check the mean |r| between columns and the mean of others, over the rows that all of them have."""
    numbers: dict[str, dict[tuple[str, ...], float]] = {}
    missing: list[str] = []
    for reference in (*finding.relate, *finding.over):
        table, _, column = reference.partition("/")
        data = tables[table]
        index = _column(data, column)
        numbers[reference] = {}
        for row in data.rows:
            terms = finding.value or (Term(),)
            if (
                not _stands(row, side)
                or row.baseline
                or not any(_fits(row, data, term) for term in terms)
            ):
                continue
            number = _value(row.values[index], side)
            if number is None:
                missing.append(f"{reference} of {_row_title(row)}")
            elif math.isfinite(number):
                numbers[reference][(row.model, *map(letters_and_digits, row.labels[:2]))] = number
    shared = sorted(set.intersection(*(set(found) for found in numbers.values())))
    over = [
        math.fsum(numbers[name][row] for name in finding.over) / len(finding.over) for row in shared
    ]
    found = {
        name: pearson(list(zip(over, (numbers[name][row] for row in shared), strict=True)))
        for name in finding.relate
    }
    missing += [
        f"r of {name} (fewer than three rows, or constant)"
        for name, each in found.items()
        if each is None
    ]
    known = {name: each.r for name, each in found.items() if each is not None}
    if missing or not known:
        return Answer(UNKNOWN, missing=tuple(dict.fromkeys(missing)) or ("no rows",))
    mean = math.fsum(abs(r) for r in known.values()) / len(known)
    verdict = HOLDS if _within(finding, Number("", mean, True)) else FAILS
    weakest = sorted(known, key=lambda name: abs(known[name]))[:3]
    shown = tuple(f"{name} {known[name]:.3f}" for name in weakest)
    return Answer(
        verdict,
        (
            f"mean |r| {mean:.4f} over {len(known)} columns and {len(shared)} rows",
            "weakest",
            *shown,
        ),
    )


# -- which rows ----------------------------------------------------------------------------------------------------------


def _stands(row: Row, side: str) -> bool:
    return (
        row.cell is not None
        if side == "ours"
        else any(value.published_number is not None for value in row.values)
    )


def _column(data: TableData, name: str) -> int:
    def names(head: ColumnHead) -> tuple[str, ...]:
        return head.column.title, head.column.published, head.column.metric

    return next(index for index, head in enumerate(data.columns) if name in names(head))


def _fits(row: Row, data: TableData, term: Term) -> bool:
    labels = dict(zip(data.labels, row.labels, strict=True))
    method = "none" if row.baseline else letters_and_digits(labels.get("method", ""))
    bits, group = labels.get("bits", ""), labels.get("group", "")
    wanted = letters_and_digits(term.method)
    return (
        (
            not term.model
            or row.model == term.model
            or fnmatch.fnmatchcase(row.model.lower(), term.model.lower())
        )
        and (not wanted or method == ("none" if wanted in BASELINES else wanted))
        and (term.bits == "" or str(term.bits) in (bits, bits.split(" ")[0]))
        and (term.group == "" or (group or "row") == str(term.group))
        and (not term.variant or fnmatch.fnmatchcase(labels.get("variant", ""), term.variant))
    )


def _row_title(row: Row) -> str:
    return " ".join(label for label in (row.model, *row.labels) if label)


def _term_title(term: Term) -> str:
    group = f"group {term.group}" if term.group != "" else ""
    return (
        " ".join(
            str(part)
            for part in (term.model, term.method, term.bits, group, term.variant)
            if part != ""
        )
        or "any row"
    )
