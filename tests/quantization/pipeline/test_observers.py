"""Statistics of inputs: what a collector gathers is what it says, sequence by sequence, alone and beside others."""

from __future__ import annotations

import torch

from harness.quantization.pipeline.observers import Collector


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
