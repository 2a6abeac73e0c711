"""The tally of a run: finished cells and the remaining time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.core.cell import cell_key
from harness.core.events import Failed, Progress, Quantized, Scored
from harness.core.sweep import Sweep
from harness.execution.progress import Tally
from harness.planning.planner import make
from harness.storage.store import Store

Make = Callable[..., Sweep]


SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")


def test_the_tally_counts_cells_and_foresees_the_end(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    tally = Tally(make(sweep, Store(sweep.runtime.runs)))
    first, second = map(cell_key, sweep.cells)
    assert tally.units == 4 and tally.fraction == 0 and tally.seconds_left is None
    assert tally.add(Quantized(0.0, (first,))) == []
    assert tally.add(Scored(0.0, (first,), evaluation="demo_perplexity", metrics={"a": 1.0})) == [
        first
    ]
    assert tally.fraction == 0.5 and tally.seconds_left is not None
    tally.add(Progress(0.0, (second,), "block", 2, 4))
    assert tally.fraction == pytest.approx(0.625)
    tally.add(Failed(0.0, (second,), reason="r"))
    assert tally.fraction == 1.0 and tally.done == [first] and list(tally.failed) == [second]
