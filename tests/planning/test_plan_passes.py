"""Cells grouped into passes: what they share, and what memory and workers allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from executions import plan_of

from harness.core.sweep import Cluster, Sweep
from harness.planning import resources
from harness.planning.estimates import pass_memory
from harness.planning.render import render

Make = Callable[..., Sweep]


def test_cells_of_one_checkpoint_share_it(demo_sweep: Make) -> None:
    """Activation bits are executed, not stored: RTN at w8 and w8a8 has one checkpoint."""
    plan = plan_of(demo_sweep("method=rtn", "scheme=w8,w8a8", "evaluations=demo_perplexity"))
    assert plan.checkpoints == 2  # with the baseline
    assert sum(len(each.cells) for each in plan.passes) == 3
    assert "use the checkpoint of another" in render(plan)


def test_data_free_and_calibrated_cells_walk_apart(demo_sweep: Make) -> None:
    plan = plan_of(demo_sweep("method=rtn,gptq", "scheme=w4,w3"))
    needs = [{bool(cell.method.needs) for cell in each.cells} for each in plan.passes]
    assert sorted(needs, key=str) == [{False}, {True}]


def test_workers_get_a_pass_each(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w8,w4,w3,w2", "cluster=local", "cluster.workers=2")
    calibrated = [each for each in plan_of(sweep).passes if each.cells[0].method.needs]
    assert [len(each.checkpoints) for each in calibrated] == [
        4
    ]  # one walk per worker: the baseline has the other
    sweep = dataclasses.replace(
        sweep, runtime=dataclasses.replace(sweep.runtime, cluster=Cluster("local", workers=4))
    )
    calibrated = [each for each in plan_of(sweep).passes if each.cells[0].method.needs]
    assert [len(each.checkpoints) for each in calibrated] == [2, 2]


def test_cells_of_one_stream_stay_together(demo_sweep: Make) -> None:
    sweep = demo_sweep(
        "method=gptq",
        "scheme=w8,w4,w3,w2",
        "inputs=full_precision",
        "cluster=local",
        "cluster.workers=8",
    )
    calibrated = [each for each in plan_of(sweep).passes if each.cells[0].method.needs]
    assert [len(each.checkpoints) for each in calibrated] == [4]
    assert "shared by 4" in calibrated[0].sharing


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=rtn", "scheme=w4,w3"), "4 blocks read once, data-free"),
        (("method=gptq", "scheme=w4,w3"), "4 blocks read once, statistics of block 0 shared"),
        (
            ("method=gptq", "scheme=w4,w3", "inputs=full_precision"),
            "4 blocks read once, one input stream shared by 2",
        ),
        (("method=awq", "scheme=w4,w3"), "4 blocks read once, one input stream shared by 2"),
        (
            ("method=any_precision,squeezellm", "scheme=w4,w3", "calibration=demo"),
            "4 blocks read once, squared gradients shared by 4",
        ),
        (("method=gptq", "scheme=w4"), "4 blocks"),
    ],
)
def test_what_cells_share_is_said(demo_sweep: Make, overrides: tuple[str, ...], said: str) -> None:
    passes = [
        each
        for each in plan_of(demo_sweep(*overrides)).passes
        if not all(c.method.is_baseline for c in each.cells)
    ]
    assert [each.sharing for each in passes] == [said]


def test_little_memory_cuts_a_pass(demo_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = demo_sweep(
        "method=gptq", "scheme=w8,w4,w3,w2", "calibration.samples=512", "calibration.length=256"
    )
    from harness.data import model_folders
    from harness.quantization import models

    shapes = models.shapes(model_folders.model_folder(sweep.cells[0].model))
    two = [cell for cell in sweep.cells if cell.method.needs][:2]
    monkeypatch.setattr(
        resources, "available_memory", lambda: int(sum(pass_memory(two, shapes)) / 0.9) + 1000
    )
    calibrated = [each for each in plan_of(sweep).passes if each.cells[0].method.needs]
    assert [len(each.checkpoints) for each in calibrated] == [2, 2]
