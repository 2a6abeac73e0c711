"""Statistics of inputs: what a collector gathers is what it says, sequence by sequence, alone and beside others."""

from __future__ import annotations

import pytest
import torch

from harness.core.errors import MethodError
from harness.quantization.methods.evidence import cross_moment
from harness.quantization.pipeline.observers import Collector, InputEvidence


def collected(*needs: str) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    collector = Collector("attention", needs, 3, torch.device("cpu"))
    for sequence in range(3):
        collector.add(sequence, torch.randn(1, 7 + sequence, 5, generator=rng))
    return collector.finish().values


def test_the_mean_square_is_the_diagonal_of_the_hessian() -> None:
    values = collected("hessian", "square_mean")
    torch.testing.assert_close(values["square_mean"], values["hessian"].diagonal())


def test_the_mean_square_has_the_same_bytes_whatever_else_is_gathered() -> None:
    alone = collected("square_mean")
    assert list(alone) == ["square_mean"]
    for needs in (("hessian",), ("mean", "abs_max"), ("inputs", "hessian", "abs_mean")):
        assert torch.equal(collected(*needs, "square_mean")["square_mean"], alone["square_mean"])


def test_another_models_broken_inputs_break_the_cross_moment_alone() -> None:
    """A method without "cross" gets what it would get without the company of one that has it."""
    inputs = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(0))
    original = inputs.clone()
    original[0, 2, 3] = torch.inf
    collector = Collector("attention", ("hessian", "cross"), 1, torch.device("cpu"))
    collector.add(0, inputs, original)
    statistics = collector.finish()
    alone = Collector("attention", ("hessian",), 1, torch.device("cpu"))
    alone.add(0, inputs)
    found = InputEvidence(statistics, ("hessian",), "quantized")["hessian"]
    assert torch.equal(found, alone.finish().values["hessian"])
    evidence = InputEvidence(statistics, ("hessian", "cross"), "quantized")
    with pytest.raises(MethodError, match="products of the two models' inputs"):
        cross_moment(evidence)
