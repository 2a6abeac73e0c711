"""The notes below a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from harness.core.sweep import Sweep, Table, command_line
from harness.core.text import letters_and_digits, short_list
from harness.reporting.metrics import problems_of
from harness.reporting.published import Published
from harness.reporting.table_data import GAP, PUBLISHED_ONLY, ColumnHead, Row
from harness.storage.record import Record

FILL = "; fill with:"  # ends the note above the commands
PROBLEM_NOTES = 8  # printed below one table


def footnotes(
    sweep: Sweep,
    table: Table,
    rows: Sequence[Row],
    heads: Sequence[ColumnHead],
    by_key: Mapping[str, Record],
    published: Published | None,
    ambiguous: Sequence[str],
) -> tuple[list[str], list[str]]:
    """The notes below a table (the meaning of its marks; missing numbers and why), and the commands that fill it."""
    values = [value for row in rows for value in row.values]
    notes: list[str] = []
    if any(value.best for value in values):
        notes.append("Bold: best of its model and bit widths.")
    if any(value.comparison is not None for value in values):
        count = sum(value.comparison is not None for value in values)
        notes.append(
            f"≈ no difference from the baseline shown (paired test over the items, Holm over {count} tests, 5 %)."
        )
    if any(value.half_width is not None for value in values):
        notes.append(
            "± half of the 95 % interval of the mean over seeds (Student's t); tests draw seeds as well as items."
        )
    limits = sorted(
        {e.limit for row in rows if row.cell for e in row.cell.evaluations if e.limit is not None}
    )
    if any(value.smoke for value in values):
        listed = f" (first {', '.join(map(str, limits))} items)" if limits else ""
        notes.append(
            f"† smoke run: stands on a part of the data only{listed}; not comparable with published numbers."
        )
    notes += _problems(rows, heads, by_key)
    if published is not None and any(value.published is not None for value in values):
        notes.append(
            f"Published: {published.paper}, {published.source}. Δ is ours minus published."
        )
    if table.absent:
        notes.append(f"Published numbers alone: {table.absent}")
    elif any(value.gap == "absent" for value in values):
        notes.append("Rows with a published number alone are not in this sweep.")
    notes += [
        f"{c.title}: published numbers alone; {c.reason}."
        for c in table.columns
        if c.metric == PUBLISHED_ONLY and c.reason
    ]
    notes += _verdicts(table, rows, heads, published)
    notes += ambiguous
    for row in rows:
        for key in (row.cell_key, *row.others):
            record = by_key.get(key)
            if (
                record is not None
                and record.failures
                and any(value.gap == "failed" for value in row.values)
            ):
                reason = record.failures[-1].get("reason", "")
                notes.append(f"{record.cell.title} failed: {reason} (harness show {key[:12]}).")
    waiting = sum(any(value.gap in ("missing", "failed") for value in row.values) for row in rows)
    commands = [command_line(sweep)] if waiting else []
    if waiting:
        notes.append(f"{GAP} not there yet, in {waiting} {'row' if waiting == 1 else 'rows'}{FILL}")
    return notes, commands


def _problems(
    rows: Sequence[Row], heads: Sequence[ColumnHead], by_key: Mapping[str, Record]
) -> list[str]:
    """A note for each kind of problem that evaluators recorded with the table's scores, with the rows that have it."""
    metrics = {metric for head in heads for metric in (head.column.metric, *head.column.of)}
    found: dict[str, list[Row]] = {}
    for row in rows:
        if any(value.problems for value in row.values):
            records = [by_key[key] for key in (row.cell_key, *row.others) if key in by_key]
            for sentence in dict.fromkeys(
                sentence for record in records for sentence in problems_of(record, metrics)
            ):
                found.setdefault(sentence, []).append(row)
    notes = [f"† {sentence} In {_row_names(own)}." for sentence, own in found.items()]
    if len(notes) > PROBLEM_NOTES:
        left = len(notes) - PROBLEM_NOTES
        notes = [*notes[:PROBLEM_NOTES], f"† {left} more such notes: harness show names a cell's."]
    return notes


def _verdicts(
    table: Table, rows: Sequence[Row], heads: Sequence[ColumnHead], published: Published | None
) -> list[str]:
    """Notes that count the numbers that agree with the published ones, and that list differences of protocol.

    Each difference of protocol names the rows whose ≠ it could explain.
    """
    compared = [value.agrees for row in rows for value in row.values if value.agrees is not None]
    differing = {
        (at, i): row
        for at, row in enumerate(rows)
        for i, value in enumerate(row.values)
        if value.agrees is False
    }
    interval = (
        "over cells (Fisher's z)" if table.correlation is not None else "over items and seeds"
    )
    alike = "" if table.correlation is not None else " Perplexities above 10,000 are alike."
    notes = []
    if compared:
        notes.append(
            f"Verdict: {len(compared) - len(differing)} of {len(compared)} numbers agree with the published ones; "
            + (f"{len(differing)} (≠) differ" if differing else "none differs")
            + f" by more than the published rounding and our 95 % interval {interval}.{alike}"
        )
    unexplained = dict(differing)
    for line in table.protocol:
        could = {
            at: row
            for at, row in differing.items()
            if _explains(line, table, row, heads[at[1]], heads, rows, published)
        }
        for at in could:
            unexplained.pop(at, None)
        notes.append(
            f"Protocol{f' (could explain ≠ of {_row_names(could.values())})' if could else ''}: {line}"
        )
    if unexplained:
        notes.append(
            f"≠ of {_row_names(unexplained.values())}: no difference of protocol is noted that could explain it."
        )
    return notes


def _row_names(rows: Iterable[Row]) -> str:
    names = list(
        dict.fromkeys(" ".join(label for label in row.labels[:3] if label) for row in rows)
    )
    return short_list(names, 4)


def _explains(
    line: str,
    table: Table,
    row: Row,
    head: ColumnHead,
    heads: Sequence[ColumnHead],
    rows: Sequence[Row],
    published: Published | None,
) -> bool:
    """Whether a difference of protocol applies to a number.

    "GPTQ: …" and "C4 and PTB: …" apply to their rows and columns only, "calibration: …" to the methods that are calibrated,
    and other lines to everything.
    """
    words = (
        {letters_and_digits(word) for word in re.findall(r"[\w.()-]+", line.partition(": ")[0])}
        if ": " in line
        else set()
    )
    if "calibration" in words and row.cell is not None and not row.cell.method.uses_calibration:
        return False
    known = {
        letters_and_digits(each.method)
        for each in (published.rows if published is not None else ())
    }
    known |= {letters_and_digits(each.labels[0]) for each in rows} | set(
        map(letters_and_digits, table.methods.values())
    )
    own = {
        letters_and_digits(row.labels[0]),
        letters_and_digits(row.cell.method.name if row.cell else ""),
        letters_and_digits(table.methods.get(row.labels[0], "")),
    }
    columns = {name for each in heads for name in _column_words(each)}
    named_rows, named_columns = words & known, words & columns
    return (not named_rows or bool(named_rows & own)) and (
        not named_columns or bool(named_columns & _column_words(head))
    )


def _column_words(head: ColumnHead) -> set[str]:
    return {
        letters_and_digits(word) for word in (head.column.title, *head.column.title.split())
    } - {""}
