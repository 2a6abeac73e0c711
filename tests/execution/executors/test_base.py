"""What executors share: ends of tasks, GPUs of tasks, the environment of a worker."""

from __future__ import annotations

import pytest

from harness.core.failures import FailureKind
from harness.execution.executors.base import Exit, gpus_of, process_environment
from harness.execution.tasks import EvaluateTask, QuantizeTask


def test_the_end_of_a_task_names_a_kind_of_failure_or_none() -> None:
    assert Exit().kind is None
    assert Exit("lost", "gone").kind is FailureKind.LOST  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tired"):
        Exit("tired")  # type: ignore[arg-type]


def test_a_task_takes_full_gpus_or_its_fraction_of_one() -> None:
    assert gpus_of(QuantizeTask((), "r", gpu_fraction=0.5)) == 0.5
    assert gpus_of(EvaluateTask((), (), "r", gpu_fraction=0.5)) == 0.5
    assert gpus_of(EvaluateTask((), (), "r", devices=4)) == 4


def test_threads_of_a_worker_are_set_for_every_library() -> None:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    assert {process_environment(3)[name] for name in names} == {"3"}
