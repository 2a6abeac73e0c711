"""The streamed loss of a whole model: equal to the model's own, with the gradients that finite differences show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small import cell, windows
from torch import Tensor

from harness.core.cell import Method, baseline_of
from harness.quantization.inference.load import load
from harness.quantization.methods.protocols import BlockView
from harness.quantization.pipeline.model_gradients import StreamedModel


def run(block: BlockView, hidden: Sequence[Tensor]) -> list[Tensor]:
    return [block.run(one) for one in hidden]


def same(hidden: Tensor) -> Tensor:
    return hidden


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_loss_is_the_models_own(family: str, tiny_model: Any) -> None:
    folder, text = tiny_model(family), windows(3)
    found = StreamedModel(folder, "float32", "cpu", text).gradients((), (0, 2), same, run, same)
    model, _ = load(baseline_of(cell(folder, Method("none"))), folder, None)
    with torch.no_grad():
        logits = model(text[[0, 2]]).logits[:, :-1].log_softmax(-1)
    assert found == pytest.approx(
        float(-logits.gather(-1, text[[0, 2], 1:, None]).mean()), rel=1e-5
    )


def test_gradients_are_those_of_finite_differences(tiny_model: Any) -> None:
    """A factor where the stream begins, one on a matrix of every block, and one where it ends; all with one gradient each."""
    model = StreamedModel(tiny_model("llama"), "float32", "cpu", windows(2))

    def loss(factors: Tensor, trained: Sequence[Tensor] = ()) -> float:
        def scaled(block: BlockView, hidden: Sequence[Tensor]) -> list[Tensor]:
            weight = block.linear("mlp.down_proj").weight * factors[1]
            return [block.run(one, {"mlp.down_proj.weight": weight}) for one in hidden]

        return model.gradients(
            trained, (0, 1), lambda h: h * factors[0], scaled, lambda h: h + factors[2]
        )

    factors = torch.tensor([1.5, 0.7, 0.1], requires_grad=True)
    loss(factors, [factors])
    assert factors.grad is not None
    for place in range(3):
        step = torch.zeros(3)
        step[place] = 2e-2
        expected = (loss(factors.detach() + step) - loss(factors.detach() - step)) / 4e-2
        assert float(factors.grad[place]) == pytest.approx(expected, rel=0.03, abs=1e-4)
