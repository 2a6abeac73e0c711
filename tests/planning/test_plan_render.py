"""A plan as text."""

from __future__ import annotations

from collections.abc import Callable

from executions import plan_of

from harness.core.sweep import Sweep
from harness.planning.render import render

Make = Callable[..., Sweep]


def test_the_text_names_counts_places_and_skips(demo_sweep: Make) -> None:
    plan = plan_of(demo_sweep("method=rtn", "scheme=w4,w3", "evaluations=demo_perplexity"))
    text = render(plan)
    assert text.startswith("plan    3 cells · 0 done · 3 to do")
    assert "3 checkpoints" in text and "3 evaluations of 3 cells" in text and "runs" in text
