"""The cells of a table as text: numbers, marks, differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.core.sweep import Column
from harness.reporting.metrics import is_perplexity
from harness.reporting.table_data import GAP, TableData, Value

SCIENTIFIC_FROM = 1e4  # perplexities above are printed as 1.9e4


# -- rendering ---------------------------------------------------------------------------------------------------------


def number_text(number: float, column: Column) -> str:
    """A number as its column prints it."""
    if not math.isfinite(number):
        return "diverged"
    if is_perplexity(column) and abs(number) > SCIENTIFIC_FROM:
        return _scientific(number)
    return f"{number:.{column.digits}f}"


def _scientific(number: float) -> str:
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _difference_text(value: Value, column: Column) -> str:
    mark = "≠" if value.agrees is False else ""
    if value.published is None or value.difference is None or not math.isfinite(value.difference):
        return mark
    text = number_text(value.difference, column)
    if float(text) == 0:
        return text.lstrip("-") + mark
    return (text if text.startswith("-") else f"+{text}") + mark


def _ours_text(value: Value, column: Column) -> str:
    if value.number is None:
        return "" if value.gap == "absent" else GAP
    if not math.isfinite(value.number):
        return number_text(value.number, column) + ("†" if value.smoke or value.problems else "")
    tie = "≈" if value.comparison is not None and not value.comparison.differs else ""
    spread = "" if value.half_width is None else f" ± {number_text(value.half_width, column)}"
    return (
        number_text(value.number, column)
        + spread
        + tie
        + ("†" if value.smoke or value.problems else "")
    )


def text_cells(data: TableData, bold: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    """Heads and texts of every printed column; bold is put around the best."""
    heads = list(data.labels)
    for head in data.columns:
        heads += [head.title, "published", "Δ"] if head.published else [head.title]
    lines = []
    for row in data.rows:
        line = list(row.labels)
        for head, value in zip(data.columns, row.values, strict=True):
            ours = _ours_text(value, head.column)
            line.append(f"{bold[0]}{ours}{bold[1]}" if value.best else ours)
            if head.published:
                line += [
                    value.published.text if value.published is not None else "",
                    _difference_text(value, head.column),
                ]
        lines.append(line)
    return heads, lines


def sections_of(data: TableData, lines: Sequence[list[str]]) -> list[tuple[str, list[list[str]]]]:
    """(heading, lines) for each model; no heading where the table has one model only."""
    sections: dict[str, list[list[str]]] = {}
    for row, line in zip(data.rows, lines, strict=True):
        sections.setdefault(row.model, []).append(line)
    return list(sections.items()) if len(sections) > 1 else [("", list(lines))]
