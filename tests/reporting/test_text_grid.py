"""Numbers as text: as papers print them, and never a number where there is none."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from synthetic_sweep import TABLE, cells
from table_sweeps import one_score, records, row_of

from harness.core.cell import Model, cell_key
from harness.core.sweep import Sweep
from harness.reporting.render import render
from harness.reporting.table_data import TableData
from harness.reporting.tables import build
from harness.storage.store import Store


def test_diverged_is_shown_as_such(made: tuple[Sweep, Store, TableData]) -> None:
    _, _, data = made
    assert row_of(data, "rtn", "2")[4] == "diverged"
    assert "inf" not in render(data) and "nan" not in render(data)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (19312.0, "1.9e4"),
        (2.7e6, "2.7e6"),
        (9999.0, "9999.00"),
        (math.nan, "diverged"),
        (math.inf, "diverged"),
    ],
)
def test_large_perplexities_are_printed_like_the_papers(
    tmp_path: Path, value: float, text: str
) -> None:
    sweep, store = one_score(tmp_path, {"wikitext2/perplexity": value})
    assert row_of(build(sweep, sweep.tables[0], records(sweep, store)), "none", "16")[3] == text


def test_two_models_are_two_sections(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, _ = made
    both = dataclasses.replace(
        sweep, cells=(*cells(Model("demo", "demo", digest="x"), ("rtn",), (4,)), *sweep.cells)
    )
    data = build(both, TABLE, records(both, store), store)
    text = render(data)
    assert text.index("demo:") < text.index("llama3_8b:")
    assert [row.baseline for row in data.rows if row.model == "demo"] == [True, False]
    # the paper is of another model
    assert not any(v.published for row in data.rows if row.model == "demo" for v in row.values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_never_best_nor_like_the_baseline(
    made: tuple[Sweep, Store, TableData], value: float
) -> None:
    """Even where its items can be tested, as those of an accuracy over logits that are NaN."""
    sweep, store, _ = made
    broken = next(cell for cell in sweep.cells if cell.scheme.name == "w8g128")
    known = []
    for record in records(sweep, store):
        if record.cell_key == cell_key(broken):
            score = record.scores["arc_easy"]
            score = {**score, "metrics": {"arc_easy/acc": value}, "stderr": {}}
            record = dataclasses.replace(record, scores={**record.scores, "arc_easy": score})
        known.append(record)
    data = build(sweep, TABLE, known, store)
    row = next(row for row in data.rows if row.cell is broken)
    assert row.values[2].comparison is None and not row.values[2].best and not row.values[3].best
    for form in ("md", "latex", "html"):
        assert "nan" not in render(data, form) and "inf" not in render(data, form)
    texts = row_of(data, broken.method.name, "8")
    assert texts[-2:] == ("diverged", "diverged")
