"""Notes below a table: what is missing and why, and what could explain a difference."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from synthetic_sweep import LLAMA, TABLE, cells
from table_sweeps import one_score, records, verdict_of

from harness.core.cell import Cell, cell_key, score_key
from harness.core.sweep import Sweep
from harness.reporting.render import render
from harness.reporting.table_data import TableData
from harness.reporting.tables import build
from harness.storage.store import Store


def test_baseline_first_gaps_and_failures_with_the_way_out(
    made: tuple[Sweep, Store, TableData],
) -> None:
    sweep, store, data = made
    assert data.rows[0].baseline
    assert data.commands == ("harness run llama3_8b_ptq",)
    text = render(data)
    assert "llama3_8b · awq · w2g128 failed: Hessian of block 12 is singular" in text
    assert "in 2 rows; fill with:\n\n    harness run llama3_8b_ptq\n" in text
    done = dataclasses.replace(sweep, cells=sweep.cells[:3])
    assert build(done, TABLE, records(done, store)).commands == ()


def test_what_could_explain_a_number_that_differs_stands_below_it(tmp_path: Path) -> None:
    protocol = (
        "calibration: other windows",
        "GPTQ: other flags",
        "AWQ: another search",
        "ARC-easy: other prompts",
        "other logits",
    )
    baseline, gptq, rtn = cells(LLAMA, ("gptq", "rtn"), (3,))

    def explaining(cell: Cell, number: float) -> list[str]:
        data = verdict_of(
            tmp_path / f"{cell.method.name}{number}", cell, number, protocol=protocol
        )[1]
        notes = [note for note in data.notes if note.startswith("Protocol")]
        assert len(notes) == len(protocol)
        return [note.partition("): ")[2] for note in notes if "could explain" in note]

    assert explaining(gptq, 9.5) == [
        "calibration: other windows",
        "GPTQ: other flags",
        "other logits",
    ]
    assert explaining(baseline, 7.0) == explaining(rtn, 10.0) == ["other logits"]
    assert explaining(gptq, 8.2) == []
    _, data = verdict_of(tmp_path / "alone", gptq, 9.5, protocol=("AWQ: another search",))
    assert any(
        "no difference of protocol is noted" in note and "gptq 3 128" in note for note in data.notes
    )
    assert "+1.30≠" in render(data) and r"$+1.30$$^{\neq}$" in render(data, "latex")
    assert re.search(r'class="p differs"[^>]*>\+1\.30≠<', render(data, "html"))
    assert "WikiText2 verdict" in render(data, "csv") and ",differs," in render(data, "csv")


def test_a_smoke_run_is_marked(tmp_path: Path) -> None:
    sweep, store = one_score(tmp_path, {"wikitext2/perplexity": 7.0}, limit=8)
    text = render(build(sweep, sweep.tables[0], [store.record(c) for c in sweep.cells]))
    assert "7.00†" in text and "first 8 items" in text


def test_items_without_a_score_are_marked_and_counted(tmp_path: Path) -> None:
    sweep, store = one_score(tmp_path, {"wikitext2/perplexity": 7.0})
    cell, evaluation = sweep.cells[0], sweep.cells[0].evaluations[0]
    score = {
        "metrics": {"wikitext2/perplexity": 7.0},
        "details": {"items": 40},
        "problems": {"unscored": 3, "sentences": ["windows without a token were left out."]},
    }
    store.write_score(cell_key(cell), score_key(cell, evaluation), score)
    data = build(sweep, sweep.tables[0], records(sweep, store))
    assert data.rows[0].values[0].problems and "7.00†" in render(data)
    notes = [note for note in data.notes if note.startswith("†")]
    assert len(notes) == 2 and "3 of 40" in notes[0] and "windows without a token" in notes[1]
    assert all("none 16" in note for note in notes)  # the rows that have it
