"""Estimates of time, memory and disk."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.core.cell import cell_key, quantize_key, score_key
from harness.core.sweep import Sweep
from harness.planning.estimates import checkpoint_bytes, quantize_flops
from harness.planning.planner import make
from harness.storage.store import Store

Make = Callable[..., Sweep]


def test_past_seconds_are_the_estimate(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_perplexity")
    store = Store(sweep.runtime.runs)
    for cell in sweep.cells:
        store.open_cell(cell)
        folder = store.checkpoint_folder(quantize_key(cell))
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text('{"seconds": 100.0}')
        content = {"metrics": {"demo_perplexity/perplexity": 2.0}, "seconds": 50.0}
        store.write_score(cell_key(cell), score_key(cell, cell.evaluations[0]), content)
    more = demo_sweep("method=rtn", "scheme=w3", "evaluations=demo_perplexity")
    plan = make(more, store)
    assert plan.passes[0].seconds == pytest.approx(100)
    assert plan.scorings[0].seconds == pytest.approx(50)
    assert plan.seconds == pytest.approx(150)


def test_estimates_grow_with_the_work(demo_sweep: Make) -> None:
    from harness.data import model_folders
    from harness.quantization import models

    cells = {
        (c.method.name, c.scheme.name): c
        for c in demo_sweep("method=rtn,gptq", "scheme=w8,w4,w4g32").cells
    }
    shapes = models.shapes(model_folders.model_folder(next(iter(cells.values())).model))
    assert checkpoint_bytes(cells["rtn", "w8"], shapes) > checkpoint_bytes(
        cells["rtn", "w4g32"], shapes
    )
    assert checkpoint_bytes(cells["rtn", "w4g32"], shapes) > checkpoint_bytes(
        cells["rtn", "w4"], shapes
    )
    assert (
        quantize_flops(cells["gptq", "w4"], shapes) > quantize_flops(cells["rtn", "w4"], shapes) > 0
    )
    weights = shapes.blocks * sum(
        linear.out_features * linear.in_features for linear in shapes.linears
    )
    assert checkpoint_bytes(cells["rtn", "w8"], shapes) == pytest.approx(weights + 65536, rel=0.1)
