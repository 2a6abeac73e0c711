"""A plan as a frame."""

from __future__ import annotations

from collections.abc import Callable

from executions import plan_of

from harness.core.sweep import Sweep

Make = Callable[..., Sweep]


def test_the_frame_has_a_row_per_cell(demo_sweep: Make) -> None:
    frame = plan_of(
        demo_sweep("method=rtn", "scheme=w4,w4g96", "evaluations=demo_perplexity")
    ).frame()
    assert dict(zip(frame["scheme"], frame["state"], strict=True)) == {
        "full": "quantize",
        "w4": "quantize",
        "w4g96": "refused",
    }
    assert "group size 96" in frame.set_index("scheme")["reasons"]["w4g96"]
