"""A table as an HTML page that sorts, or as a part of another page."""

from __future__ import annotations

import html
from collections.abc import Mapping

from harness.reporting.table_data import Row, TableData
from harness.reporting.text_grid import sections_of, text_cells

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;color:#1c2733;background:#fff;margin:24px}
table{border-collapse:collapse}caption{caption-side:top;text-align:left;font-weight:600;font-size:16px;padding-bottom:8px}
th,td{padding:4px 12px;text-align:right;white-space:nowrap}th{border-bottom:2px solid #1c2733;cursor:pointer}
td{border-bottom:1px solid #e4e8ec}th.l,td.l{text-align:left}tr.base td{background:#f3f6f9}td.p,th.p{color:#66717d}
tr.section td{font-weight:600;border-bottom:1px solid #1c2733;padding-top:14px}
td.best{font-weight:700}td.agrees{color:#1b7a3d}td.differs{color:#b3261e;background:#fdecea}
a{color:inherit;text-decoration:none}a:hover{text-decoration:underline}
p{max-width:80ch;margin:8px 0}code{background:#f3f6f9;padding:2px 6px}
"""
SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const index = head.cellIndex, up = head.dataset.up !== "1";
  head.dataset.up = up ? "1" : "";
  const key = row => { const text = row.cells[index].textContent, n = parseFloat(text); return isNaN(n) ? text : n };
  for (const body of document.querySelectorAll("tbody")) {
    const rows = [...body.rows].filter(row => !row.classList.contains("section"));
    rows.sort((a, b) => {
      const x = key(a), y = key(b);
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
    });
    body.append(...rows);
  }
};
"""


# of a table inside another page: its colours are that page's
INSIDE = """
.harness-table table{border-collapse:collapse}
.harness-table caption{caption-side:top;text-align:left;font-weight:600;padding-bottom:6px}
.harness-table th,.harness-table td{padding:2px 10px;text-align:right;white-space:nowrap;background:none}
.harness-table th{border-bottom:2px solid currentColor}.harness-table td{border-bottom:1px solid #8884}
.harness-table .l{text-align:left}.harness-table td.best{font-weight:700}.harness-table tr.section td{font-weight:600}
.harness-table td.agrees{color:#1b7a3d}.harness-table td.differs{color:#b3261e}.harness-table p{margin:4px 0;font-size:90%}
"""


def to_html(data: TableData, links: Mapping[str, str]) -> str:
    """A table as an HTML page. links: cell_key -> an address, to which the numbers of that cell lead."""
    title = html.escape(data.caption or data.name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head><body>\n{_content(data, links)}\n<script>{SORT}</script></body></html>\n"
    )


def fragment(data: TableData) -> str:
    """A table inside another page, such as a notebook: styled by classes of its own, without a script."""
    return f'<div class="harness-table"><style>{INSIDE}</style>{_content(data, {})}</div>'


def _content(data: TableData, links: Mapping[str, str]) -> str:
    """The table and its notes."""
    heads, lines = text_cells(data, ("\x02", "\x03"))
    left = len(data.labels)
    quiet = {left + i for i, head in enumerate(heads[left:]) if head in ("published", "Δ")}

    makers: list[int | None] = []  # printed column -> column of the table, None beside it
    verdicts: list[int | None] = []  # the same for the columns of differences
    for position, head in enumerate(data.columns):
        makers += [position, None, None] if head.published else [position]
        verdicts += [None, None, position] if head.published else [None]

    def classes(index: int, text: str, row: Row | None = None) -> str:
        names = [
            n
            for n, on in (
                ("l", index < left),
                ("p", index in quiet),
                ("best", text.startswith("\x02")),
            )
            if on
        ]
        column = verdicts[index - left] if row is not None and index >= left else None
        agrees = row.values[column].agrees if row is not None and column is not None else None
        names += [] if agrees is None else ["agrees" if agrees else "differs"]
        return f' class="{" ".join(names)}"' if names else ""

    def entry(row: Row, index: int, text: str) -> str:
        """A number of ours says on hovering which cell made it, and leads there where links are known."""
        shown, column = (
            html.escape(text.strip("\x02\x03")),
            makers[index - left] if index >= left else None,
        )
        key = "" if column is None or not shown else row.values[column].cell_key
        if key in links:
            shown = f'<a href="{html.escape(links[key])}" target="_blank">{shown}</a>'
        hint = f' title="harness show {key[:12]}"' if key else ""
        return f"<td{classes(index, text, row)}{hint}>{shown}</td>"

    title = html.escape(data.caption or data.name)
    out = [f"<table><caption>{title}</caption><thead><tr>"]
    out += [f"<th{classes(i, head)}>{html.escape(head)}</th>" for i, head in enumerate(heads)]
    out += ["</tr></thead>"]
    rows = {id(line): row for row, line in zip(data.rows, lines, strict=True)}
    for section, section_lines in sections_of(data, lines):
        out.append("<tbody>")
        if section:
            out.append(
                f'<tr class="section"><td class="l" colspan="{len(heads)}">{html.escape(section)}</td></tr>'
            )
        for line in section_lines:
            base = ' class="base"' if rows[id(line)].baseline else ""
            out.append(
                f"<tr{base}>{''.join(entry(rows[id(line)], i, text) for i, text in enumerate(line))}</tr>"
            )
        out.append("</tbody>")
    out += ["</table>", *(f"<p>{html.escape(note)}</p>" for note in data.notes)]
    out += [f"<p><code>{html.escape(command)}</code></p>" for command in data.commands]
    return "\n".join(out)
