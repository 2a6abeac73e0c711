"""The report of a sweep: one self-contained page with its tables, figures, findings, and how each number was made.

It loads nothing over the network. Its tables sort by a click on a head and filter by method, bits and text; a number under the
pointer, the focus or a finger shows its interval and its cell; every row has an address of its own. Loads without torch.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from harness.core.cell import Cell, baseline_of, cell_key, to_json
from harness.core.sweep import Column, Sweep, command_line
from harness.core.text import settings_text
from harness.reporting import budgets, findings
from harness.reporting.gallery import heading, image_tag
from harness.reporting.metrics import problems_of
from harness.reporting.table_data import ColumnHead, Row, TableData, Value
from harness.reporting.text_grid import number_text, sections_of, text_cells
from harness.storage.record import Record
from harness.storage.store import Store

RELOAD_SECONDS = 20  # of the page of a running sweep
BEST = ("\x02", "\x03")  # around the text of a best number
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
VERDICTS = {findings.HOLDS: "holds", findings.FAILS: "fails", findings.UNKNOWN: "open"}


def report_page(
    sweep: Sweep,
    records: Iterable[Record],
    made: Mapping[str, TableData],
    images: Mapping[str, bytes],
    store: Store,
    progress: str = "",
) -> str:
    """The report as HTML.

    made      the sweep's tables by name
    images    its figures by name, as SVG
    progress  how far a running sweep is; the page then says so, and loads itself again
    """
    known = {record.cell_key: record for record in records}
    parts = {
        "tables": "".join(_table(data, known) for data in made.values()),
        "budgets": _budgets(sweep, store),
        "figures": "".join(
            f'<figure id="figure-{_id(name)}">{image_tag(name, image)}'
            f"<figcaption>{_text(heading(name))}</figcaption></figure>"
            for name, image in images.items()
        ),
        "findings": _findings(sweep, made),
        "protocol": _protocol(sweep, made),
        "cells": "".join(_cell(cell, known.get(cell_key(cell)), store) for cell in sweep.cells),
    }
    titles = {
        "tables": "Tables",
        "budgets": "Bit budgets",
        "figures": "Figures",
        "findings": "Findings",
        "protocol": "Protocol",
        "cells": "How each number was made",
    }
    shown = {name: part for name, part in parts.items() if part}
    links = "".join(f'<a href="#{name}">{titles[name]}</a>' for name in shown)
    body = "".join(
        f'<section id="{name}"><h2>{titles[name]}</h2><div class="{name}">{part}</div></section>'
        for name, part in shown.items()
    )
    title = sweep.title or sweep.name
    reload = f' data-reload="{RELOAD_SECONDS}"' if progress else ""
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<style>{_file('report.css')}</style></head><body{reload}>"
    )
    top = (
        f"<header><h1>{_text(title)}</h1><p>{_text(sweep.description)}</p>{_status(sweep, known, progress)}"
        f"<nav>{links}</nav></header>{_filters(made)}"
    )
    foot = f"<footer>Made by <code>{_text(command_line(sweep))}</code></footer>"
    tip = '<div id="tip" role="tooltip" hidden></div>'
    return f"{head}{top}<main>{body}</main>{foot}{tip}<script>{_file('report.js')}</script></body></html>\n"


def _status(sweep: Sweep, known: Mapping[str, Record], progress: str) -> str:
    """How complete the results are, and the cells that failed."""
    records = [known[key] for key in map(cell_key, sweep.cells) if key in known]
    done = sum(record.complete for record in records)
    failed = [record for record in records if record.failures and not record.complete]
    words = progress or f"{done} of {len(sweep.cells)} cells done" + (
        f", {len(failed)} failed" if failed else ""
    )
    if progress:
        words += (
            f" — running, written at {time.strftime('%H:%M:%S')}; tests appear when the sweep ends"
        )
    lines = "".join(
        f'<li><a href="#cell-{record.cell_key[:12]}">{_text(record.cell.title)}</a>: '
        f"{_text(str(record.failures[-1].get('reason', '')))}</li>"
        for record in failed
    )
    return f'<p class="status">{_text(words)}</p>' + (
        f'<ul class="failed">{lines}</ul>' if lines else ""
    )


def _filters(made: Mapping[str, TableData]) -> str:
    """Switches for the methods and the bit widths of all tables, and a field for text."""
    rows = [row for data in made.values() for row in data.rows]
    groups = {
        "method": list(dict.fromkeys(_label(data, row, "method") for data, row in _rows(made))),
        "bits": sorted(
            dict.fromkeys(_label(data, row, "bits") for data, row in _rows(made)), key=_width
        ),
    }
    boxes = "".join(
        f'<fieldset data-filter="{name}"><legend>{name}</legend>'
        + "".join(
            f'<label><input type="checkbox" value="{_text(value)}">{_text(value or "—")}</label>'
            for value in values
        )
        + "</fieldset>"
        for name, values in groups.items()
        if len(values) > 1
    )
    if len(rows) < 2:
        return ""
    return (
        f'<form class="filters" role="search">{boxes}<label class="find">find '
        f'<input type="search" id="find" placeholder="text of a row"></label>'
        f'<button type="reset">show all</button><output id="count"></output></form>'
    )


def _rows(made: Mapping[str, TableData]) -> list[tuple[TableData, Row]]:
    return [(data, row) for data in made.values() for row in data.rows]


def _label(data: TableData, row: Row, name: str) -> str:
    return dict(zip(data.labels, row.labels, strict=True)).get(name, "")


def _width(bits: str) -> tuple[float, str]:
    """Bit widths in descending order: 16, W8A8, 8, 4."""
    digits = "".join(c if c.isdigit() or c == "." else " " for c in bits).split()
    return (-float(digits[0]) if digits and digits[0] != "." else 0.0, bits)


# -- tables --------------------------------------------------------------------------------------------------------------


def _table(data: TableData, known: Mapping[str, Record]) -> str:
    heads, lines = text_cells(data, BEST)
    left = len(data.labels)
    origins: list[tuple[ColumnHead | None, int]] = []  # of every printed column after the labels
    for position, head in enumerate(data.columns):
        origins += [(head, position)]
        origins += [(None, position)] * 2 if head.published else []
    rows = {id(line): row for row, line in zip(data.rows, lines, strict=True)}
    taken: set[str] = set()
    bodies = []
    for section, section_lines in sections_of(data, lines):
        first = (
            f'<tr class="section"><th colspan="{len(heads)}" scope="rowgroup">{_text(section)}</th></tr>'
            if section
            else ""
        )
        shown = "".join(
            _row(data, rows[id(line)], line, left, origins, known, taken) for line in section_lines
        )
        bodies.append(f"<tbody>{first}{shown}</tbody>")
    columns = "".join(
        f'<th scope="col"{"" if index < left else " class=n"}><button type="button">{_text(head)}</button></th>'
        for index, head in enumerate(heads)
    )
    notes = "".join(f"<p>{_text(note)}</p>" for note in data.notes)
    notes += "".join(f"<p><code>{_text(command)}</code></p>" for command in data.commands)
    return (
        f'<div class="table" id="table-{_id(data.name)}"><h3>{_text(data.caption or data.name)}</h3>'
        f'<div class="scroll"><table><thead><tr>{columns}</tr></thead>{"".join(bodies)}</table></div>'
        f'<div class="notes">{notes}</div></div>'
    )


def _row(
    data: TableData,
    row: Row,
    line: Sequence[str],
    left: int,
    origins: Sequence[tuple[ColumnHead | None, int]],
    known: Mapping[str, Record],
    taken: set[str],
) -> str:
    named = row.cell_key[:12] or "-".join(label for label in (row.model, *row.labels) if label)
    name = f"row-{_id(data.name)}-{_id(named)}"
    while name in taken:
        name += "-"
    taken.add(name)
    cells = []
    for index, text in enumerate(line):
        if index < left:
            anchor = f'<a class="link" href="#{name}" aria-label="address of this row">#</a>'
            cells.append(f"<td>{_text(text)}{anchor if index == 0 else ''}</td>")
            continue
        head, position = origins[index - left]
        cells.append(_number(row, text, head, data.columns[position], row.values[position], known))
    facts = f'data-method="{_text(_label(data, row, "method"))}" data-bits="{_text(_label(data, row, "bits"))}"'
    base = ' class="base"' if row.baseline else ""
    return f'<tr id="{name}" {facts}{base}>{"".join(cells)}</tr>'


def _number(
    row: Row,
    text: str,
    ours: ColumnHead | None,
    head: ColumnHead,
    value: Value,
    known: Mapping[str, Record],
) -> str:
    """One entry: a number of ours with its tip and a link to its cell, or what stands beside it."""
    is_best = text.startswith(BEST[0])
    shown = _text(text.strip("".join(BEST)))
    if ours is None:
        verdict = "" if value.agrees is None else " agrees" if value.agrees else " differs"
        return f'<td class="n quiet{verdict}">{shown}</td>'
    number = value.number if value.number is not None and math.isfinite(value.number) else None
    sortable = "" if number is None else f' data-value="{number!r}"'
    tip = _tip(row, head.column, value, known)
    if value.cell_key in known and shown:
        shown = f'<a href="#cell-{value.cell_key[:12]}">{shown}</a>'
    best = " best" if is_best else ""
    hint = f' data-tip="{_text(tip)}"' if tip else ""
    return f'<td class="n{best}"{sortable}{hint}>{shown}</td>'


def _tip(row: Row, column: Column, value: Value, known: Mapping[str, Record]) -> str:
    """The lines that explain a number: its interval, its test, the published number, its cell."""
    if not value.cell_key:
        return ""
    title = column.title or column.metric
    names = " ".join(label for label in (row.model, *row.labels[:3]) if label)
    shown = "no number" if value.number is None else number_text(value.number, column)
    lines = [f"{names} · {title} {shown}"]
    if value.half_width is not None:
        lines.append(f"± {value.half_width:.3g}: 95 % interval over {value.seeds} seeds")
    elif value.stderr is not None:
        lines.append(f"± {1.96 * value.stderr:.3g}: 95 % interval over items")
    found = value.comparison
    if found is not None:
        verdict = "differs" if found.differs else "no difference shown"
        lines.append(
            f"against the baseline, per item: {found.difference:+.3g}, 95 % interval {found.low:+.3g} to {found.high:+.3g}"
        )
        lines.append(
            f"{found.test} over {found.items} items, adjusted p {found.adjusted:.2g}: {verdict}"
        )
    if value.published is not None:
        lines.append(f"published: {value.published.text}")
    record = known.get(value.cell_key)
    if record is not None and value.problems:
        lines += problems_of(record, (column.metric, *column.of))
    return "\n".join([*lines, f"cell {value.cell_key}", f"harness show {value.cell_key[:12]}"])


def _budgets(sweep: Sweep, store: Store) -> str:
    """What each bit budget chose, and whether that is better than a uniform cell."""
    rows = budgets.budget_rows(sweep, store)
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in budgets.HEADS)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in budgets.texts_of(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<div class="notes"><p>{_text(budgets.NOTE)}</p></div>'
    )


# -- findings and protocol -----------------------------------------------------------------------------------------------


def _findings(sweep: Sweep, made: Mapping[str, TableData]) -> str:
    if not sweep.findings:
        return ""
    items = []
    for each in findings.check_tables(sweep, made):
        sides = []
        for side in findings.SIDES:
            found: findings.Answer | None = getattr(each, side)
            if found is None:
                continue
            shown = "; ".join((*found.numbers, *(f"missing: {name}" for name in found.missing[:4])))
            sides.append(
                f'<dt>{side}</dt><dd><b class="{VERDICTS[found.verdict]}">{found.verdict}</b> {_text(shown)}</dd>'
            )
        source = f'<p class="quiet">{_text(each.finding.source)}</p>' if each.finding.source else ""
        items.append(f"<li><p>{_text(each.finding.text)}</p>{source}<dl>{''.join(sides)}</dl></li>")
    return f"<ol>{''.join(items)}</ol>"


def _protocol(sweep: Sweep, made: Mapping[str, TableData]) -> str:
    """Models, calibration and evaluations with their settings and digests, and the tests."""
    rows: dict[tuple[str, str, str], None] = {}
    for cell in sweep.cells:
        model = cell.model
        revision = f"@{model.revision}" if model.revision else ""
        rows[
            "model",
            model.name,
            f"{model.source}{revision}, {model.dtype}, weights {model.digest or 'not known'}",
        ] = None
        text = cell.calibration
        if text is not None:
            windows = f"{text.samples} windows of {text.length} tokens from {text.source}, split {text.split}"
            rows["calibration", text.name, f"{windows}, digest {text.digest or 'not known'}"] = None
        for evaluation in cell.evaluations:
            settings = settings_text(evaluation.settings)
            limit = "" if evaluation.limit is None else f", the first {evaluation.limit} items"
            scorer = f"{evaluation.evaluator}, version {evaluation.version}{limit}"
            data = evaluation.data_digest or "without a digest"
            about = "; ".join(filter(None, (scorer, settings, f"data {data}")))
            rows["evaluation", evaluation.name, about] = None
    listed = "".join(
        f"<tr><td>{kind}</td><td>{_text(name)}</td><td>{_text(about)}</td></tr>"
        for kind, name, about in sorted(
            rows, key=lambda row: ("model calibration evaluation".index(row[0]),)
        )
    )
    skipped = "".join(
        f"<li>{len(skip.titles)} cells are left out: {_text(skip.reason)}</li>"
        for skip in sweep.skips
    )
    tests = (
        "<p>Every cell is tested against its full-precision baseline over the items that both were scored on: exact McNemar test "
        "where items are right or wrong, else a paired studentized bootstrap, from 1,000 items on Student's paired t. The tests of "
        "one table are corrected together (Holm, 5 %).</p>"
        if any(
            value.comparison for data in made.values() for row in data.rows for value in row.values
        )
        else ""
    )
    return (
        f'<div class="scroll"><table class="facts"><tbody>{listed}</tbody></table></div>{tests}'
        + (f"<ul>{skipped}</ul>" if skipped else "")
    )


# -- cells ---------------------------------------------------------------------------------------------------------------


def _cell(cell: Cell, record: Record | None, store: Store) -> str:
    """Everything that the numbers of a cell descend from, folded under its title."""
    key = cell_key(cell)
    config = {
        name: value
        for name, value in to_json(cell).items()
        if name not in ("evaluations", "variant")
    }
    facts: list[tuple[str, str]] = [("cell", key)]
    if record is not None:
        facts += [("checkpoint", record.quantize_key)]
        facts += [
            (name, "diverged" if not math.isfinite(value) else f"{value:.6g}")
            for name, value in record.metrics().items()
            if not name.endswith("_stderr")
        ]
        facts += [("problem", sentence) for sentence in problems_of(record)]
        facts += [
            ("failure", f"{failure.get('stage', '')}: {failure.get('reason', '')}")
            for failure in record.failures
        ]
        for stage, made in record.provenance.items():
            if isinstance(made, Mapping):
                words = [
                    f"{name} {made[name]}"
                    for name in ("time", "host", "device", "threads", "commit", "command")
                    if made.get(name) not in (None, "")
                ]
                facts.append((f"made by {stage}", ", ".join(words)))
    if not cell.method.is_baseline:
        facts.append(("compared with", cell_key(baseline_of(cell))))
    facts.append(("everything", f"harness show {key[:12]}"))
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(text)}</td></tr>" for name, text in facts)
    place = _text(store.where(store.cell_folder(key)))
    settings = _text(json.dumps(config, indent=1, ensure_ascii=False))
    return (
        f'<details id="cell-{key[:12]}"><summary>{_text(cell.title)}</summary>'
        f'<p><a href="../cells/{key}/cell.json">cell.json</a> of the store, <code>{place}</code></p>'
        f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div><pre>{settings}</pre></details>'
    )


def _text(text: str) -> str:
    return html.escape(text)


def _id(text: str) -> str:
    """Text as a part of an address."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)


def _file(name: str) -> str:
    return resources.files("harness.reporting").joinpath(name).read_text(encoding="utf-8")
