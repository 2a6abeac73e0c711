"""A table in LaTeX."""

from __future__ import annotations

import re

from harness.reporting.table_data import TableData
from harness.reporting.text_grid import sections_of, text_cells

LATEX_FIT = (  # a table larger than its page is shrunk
    r"\ifdim\wd0>\textwidth\sbox0{\resizebox{\textwidth}{!}{\usebox0}}\fi",
    r"\ifdim\dimexpr\ht0+\dp0\relax>0.7\textheight\sbox0{\resizebox*{!}{0.7\textheight}{\usebox0}}\fi",
    r"\usebox0",
)
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
    """A table in LaTeX with booktabs."""
    heads, lines = text_cells(data, ("\x02", "\x03"))
    left = len(data.labels)
    out = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{latex_text(data.caption or data.name)}}}",
        rf"\sbox0{{\begin{{tabular}}{{{'l' * left}{'r' * (len(heads) - left)}}}",
        r"\toprule",
        " & ".join(latex_text(head) for head in heads) + r" \\",
    ]
    for section, section_lines in sections_of(data, lines):
        out.append(r"\midrule")
        if section:
            out.append(rf"\multicolumn{{{len(heads)}}}{{l}}{{\emph{{{latex_text(section)}}}}} \\")
        for line in section_lines:
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
    out += [rf"\par {latex_text(note)}" for note in data.notes]
    out += [rf"\par\texttt{{{latex_text(command)}}}" for command in data.commands]
    return "\n".join([*out, r"\end{table}"]) + "\n"
