"""Findings: what each check says, and that the published numbers hold the statements that every sweep draws from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config import grid
from harness.core.cell import Cell, Method, Model, Scheme, WeightScheme
from harness.core.errors import ConfigError
from harness.core.sweep import Column, Finding, Term
from harness.evaluation import statistics
from harness.reporting import findings, render, tables
from harness.reporting.findings import FAILS, HOLDS, UNKNOWN, answer
from harness.reporting.published import Printed, load_published
from harness.reporting.table_data import ColumnHead, Row, TableData, Value

PROJECT = Path(__file__).parents[2]
SWEEPS = sorted(path.stem for path in (PROJECT / "sweeps").glob("*.yaml"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def row(
    method: str, bits: str, number: float | None, published: float | None = None, model: str = "m"
) -> Row:
    cell = Cell(Model(model, "demo"), Method(method), Scheme("s", WeightScheme()))
    printed = None if published is None else Printed(str(published))
    value = Value(number, published=printed, published_number=published)
    return Row((method, bits, ""), (value,), cell, f"{method}{bits}", model, method == "none")


def table(*rows: Row, higher: bool = True) -> dict[str, TableData]:
    head = ColumnHead(Column("task/acc", "acc"), "acc", higher, True)
    return {"t": TableData("t", "", ("method", "bits", "group"), (head,), rows)}


def finding(**check: Any) -> Finding:
    return Finding("text", table="t", column="acc", **check)


ORDER = finding(better=(Term("gptq", 3), Term("rtn", 3)))
FULL, GPTQ, RTN = row("none", "16", 70, 69), row("gptq", "3", 60, 61), row("rtn", "3", 40, 62)


def test_an_order_holds_or_not_on_either_side() -> None:
    data = table(FULL, GPTQ, RTN)
    assert answer(ORDER, data, "ours").verdict == HOLDS
    assert answer(ORDER, data, "published").verdict == FAILS
    assert "gptq 3 60" in " ".join(answer(ORDER, data, "ours").numbers)


def test_lower_is_better_turns_the_order() -> None:
    assert answer(ORDER, table(FULL, GPTQ, RTN, higher=False), "ours").verdict == FAILS
    assert (
        answer(finding(above=ORDER.better), table(FULL, GPTQ, RTN, higher=False), "ours").verdict
        == HOLDS
    )


def test_a_margin_must_be_exceeded() -> None:
    assert (
        answer(finding(better=ORDER.better, margin=19.9), table(GPTQ, RTN), "ours").verdict == HOLDS
    )
    assert (
        answer(finding(better=ORDER.better, margin=20), table(GPTQ, RTN), "ours").verdict == FAILS
    )


def test_what_is_missing_cannot_be_told_but_a_counterexample_can() -> None:
    gap = row("rtn", "3", None)
    assert answer(ORDER, table(GPTQ, gap), "ours").verdict == UNKNOWN
    assert answer(ORDER, table(GPTQ), "ours").verdict == UNKNOWN
    both = {
        "t": TableData(
            "t",
            "",
            ("method", "bits", "group"),
            table(GPTQ)["t"].columns,
            (
                row("gptq", "3", 1, model="a"),
                row("rtn", "3", 2, model="a"),
                row("gptq", "3", None, model="b"),
            ),
        )
    }
    assert answer(ORDER, both, "ours").verdict == FAILS


def test_a_diverged_perplexity_is_worse_than_any() -> None:
    data = table(row("gptq", "3", 1e9), row("rtn", "3", math.nan), higher=False)
    assert answer(ORDER, data, "ours").verdict == HOLDS


def test_loss_is_taken_from_the_baseline_in_the_better_direction() -> None:
    lost = finding(loss=(Term("gptq", 3),), at_most=10)
    assert answer(lost, table(FULL, GPTQ), "ours").verdict == HOLDS
    assert (
        answer(finding(loss=(Term("gptq", 3),), at_most=9.9), table(FULL, GPTQ), "ours").verdict
        == FAILS
    )
    assert answer(lost, table(GPTQ), "ours").verdict == UNKNOWN  # no baseline
    worse = table(row("none", "16", 6), row("gptq", "3", math.inf), higher=False)
    assert answer(lost, worse, "ours").verdict == FAILS
    assert answer(finding(loss=(Term("gptq", 3),), at_least=5), worse, "ours").verdict == HOLDS


def test_losses_are_compared_across_models() -> None:
    rows = (
        row("none", "16", 70, model="small"),
        row("gptq", "3", 60, model="small"),
        row("none", "16", 75, model="large"),
        row("gptq", "3", 72, model="large"),
    )
    asked = finding(excess=(Term("gptq", 3, model="sm*"), Term("gptq", 3, model="large")))
    assert answer(asked, table(*rows), "ours").verdict == HOLDS


def test_a_term_that_fits_several_rows_is_not_guessed() -> None:
    found = answer(
        finding(better=(Term("gptq"), Term("rtn"))), table(GPTQ, row("gptq", "4", 65), RTN), "ours"
    )
    assert found.verdict == UNKNOWN and "2 rows" in found.missing[0]


def test_correlation_over_rows() -> None:
    heads = tuple(ColumnHead(Column(name, name), name, True, False) for name in ("x", "y"))
    rows = tuple(
        Row(
            ("rtn", str(bits), ""),
            (Value(float(bits)), Value(10.0 - bits)),
            GPTQ.cell,
            str(bits),
            "m",
        )
        for bits in (2, 3, 4)
    )
    data = {"t": TableData("t", "", ("method", "bits", "group"), heads, rows)}
    asked = finding(relate=("t/y",), over=("t/x",), value=(Term("rtn"),), at_least=0.78)
    assert answer(asked, data, "ours").verdict == HOLDS
    assert (
        answer(asked, {"t": TableData("t", "", data["t"].labels, heads, rows[:2])}, "ours").verdict
        == UNKNOWN
    )


def test_pearson_of_known_pairs() -> None:
    assert statistics.pearson([(1, 2), (2, 4), (3, 6)]) == pytest.approx((1, -1, 1))
    assert statistics.pearson([(1, 1), (2, 1), (3, 1)]) is None


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_prints_its_tables_and_findings_without_network(
    name: str, tmp_path: Path
) -> None:
    if name == "local" and not (PROJECT / "../shared").is_dir():
        pytest.skip("needs the data beside the checkout")
    sweep = grid.load_sweep(name, [f"runs={tmp_path}"])
    for each in sweep.tables:
        data = tables.build(sweep, each, [])
        assert data.rows
        for form in render.FORMATS:
            assert render.render(data, form)
    checked = findings.check(sweep, [])
    for each in checked:
        is_published = any(t.published for t in sweep.tables)
        assert each.ours.verdict == UNKNOWN, each.finding.text
        assert (each.published is not None) is is_published, each.finding.text
        assert each.published is None or each.published.verdict == HOLDS, (
            each.finding.text,
            each.published,
        )
    if checked:
        text = findings.render(checked)
        assert f"{len(checked)} finding" in text
        assert text.count("    published  holds") == sum(
            each.published is not None for each in checked
        )


def test_every_published_table_stands_in_a_sweep() -> None:
    shown = {
        each.published
        for name in SWEEPS
        if name != "local"
        for each in grid.load_sweep(name).tables
    }
    known = {
        path.relative_to(PROJECT / "sweeps/published").with_suffix("").as_posix()
        for path in (PROJECT / "sweeps/published").glob("*/*.yaml")
    }
    assert known - shown == set()


def test_mistakes_in_findings_are_named(tmp_path: Path) -> None:
    text = """
