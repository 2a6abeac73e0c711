"""Plans: every reason at once, nothing repeated, work that can be shared kept together, a thousand cells in seconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from executions import plan_of

from harness.core.cell import Cell, cell_key, quantize_key, score_key
from harness.core.errors import ConfigError, PlanError
from harness.core.sweep import Sweep
from harness.core.units import size
from harness.planning.planner import make
from harness.planning.render import render, require
from harness.storage.files import LocalDisk, free_disk
from harness.storage.store import Store

Make = Callable[..., Sweep]


def test_everything_is_to_do_in_an_empty_store(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn,gptq", "scheme=w4,w3", "evaluations=demo_perplexity")
    plan = plan_of(sweep)
    assert not plan.done and not plan.refused and not plan.problems
    assert plan.missing == sweep.cells
    assert plan.checkpoints == len(sweep.cells) == 5  # with the baseline
    assert plan.evaluations == 5
    made = [quantize_key(cell) for each in plan.passes for cell in each.cells]
    assert sorted(made) == sorted(map(quantize_key, sweep.cells))


def test_planning_starts_nothing(demo_sweep: Make, tmp_path: Path) -> None:
    plan_of(demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_perplexity"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_in_the_store_is_done(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4,w3", "evaluations=demo_perplexity")
    store = Store(sweep.runtime.runs)
    for cell in sweep.cells:
        store.open_cell(cell)
        folder = store.checkpoint_folder(quantize_key(cell))
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text('{"seconds": 2.0}')
    scored = sweep.cells[-1]
    store.write_score(
        cell_key(scored),
        score_key(scored, scored.evaluations[0]),
        {"metrics": {"demo_perplexity/perplexity": 2.0}},
    )
    plan = make(sweep, store)
    assert plan.done == (scored,)
    assert not plan.passes  # checkpoints are there: an evaluation runs alone
    assert plan.evaluations == len(sweep.cells) - 1


def test_too_small_a_disk_is_a_problem_of_the_sweep(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalDisk, "free_bytes", lambda self, root: 10)
    plan = plan_of(demo_sweep("method=rtn", "scheme=w4"))
    assert "larger disk" in plan.problems[0]
    with pytest.raises(PlanError, match="larger disk"):
        require(plan)


def test_a_thousand_cells_in_seconds(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4,w3,w2,w4g32", "evaluations=demo_perplexity")
    grid = [cell for cell in sweep.cells if cell.method.needs]
    cells: list[Cell] = []
    for number in range(250):
        for cell in grid:
            assert cell.calibration is not None
            cells.append(
                dataclasses.replace(
                    cell, calibration=dataclasses.replace(cell.calibration, seed=number)
                )
            )
    began = time.process_time()  # of this process alone: others on the machine do not count
    plan = plan_of(dataclasses.replace(sweep, cells=tuple(cells)))
    assert len(plan.missing) == 1000 and len(plan.passes) == 250
    assert time.process_time() - began < 10


def test_sizes_in_words(tmp_path: Path) -> None:
    assert [size(n) for n in (900, 2.5e6, 13.52e9, 3e12)] == ["1 kB", "2.5 MB", "13.5 GB", "3.0 TB"]
    assert free_disk(tmp_path / "not" / "there" / "yet") > 0


def test_a_misspelt_method_never_reaches_a_plan(demo_sweep: Make) -> None:
    with pytest.raises(ConfigError, match="gptq"):
        demo_sweep("method=gtpq", "scheme=w4")


def test_a_plan_says_what_a_family_leaves_alone(
    demo_sweep: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    sweep = demo_sweep("model=tiny:mixtral", "method=rtn", "scheme=w4g32")
    text = render(make(sweep, Store(sweep.runtime.runs)))
    assert (
        "note    tiny_mixtral: scales on the inputs of experts are not folded into the norm" in text
    )


def test_a_plan_notes_what_methods_warn_of(demo_sweep: Callable[..., Sweep]) -> None:
    sweep = demo_sweep("method=block_ap,rtn", "scheme=w4g32", "calibration=demo")
    text = render(make(sweep, Store(sweep.runtime.runs)))
    assert text.count("published with 8.4 million") == 1
    assert "note    demo: rounding block_ap: trains all weights on " in text


def test_a_plan_notes_that_equal_streams_leave_nothing_to_correct(
    demo_sweep: Callable[..., Sweep],
) -> None:
    own = ("method=gptaq,gptq", "scheme=w4g32", "calibration=demo", "evaluations=[]")
    for inputs, expected in (
        ("quantized", 0),
        ("full_precision", 1),
        ("quantized,full_precision", 1),
    ):
        sweep = demo_sweep(*own, f"inputs={inputs}")
        text = render(make(sweep, Store(sweep.runtime.runs)))
        assert text.count("leaves it little to correct") == expected
