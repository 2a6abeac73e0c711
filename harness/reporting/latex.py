"""A table in LaTeX, for a page of one or of two columns, with the names that papers print.

A table that would be shrunk much in a column of a two-column page spans both columns (`table*`, which a one-column page sets as
`table`); what is larger than its place is shrunk to it. A rule divides the methods, or the bit widths where the rows go by these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.core.text import file_name
from harness.reporting.notes import FILL
from harness.reporting.table_data import Row, TableData
from harness.reporting.text_grid import sections_of, text_cells

LATEX_FIT = (  # a table larger than its column or its page is shrunk
    r"\ifdim\wd0>\linewidth\sbox0{\resizebox{\linewidth}{!}{\usebox0}}\fi",
    r"\ifdim\dimexpr\ht0+\dp0\relax>0.7\textheight\sbox0{\resizebox*{!}{0.7\textheight}{\usebox0}}\fi",
    r"\usebox0",
)
# in points: a character of \small, the space between columns, a column of a two-column page (ACL's has 219, IEEE's 252)
CHARACTER, SEPARATION, COLUMN = 4.6, 8.0, 235.0
LEAST_SCALE = 0.8  # a table shrunk to less spans both columns
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "—": "--",
    "–": "--",
    "…": r"\ldots{}",
    "\n": " ",
    "≈": r"$^{\approx}$",
    "†": r"$^{\dagger}$",
    "Δ": r"$\Delta$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "−": "$-$",
    "<": "$<$",
    ">": "$>$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "|": "$|$",
    "±": r"$\pm$",
    "≠": r"$^{\neq}$",
    "α": r"$\alpha$",
    "λ": r"$\lambda$",
}


def latex_text(text: str) -> str:
    """Text for LaTeX: specials escaped, and what has no letter in its default encoding left as a question mark."""
    return "".join(LATEX.get(c, c if ord(c) < 0x250 else "?") for c in text)


def _latex_number(text: str) -> str:
    best = text.startswith("\x02")
    text = text.strip("\x02\x03")
    match = re.fullmatch(r"([+-]?)([0-9.]+)(?:e\+?(-?[0-9]+))?( ± [0-9.e]+)?([≈†≠]*)", text)
    if match is None:
        return latex_text(text)
    sign, mantissa, exponent, spread, marks = match.groups()
    marks = (spread or "") + marks
    power = rf"{{\times}}10^{{{exponent}}}" if exponent else ""
    number = f"${sign}{mantissa}{power}$" if sign or exponent else mantissa
    return (
        rf"\textbf{{{mantissa}{f'${power}$' if power else ''}}}" if best else number
    ) + latex_text(marks)


def to_latex(data: TableData) -> str:
    """A table in LaTeX with booktabs: caption, label `tab:<sweep>-<table>`, and its notes below.

    Commands that fill gaps are comments at the end, since a paper does not print them.
    """
    heads, lines = text_cells(data, ("\x02", "\x03"))
    left = len(data.labels)
    rows = {id(line): row for row, line in zip(data.rows, lines, strict=True)}
    for line in lines:
        line[:left] = data.paper_labels(rows[id(line)])
    environment = "table*" if _width(heads, lines) * LEAST_SCALE > COLUMN else "table"
    out = [
        r"% needs \usepackage{booktabs,graphicx}",
        rf"\begin{{{environment}}}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{latex_text(_caption(data))}}}",
        rf"\label{{{_label(data)}}}",
        rf"\sbox0{{\begin{{tabular}}{{{'l' * left}{'r' * (len(heads) - left)}}}",
        r"\toprule",
        " & ".join(latex_text(head) for head in heads) + r" \\",
    ]
    for section, section_lines in sections_of(data, lines):
        out.append(r"\midrule")
        if section:
            out.append(rf"\multicolumn{{{len(heads)}}}{{l}}{{\emph{{{latex_text(section)}}}}} \\")
            out.append(r"\midrule")
        ruled = _ruled(data, [rows[id(line)] for line in section_lines])
        for index, line in enumerate(section_lines):
            out += [r"\midrule"] if index in ruled else []
            out.append(
                " & ".join([*map(latex_text, line[:left]), *map(_latex_number, line[left:])])
                + r" \\"
            )
    out += [
        r"\bottomrule",
        r"\end{tabular}}%",
        *LATEX_FIT,
        r"\par\smallskip\raggedright\scriptsize",
    ]
    notes = [note.removesuffix(FILL) for note in data.notes]
    out += [rf"\par {_breakable(latex_text(note))}" for note in notes]
    out.append(rf"\end{{{environment}}}")
    out += [f"% {line}" for command in data.commands for line in ("to fill a gap:", command)]
    return "\n".join(out) + "\n"


def _caption(data: TableData) -> str:
    """The caption without the number that the table has in the paper it repeats: LaTeX sets a number of its own."""
    text = data.caption or data.name
    plain = re.sub(r"^Table [0-9A-Z]+[.:]\s*", "", text) or text
    return plain[:1].upper() + plain[1:]


def _label(data: TableData) -> str:
    names = dict.fromkeys(filter(None, (data.sweep, data.name)))
    return f"tab:{'-'.join(map(file_name, names))}"


def _width(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> float:
    """About how wide the table is, in points, from the longest text of each column."""
    longest = [max(len(text) for text in column) for column in zip(heads, *lines, strict=True)]
    return sum(CHARACTER * letters + SEPARATION for letters in longest)


def _ruled(data: TableData, rows: Sequence[Row]) -> set[int]:
    """Rows above which a rule stands: below the baselines, and where the method changes, or the bits.

    Of the two, the one with the longer runs of equal rows divides the table; neither where no run has two rows.
    """
    starts: dict[str, list[int]] = {}
    for name in {"method", "bits"}.intersection(data.labels):
        place = data.labels.index(name)
        texts = [(row.baseline, data.paper_labels(row)[place]) for row in rows]
        starts[name] = [i for i in range(1, len(rows)) if texts[i] != texts[i - 1]]
    below = {i for i in range(1, len(rows)) if rows[i - 1].baseline and not rows[i].baseline}
    name = min(sorted(starts, reverse=True), key=lambda each: len(starts[each]), default="")
    quantized = sum(not row.baseline for row in rows)
    runs = len([i for i in starts.get(name, ()) if i not in below]) + 1
    return below | set(starts[name]) if name and runs < quantized else below


def _breakable(text: str) -> str:
    """Text whose names of files, addresses and settings may be broken at the end of a line."""
    return re.sub(r"(\\_|/|=)(?=\S)", r"\1\\allowbreak{}", text)