model: demo
method: rtn
scheme: w4
evaluations: [demo_perplexity]
tables: [{name: t, columns: [{metric: demo_perplexity/perplexity, title: ppl}]}]
findings:
  - {text: a, table: tt, column: ppl, value: [{method: rtn}]}
  - {text: b, table: t, column: pplx, value: [{method: rtn}]}
  - {text: c, table: t, column: ppl}
  - {text: d, table: t, column: ppl, value: [{methode: rtn}]}
"""
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        grid.load_sweep(str(tmp_path / "s.yaml"))
    for part in (
        'no table "tt"; did you mean "t"',
        'no column "pplx"; did you mean "ppl"',
        "one of better",
        '"methode"',
    ):
        assert part in str(error.value)


STUDIES = {  # file name of the notes -> folder of the published numbers, tables
    "llama3-empirical-study": ("llama3-empirical-study", range(1, 13)),
    "llama3-70b-per-channel": ("llama3-70b-per-channel", range(1, 4)),
    "comprehensive-evaluation": ("comprehensive-evaluation", range(2, 16)),
}


@pytest.mark.parametrize("study", STUDIES)
def test_every_table_of_the_studies_is_published_here(study: str, shared: Path) -> None:
    folder, numbers = STUDIES[study]
    noted = {
        path.stem.rpartition("-table")[2]
        for path in (shared / "papers" / "tables").glob(f"{study}-table*.yaml")
    }
    own = {
        path.stem.removeprefix("table")
        for path in (PROJECT / "sweeps/published" / folder).glob("table*.yaml")
    }
    assert set(map(str, numbers)) <= own and noted <= own
    for number in noted:
        theirs = yaml.safe_load(
            (shared / "papers" / "tables" / f"{study}-table{number}.yaml").read_text(
                encoding="utf-8"
            )
        )
        ours = load_published(f"{folder}/table{number}")
        assert len(ours.rows) >= len(theirs["rows"]), number
