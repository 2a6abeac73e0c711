"""Cells by their keys and by the names of their parts; what two sweeps or stores have in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_commands import GRID, invoke, local

from harness.cli.diff import compare, diff_text, records_of
from harness.config.grid import load_sweep
from harness.core.cell import cell_key, score_key
from harness.storage.store import Store


def filled(runs: Path, scheme: str, perplexity: float) -> Store:
    """A store whose cells have a score each, written without running anything."""
    words = [each for each in GRID if not each.startswith("scheme")]
    sweep = load_sweep(None, [*words, f"scheme={scheme}", f"runs={runs}", "tracking=none"])
    store = Store(runs)
    store.open_cells(sweep.cells)
    for cell in sweep.cells:
        for evaluation in cell.evaluations:
            metrics = {f"{evaluation.name}/perplexity": perplexity}
            score = {"metrics": metrics, "stderr": {}, "details": {}}
            store.write_score(cell_key(cell), score_key(cell, evaluation), score)
    return store


def test_cells_are_listed_and_named_by_their_parts(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    store = filled(runs, "w4,w3", 2.0)
    code, out = invoke("show", f"runs={runs}")
    assert code == 0 and len(out.splitlines()) == 3 and "demo · rtn · w3" in out
    code, out = invoke("show", "--runs", str(runs), "--json")
    assert code == 0 and {each["key"] for each in json.loads(out)} == set(store.cell_keys())
    code, out = invoke("show", "demo", "rtn", "w3", "--runs", str(runs))
    assert code == 0 and out.startswith("demo · rtn · w3\n") and "again   harness run" in out
    code, out = invoke("show", "demo", "rtn", "w3", f"runs={runs}", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["title"] == "demo · rtn · w3" and facts["command"]
    code, out = invoke("show", "demo", "w8", "--runs", str(runs))
    assert code == 0 and len(out.splitlines()) == 3  # rtn, gptq and awq; none is here yet
    code, out = invoke("show", "demo", "w5", "--runs", str(runs))
    assert code == 2 and "no cell of w5" in out and "w4g32" in out
    code, out = invoke("show", "dmeo", "--runs", str(runs))
    assert code == 2 and 'did you mean "demo"' in out


def test_a_place_with_a_comma_is_one_place(tmp_path: Path) -> None:
    runs = str(tmp_path / "a, b")
    code, out = invoke("show", "demo", "rtn", "w3", "--runs", runs)
    assert code == 0 and f"{runs}/cells/" in out
    code, out = invoke("diff", "demo", "demo", "--runs", runs)
    assert code == 0 and out.startswith("same")


def test_what_two_stores_have_in_common(tmp_path: Path) -> None:
    filled(tmp_path / "a", "w4,w3", 2.0)
    filled(tmp_path / "b", "w4,w8", 2.5)
    ours, theirs = records_of(str(tmp_path / "a")), records_of(str(tmp_path / "b"))
    same = compare(ours, ours)
    assert same["same"] == 3 and not same["differing"] and not same["only_a"] + same["only_b"]
    found = compare(ours, theirs)
    assert found["only_a"] == ["demo · rtn · w3"] and found["only_b"] == ["demo · rtn · w8"]
    metrics = {each["title"]: each["metrics"] for each in found["differing"]}
    assert metrics["demo · rtn · w4"] == {"demo_perplexity/perplexity": [2.0, 2.5]}
    assert "demo_perplexity/perplexity: 2 → 2.5" in diff_text("a", "b", found)
    code, out = invoke("diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json")
    assert code == 0 and json.loads(out)["same"] == 0
    code, out = invoke("diff", str(tmp_path), "demo")
    assert code == 2 and "no store" in out


def test_a_changed_setting_is_named(tmp_path: Path) -> None:
    words = ["model=demo", "method=gptq", "scheme=w4", "calibration=demo", f"runs={tmp_path}"]
    several = [
        [Store(tmp_path).record(cell) for cell in load_sweep(None, [*words, *more]).cells]
        for more in ((), ("calibration.samples=8",))
    ]
    (only,) = compare(*several)["differing"]
    assert only["config"]["calibration.samples"] == [16, 8] and "key" in only["config"]


@pytest.mark.parametrize("command", ["status", "table", "plan", "findings"])
def test_facts_are_json_and_runs_is_an_option_too(tmp_path: Path, command: str) -> None:
    words = [word for word in local(tmp_path) if not word.startswith("runs=")]
    name = "demo_methods" if command == "findings" else "demo"
    words = ["method=rtn", "scheme=w4", *words] if command == "plan" else words
    code, out = invoke(command, name, *words, "--runs", str(tmp_path / "r"), "--json")
    assert code == 0 and json.loads(out), out
