"""Squared gradients by the streamed backward pass: those of autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from small import windows

from harness.quantization.pipeline.blocks import Blocks


def test_squared_gradients_equal_autograd(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from harness.quantization.pipeline.fisher import SquaredGradients

    folder = tiny_model("qwen3")
    tokens = windows(3)
    blocks = Blocks(folder, "float32", "cpu")
    ours = SquaredGradients(blocks, tokens, tmp_path / "scratch")
    model = AutoModelForCausalLM.from_pretrained(folder)
    sums: dict[str, torch.Tensor] = {}
    for window in tokens:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] = sums.get(name, 0) + parameter.grad.square()
    for index in range(3):
        for name, value in ours.read(index).items():
            expected = sums[f"model.layers.{index}.{name}.weight"]
            assert torch.allclose(value, expected, rtol=1e-3, atol=1e-9 * float(expected.max()))
