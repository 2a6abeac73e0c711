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


@pytest.mark.slow
def test_the_demo_notebook_goes_from_plan_to_figure(tmp_path: Path) -> None:
    (path,) = (each for each in NOTEBOOKS if each.name == "demo.ipynb")
    after = (
        "print('STATES', sorted(set(plan['state'])), sorted(set(records['state'])))",
        "print('ROWS', len(table), int(table['perplexity'].notna().sum()))",
        "figure.savefig('figure.png')",
        "print('LINES', len(axes.get_lines()))",
    )
    program = tmp_path / "program.py"
    program.write_text("\n\n".join((*cells(path, "code"), *after)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "STATES ['quantize'] ['done']" in done.stdout
    assert "ROWS 7 7" in done.stdout and "LINES 3" in done.stdout
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert (tmp_path / "runs" / "figures" / "demo").is_dir()  # as the notebook says
