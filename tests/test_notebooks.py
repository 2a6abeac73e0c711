"""The notebooks run: their code cells, in order, in a process of their own and in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and content["nbformat_minor"] >= 5
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def executed(name: str, folder: Path, after: tuple[str, ...]) -> str:
    """The output of a notebook's code cells as a script in a folder, with further lines at the end."""
    (path,) = (each for each in NOTEBOOKS if each.name == name)
    program = folder / "program.py"
    program.write_text("\n\n".join((*cells(path, "code"), *after)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=folder,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_notebook_goes_from_plan_to_figure(tmp_path: Path) -> None:
    after = (
        "print('STATES', sorted(set(plan['state'])), sorted(set(records['state'])))",
        "print('ROWS', len(table), int(table.frame['perplexity'].notna().sum()))",
        "print('LINES', len(figure.axes[0].containers), len(findings))",
    )
    out = executed("demo.ipynb", tmp_path, after)
    assert "STATES ['quantize'] ['done']" in out and "  ok    demo" in out
    assert "ROWS 7 7" in out and "LINES 2 4" in out
    assert (tmp_path / "runs" / "figures" / "demo" / "index.html").is_file()
    assert (tmp_path / "runs" / "reports" / "demo.html").is_file()


def test_a_model_and_a_text_of_ones_own_come_out_as_latex(tmp_path: Path) -> None:
    out = executed("own_model.ipynb", tmp_path, ("print('STATES', set(records['state']))",))
    assert "STATES {'done'}" in out
    table = (tmp_path / "table.tex").read_text(encoding="utf-8")
    assert r"\toprule" in table and table in out and table.count("GPTQ & ") == 2
    assert (tmp_path / "figure.pdf").stat().st_size > 1000
