"""The report of a checkpoint: matrices that a rounding left out or damaged, and relative errors, also where float32 overflows."""

from __future__ import annotations

import pytest
import torch

from harness.core.cell import Cell, Method, Model, Part, Scheme
from harness.core.errors import MethodError
from harness.quantization.models.protocols import WeightLocation
from harness.quantization.numerics.weights import DenseWeight
from harness.quantization.pipeline.jobs import Job
from harness.quantization.pipeline.report import SharedSeconds, check_coverage, relative_error


@pytest.mark.parametrize("size", [1.0, 1e15, 3e24])
def test_relative_errors_do_not_overflow(size: float) -> None:
    weight, hessian = (
        size * torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        size * torch.tensor([[2.0, 1.0], [1.0, 3.0]]),
    )
    assert relative_error(weight / 8, weight) == pytest.approx(1 / 64)
    assert relative_error(weight / 8, weight, hessian) == pytest.approx(1 / 64)
    assert relative_error(0 * weight, 0 * weight, hessian) == 0


def test_all_that_a_rounding_left_out_or_damaged_is_named_at_once() -> None:
    locations = [WeightLocation(name, name, f"{name}.weight") for name in ("a", "b", "c", "d")]
    before = {location.parameter: torch.ones(2, 3) for location in locations}
    weights = {
        "a": DenseWeight(torch.ones(2, 3)),
        "b": DenseWeight(torch.ones(3, 2)),
        "c": DenseWeight(torch.full((2, 3), torch.nan)),
        "e": DenseWeight(torch.ones(2, 3)),
    }
    with pytest.raises(MethodError) as raised:
        check_coverage(
            "cell, block 1", locations, before, weights, {"norm": torch.tensor(torch.inf)}
        )
    message = str(raised.value)
    assert message.startswith("cell, block 1: ") and len(message.split("; ")) == 5
    for fact in ("b came back as [3, 2]", "c came back with NaN", "d was not", "e is no", "norm"):
        assert fact in message
    whole = {location.name: DenseWeight(torch.ones(2, 3)) for location in locations}
    check_coverage("cell, block 1", locations, before, whole, {})


def test_shared_work_counts_in_full_for_every_cell_that_needs_it() -> None:
    shared = SharedSeconds(stream=10.0, gradients=100.0)

    def cost(needs: tuple[str, ...]) -> float:
        method = Method("m", rounding=Part("rtn", needs=needs))
        cell = Cell(Model("m", "m"), method, Scheme("s"))
        return shared.cost_of(Job(cell, "key", (), writer=None, seconds=1.0))  # type: ignore[arg-type]

    assert cost(()) == 1 and cost(("hessian",)) == 11
    assert cost(("squared_gradient",)) == 101 and cost(("squared_gradient", "hessian")) == 111
    with shared.measure("stream"):
        pass
    assert 10 <= shared.stream < 11
