"""A table in the format that was asked for: Markdown, CSV, a pandas frame; LaTeX and HTML have files of their own."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.errors import ConfigError, unknown_name
from harness.reporting.html import to_html
from harness.reporting.latex import to_latex
from harness.reporting.table_data import TableData
from harness.reporting.text_grid import sections_of, text_cells

if TYPE_CHECKING:
    import pandas


FORMATS = {"md": ".md", "latex": ".tex", "csv": ".csv", "html": ".html"}


def render(data: TableData, format: str = "md", links: Mapping[str, str] | None = None) -> str:
    """The table as text: md, latex, csv (full precision) or html. Ends with a newline.

    links: cell_key -> an address; HTML then links every number to the cell that made it, Markdown every row's name.
    """
    if format not in FORMATS:
        raise ConfigError(unknown_name("table format", format, FORMATS))
    if format == "latex":
        return to_latex(data)
    return (
        _csv(data)
        if format == "csv"
        else (_markdown if format == "md" else to_html)(data, links or {})
    )


def _markdown(data: TableData, links: Mapping[str, str]) -> str:
    heads, lines = text_cells(data, ("**", "**"))
    for row, line in zip(data.rows, lines, strict=True):
        if row.cell_key in links:
            line[0] = f"[{line[0]}]({links[row.cell_key]})"
    heads = [head.replace("|", r"\|") for head in heads]
    lines = [[text.replace("|", r"\|") for text in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in [heads, *lines])) for i in range(len(heads))]
    left = len(data.labels)

    def print_line(texts: Sequence[str]) -> str:
        padded = [
            text.ljust(w) if i < left else text.rjust(w)
            for i, (text, w) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = (
        "|"
        + "|".join(
            f" {'-' * w} " if i < left else f" {'-' * (w - 1)}: " for i, w in enumerate(widths)
        )
        + "|"
    )
    out = [f"**{data.caption or data.name}**", ""]
    for section, section_lines in sections_of(data, lines):
        out += [f"{section}:", ""] if section else []
        out += [print_line(heads), rule, *(print_line(line) for line in section_lines), ""]
    out += [line for note in data.notes for line in (note, "")]
    out += [f"    {command}" for command in data.commands]
    return "\n".join(out).rstrip() + "\n"


def _flat(data: TableData) -> list[dict[str, Any]]:
    """One dictionary per row, numbers at full precision and scaled as printed."""
    flat = []
    for row in data.rows:
        line: dict[str, Any] = {"model": row.model}
        line |= dict(zip(data.labels, row.labels, strict=True))
        line["cell_key"] = row.cell_key
        for head, value in zip(data.columns, row.values, strict=True):
            name = head.column.title or head.column.metric
            line[name] = value.number
            line[f"{name} stderr"] = value.stderr
            line[f"{name} ±"] = value.half_width
            if head.published:
                line[f"{name} published"] = value.published_number
                line[f"{name} difference"] = value.difference
                line[f"{name} verdict"] = (
                    None if value.agrees is None else "agrees" if value.agrees else "differs"
                )
            line[f"{name} p"] = value.comparison.adjusted if value.comparison else None
            line[f"{name} smoke"] = value.smoke or None
        flat.append(line)
    filled = {name for line in flat for name, value in line.items() if value is not None}
    optional = (" stderr", " ±", " p", " smoke")
    return [
        {n: v for n, v in line.items() if n in filled or not n.endswith(optional)} for line in flat
    ]


def _csv(data: TableData) -> str:
    flat = _flat(data)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]) if flat else list(data.labels), lineterminator="\n")
    writer.writeheader()
    for line in flat:
        writer.writerow(
            {
                n: "" if v is None else repr(v) if isinstance(v, float) else v
                for n, v in line.items()
            }
        )
    return out.getvalue()


def frame(data: TableData) -> pandas.DataFrame:
    """The table for a notebook: numbers at full precision, p-values after Holm; captions and notes in `.attrs`."""
    import pandas

    table = pandas.DataFrame(_flat(data))
    table.attrs.update(caption=data.caption, notes=list(data.notes), commands=list(data.commands))
    return table
