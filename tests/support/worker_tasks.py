"""Tasks of a sweep, as the scheduler would make them."""

from __future__ import annotations

from harness.core.sweep import Sweep
from harness.execution.tasks import EvaluateTask, QuantizeTask


def quantize_task(sweep: Sweep) -> QuantizeTask:
    return QuantizeTask(
        sweep.cells, str(sweep.runtime.runs), device="cpu", command="harness run test"
    )


def evaluate_task(sweep: Sweep) -> EvaluateTask:
    return EvaluateTask(
        sweep.cells,
        tuple(cell.evaluations for cell in sweep.cells),
        str(sweep.runtime.runs),
        device="cpu",
    )
