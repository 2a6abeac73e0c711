"""Lines of events in logs."""

from __future__ import annotations

from harness.core.events import Failed, Progress, Quantized, Scored, TaskEnded
from harness.execution.logs import describe


def test_every_event_has_its_line() -> None:
    assert describe(Progress(0.0, ("k",), stage="block", step=1, steps=4)) == "block 1/4"
    assert "4.250 bits" in describe(
        Quantized(0.0, ("k",), record={"bits_per_weight": 4.25, "seconds": 1.0})
    )
    assert "a/b 2.5" in describe(Scored(0.0, ("k",), evaluation="a", metrics={"a/b": 2.5}))
    assert "out_of_memory" in describe(
        Failed(0.0, ("k",), stage="x", kind="out_of_memory", reason="r")
    )
    assert describe(TaskEnded(0.0)) == ""
