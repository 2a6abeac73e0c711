"""A sweep with budgets from nothing to its verdicts: an ordinary run, with cells that it learns of on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from harness.cli.show import cell_facts, record_text
from harness.core.cell import cell_key
from harness.core.events import Event
from harness.execution import allocation, budgets, driver
from harness.execution.progress import Silent, Tally
from harness.reporting.budgets import BETTER, NOT_BETTER, UNIFORM, WORSE, budget_rows
from harness.reporting.tables import build
from harness.storage.budgets import resolved, unfinished
from harness.storage.store import Store
from tests.support.budgets import budget_sweep, make_candidates

RTN = {"method": "rtn", "scheme": ["w3g32", "w4g32"]}
SHORT: dict[str, Any] = {"propose": ["kl"], "trials": 2, "together": "block"}


class Kept(Silent):
    """A display that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines += text.splitlines()

    def event(self, event: Event, tally: Tally, finished: Any) -> None:
        pass


def test_from_nothing_to_the_verdict_and_once_more(tmp_path: Path) -> None:
    said = tmp_path / "said"
    notify = f"notify='echo $HARNESS_STATE $HARNESS_DONE >> {said}'"
    sweep, display = budget_sweep(tmp_path, notify, of=RTN, bits=[4.2, 4.625], **SHORT), Kept()
    store = Store(sweep.runtime.runs)
    summary = driver.run(sweep, display)
    assert summary.exit_code == 0, summary.text
    assert said.read_text() == "done 4\n", "once, when the budgets have chosen and all is scored"
    whole = resolved(sweep, store)
    (mixed,) = whole.cells[3:]
    assert mixed.title == "demo · rtn · mixed@4.2", "at 4.625 bits everything has 4 bits"
    assert [record.complete for record in summary.records] == [True] * 4
    assert sum(line.startswith("chosen  mixed@") for line in display.lines) == 2

    rows = budget_rows(sweep, store)
    assert [row.verdict for row in rows][1] == UNIFORM
    assert rows[0].verdict in (BETTER, NOT_BETTER, WORSE) and rows[0].p_value is not None
    assert rows[0].uniform == sweep.budgets[0].candidates[0]
    assert rows[0].answer == (rows[0].mixed if rows[0].verdict == BETTER else rows[0].uniform)
    assert sum(rows[0].shares.values()) == pytest.approx(1)
    assert [text.split("    ")[0] for text in summary.budgets] == ["mixed@4.2", "mixed@4.625"]

    table = build(whole, whole.shown_tables[0], [store.record(cell) for cell in whole.cells], store)
    labels = [row.labels for row in table.rows]
    assert ("rtn", "mixed@4.2", "") in labels and len(set(labels)) == 4
    assert "| 4.625 |" in (store.root / "tables" / "small" / "budgets.md").read_text()
    assert "Bit budgets" in (store.root / "reports" / "small.html").read_text()
    shown = record_text(store.record(mixed), store, "harness run small")
    assert "mixed@4.2 of sweep small" in shown and rows[0].verdict in shown

    facts = cell_facts(mixed, store)
    assert facts["command"] == rows[0].content["command"], "the key of a mixture does not make it"

    files = {p: p.read_bytes() for p in (store.root / "budgets").rglob("*.json")}
    assert not unfinished(sweep, store)
    again = driver.run(sweep, Kept())
    assert again.exit_code == 0 and again.budgets == summary.budgets
    assert {p: p.read_bytes() for p in (store.root / "budgets").rglob("*.json")} == files
    assert said.read_text() == "done 4\n", "nothing ran"


def test_the_time_of_a_run_is_that_of_its_budgets_too(tmp_path: Path) -> None:
    sweep = budget_sweep(tmp_path, of=RTN, bits=[4.2], **SHORT)
    store = make_candidates(sweep)
    assert unfinished(sweep, store)
    assert not list(budgets.allocate(sweep, store, seconds=0.0))
    summary = driver.run(sweep, budget_seconds=1e-6)
    assert summary.exit_code == 1 and "is used up" in summary.stopped
    assert unfinished(sweep, store), "nothing was chosen after the time was over"


def test_a_bad_assembly_is_not_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted table likes what hurts most, and without trials nothing objects before the floor does."""
    sweep = budget_sweep(
        tmp_path,
        of={"method": "rtn", "scheme": ["w2g32", "w3g32", "w4g32"]},
        bits=[3.594],
        propose=["kl"],
        trials=0,
        together="block",
    )

    def planted(self: Any, name: str, anchor: Any) -> list[list[float]]:
        return [[0.0, 5.0, 9.0], *([9.0, 5.0, 0.0] for _ in self.groups[1:2])] + [
            [0.0, 1.0, 2.0] for _ in self.groups[2:]
        ]

    monkeypatch.setattr(allocation._Work, "table", planted)
    summary = driver.run(sweep)
    assert summary.exit_code == 0, summary.text
    (row,) = budget_rows(sweep, Store(sweep.runtime.runs))
    assert row.uniform is not None and row.uniform.scheme.name == "w3g32"
    assert row.verdict == WORSE and "unverified" in row.text
    assert row.answer == row.uniform
    free = dataclasses.replace(sweep.budgets[0], floor=False)
    (kept,) = budget_rows(dataclasses.replace(sweep, budgets=(free,)), Store(sweep.runtime.runs))
    assert kept.answer == kept.mixed and kept.verdict == WORSE


def test_a_cell_that_is_rounded_anew_is_measured_again(tmp_path: Path) -> None:
    """AWQ's scales follow the scheme and what was rounded before: blocks of candidates are a stand-in for the cell."""
    sweep = budget_sweep(
        tmp_path,
        of={"method": "awq", "scheme": ["w3g32", "w4g32"], "inputs": "quantized"},
        bits=[4.2],
        **SHORT,
    )
    store = Store(sweep.runtime.runs)
    summary = driver.run(sweep)
    assert summary.exit_code == 0, summary.text
    (row,) = budget_rows(sweep, store)
    assert row.content is not None and not row.content["exact"]
    assert row.content["divergence_made"] != row.content["divergence"]
    assert row.content["divergence_made"] == pytest.approx(row.content["divergence"], rel=1)
    assert row.mixed is not None and cell_key(row.mixed) == summary.records[-1].cell_key
    manifest = summary.records[-1].manifest
    assert manifest is not None, "made by a pass"
    assert 8 * sum(each["bytes"] for each in manifest["linears"]) == row.content["bits"]
