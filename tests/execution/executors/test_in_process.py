"""Tasks in this process, for real."""

from __future__ import annotations

from collections.abc import Callable

from executions import plan_of

from harness.core.events import Scored
from harness.core.sweep import Sweep
from harness.execution import dispatch
from harness.planning.render import render

Make = Callable[..., Sweep]


SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")


def test_the_plan_is_what_runs(demo_sweep: Make) -> None:
    """In this process, for real: after the run the plan has nothing left."""
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    events = list(dispatch.run(plan_of(sweep)))
    assert sum(isinstance(event, Scored) for event in events) == 2
    assert "nothing to do" in render(plan_of(sweep))
