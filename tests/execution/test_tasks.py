"""Tasks and events cross between processes as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

from worker_tasks import evaluate_task, quantize_task

from harness.core.cell import from_json, to_json
from harness.core.events import Event, Failed, Progress, Quantized, Scored, TaskEnded, TaskStarted
from harness.core.sweep import Sweep
from harness.execution.tasks import (
    EvaluateTask,
    QuantizeTask,
    decode,
    decode_event,
    encode,
    encode_event,
)

Make = Callable[..., Sweep]


SMALL = ("evaluations=demo_perplexity", "evaluations.limit=2")


def test_events_and_tasks_cross_as_json(demo_sweep: Make) -> None:
    events: list[Event] = [
        TaskStarted(1.0, ("a",), worker="h:1", device="cpu"),
        Progress(1.0, ("a", "b"), "block", 1, 4),
        Quantized(1.0, ("a",), record={"seconds": 1.0}),
        Scored(1.0, ("a",), "e", {"e/m": float("inf")}, {}),
        Failed(1.0, ("a",), "s", "killed", "r", "d", True),
        TaskEnded(1.0, (), 2.0, 3),
    ]
    assert [decode_event(json.loads(json.dumps(encode_event(event)))) for event in events] == events
    sweep = demo_sweep("method=rtn", "scheme=w4", *SMALL)
    for task in (
        QuantizeTask(sweep.cells, "r"),
        EvaluateTask(sweep.cells, tuple(c.evaluations for c in sweep.cells), "r"),
    ):
        assert decode(json.loads(json.dumps(encode(task)))) == task


def test_tasks_travel_as_json(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4", *SMALL)
    for task in (quantize_task(sweep), evaluate_task(sweep)):
        back = from_json(type(task), json.loads(json.dumps(to_json(task))))
        assert back == task
        assert [cell.evaluations for cell in back.cells] == [
            cell.evaluations for cell in task.cells
        ]
