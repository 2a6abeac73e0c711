"""Tables in LaTeX: balanced, escaped, and compiled where LaTeX is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.core.sweep import Sweep
from harness.reporting.latex import latex_text
from harness.reporting.render import render
from harness.reporting.table_data import TableData
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


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_as_it_is_and_fits_its_page(
    made: tuple[Sweep, Store, TableData], tmp_path: Path
) -> None:
    packages = re.findall(r"\\usepackage\{.*\}", render(made[2], "latex"))
    lines = [
        r"\documentclass{article}",
        *packages,
        r"\begin{document}",
        render(made[2], "latex"),
        r"\end{document}",
    ]
    (tmp_path / "t.tex").write_text("\n".join(lines))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 0 and "Overfull" not in done.stdout and "too large" not in done.stdout
    ), done.stdout
