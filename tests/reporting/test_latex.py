"""Tables in LaTeX: balanced, escaped, and compiled where LaTeX is installed."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_sweep import make_sweep

from harness.core.cell import cell_key
from harness.core.labels import bits_text
from harness.core.sweep import Sweep
from harness.reporting.latex import latex_text
from harness.reporting.render import render
from harness.reporting.table_data import TableData
from harness.reporting.tables import build
from harness.storage.record import Record
from harness.storage.store import Store


def test_latex_is_balanced_and_escaped(made: tuple[Sweep, Store, TableData]) -> None:
    text = render(made[2], "latex")
    assert text.count("{") == text.count("}") and text.count("$") % 2 == 0
    assert text.isascii() and "?" not in text
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    counts = {
        len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines() if line.endswith(r"\\")
    }
    assert len(counts) == 1
    assert latex_text("50% of a_b & {c} # $ ~ ^ \\") == (
        r"50\% of a\_b \& \{c\} \# \$ \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )


def rows_of(text: str) -> list[list[str]]:
    """The texts of the rows between the rules; a rule is a row of one text."""
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    return [line.removesuffix(r" \\").split(" & ") for line in body.splitlines()]


def test_names_and_rules_are_those_of_papers(made: tuple[Sweep, Store, TableData]) -> None:
    titles = {"rtn": "RTN", "gptq": "GPTQ", "awq": "AWQ"}
    rows = rows_of(render(dataclasses.replace(made[2], method_titles=titles), "latex"))
    names = [row[0] for row in rows]
    assert {"BF16", "RTN", "GPTQ", "SliM-LLM"} <= set(names) and not {"gptq", "none"} & set(names)
    methods = names[names.index("BF16") :]
    for above, name in itertools.pairwise(methods):
        assert (r"\midrule" in (above, name)) or above == name, (above, name)
    assert methods[1] == r"\midrule"


def test_rules_divide_bit_widths_where_rows_go_by_these(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, published=False)
    by_bits = sorted(
        sweep.cells,
        key=lambda cell: (not cell.method.is_baseline, -cell.scheme.weight.bits, bits_text(cell)),
    )
    data = build(sweep, sweep.tables[0], [Record(cell, "q", cell_key(cell)) for cell in by_bits])
    order = [cell_key(cell) for cell in by_bits]
    rows = sorted(data.rows, key=lambda row: order.index(row.cell_key))
    found = [
        row[1] if len(row) > 1 else ""
        for row in rows_of(render(dataclasses.replace(data, rows=tuple(rows)), "latex"))
    ]
    blocks = [list(own) for rule, own in itertools.groupby(found[2:], key=bool) if rule]
    assert blocks == [["16"], ["8"] * 3, ["4"] * 3, ["W4A8"], ["3"] * 3, ["2"] * 3]


def test_a_caption_has_one_number_and_a_table_a_label(made: tuple[Sweep, Store, TableData]) -> None:
    table = dataclasses.replace(made[2], caption="Table 1: perplexity of a model")
    text = render(table, "latex")
    assert r"\caption{Perplexity of a model}" in text
    assert r"\label{tab:llama3_8b_ptq-table1}" in text
    assert "fill with" not in text and text.endswith("% harness run llama3_8b_ptq\n")
    assert r"\begin{table*}" in text  # published numbers beside ours: two columns wide


PAPER = r"""
\documentclass[%s]{article}
%s
\begin{document}
Tables~\ref{tab:llama3_8b_ptq-table1} and~\ref{tab:narrow}.
%s
%s
\end{document}
"""


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_latex_compiles_as_it_is_and_fits_its_page(
    made: tuple[Sweep, Store, TableData], tmp_path: Path, columns: str
) -> None:
    wide = render(made[2], "latex")
    narrow = render(dataclasses.replace(narrow_table(made[2]), sweep="", name="narrow"), "latex")
    assert r"\begin{table}" in narrow
    packages = dict.fromkeys(re.findall(r"\\usepackage\{.*\}", wide))
    (tmp_path / "t.tex").write_text(PAPER % (columns, "\n".join(packages), wide, narrow))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    for _ in range(2):  # the second run knows the labels
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    bad = [word for word in ("Overfull", "too large", "undefined") if word in done.stdout]
    assert done.returncode == 0 and not bad, done.stdout


def narrow_table(data: TableData) -> TableData:
    """The table with its first column of numbers alone."""
    rows = tuple(dataclasses.replace(row, values=row.values[:1]) for row in data.rows)
    return dataclasses.replace(data, columns=data.columns[:1], rows=rows, notes=data.notes[:1])
