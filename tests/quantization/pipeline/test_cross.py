"""Statistics of two input streams in step: what "cross" is, alone and beside others, and where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import GPTQ, cell, content, failures, part, quantize, windows
from torch import Tensor
from transformers import AutoModelForCausalLM

from harness.core.cell import Method, quantize_key
from harness.planning.checks import Checker
from harness.quantization.inference.load import load
from harness.quantization.methods import gptaq

GPTAQ = Method("gptaq", rounding=part("gptaq"))
INPUTS = {
    "self_attn.q_proj": "qkv",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate_up",
    "mlp.down_proj": "down",
}


def inputs_of(model: Any, tokens: Tensor, linears: list[str]) -> dict[tuple[int, str], Tensor]:
    """The input [tokens, in] of named linears of each block."""
    found: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for index, block in enumerate(model.model.layers):
        for name in linears:

            def hook(_module: Any, args: Any, at: tuple[int, str] = (index, name)) -> None:
                found.setdefault(at, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))

            handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        for window in tokens:
            model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {at: torch.cat(parts) for at, parts in found.items()}


def test_it_is_the_mean_product_of_the_inputs_of_both_models(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounded model that comes out is what each linear saw: its input depends on the rounded linears before it alone."""
    folder = tiny_model("llama")
    seen: list[tuple[Tensor, Tensor]] = []
    compute = gptaq.correction_matrix

    def record(cross: Tensor, hessian: Tensor, *rest: Any) -> Tensor:
        seen.append((cross.clone(), hessian.clone()))
        return compute(cross, hessian, *rest)

    monkeypatch.setattr(gptaq, "correction_matrix", record)
    own = cell(folder, GPTAQ, bits=2)
    assert not failures(quantize([own], folder, tmp_path / "store"))
    assert len(seen) == 3 * 4  # once per group of linears with one input
    assert torch.equal(*seen[0])  # the embeddings feed block 0 in both models
    assert all(not torch.equal(*each) for each in seen[1:])

    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounded, _ = load(own, folder, tmp_path / "store" / quantize_key(own), "cpu")
    tokens = windows()
    x, behind = (inputs_of(model, tokens, list(INPUTS)) for model in (full, rounded))
    for number, (cross, hessian) in enumerate(seen):
        at = (number // 4, list(INPUTS)[number % 4])
        count = x[at].shape[0]
        for found, expected in (
            (cross, x[at].T @ behind[at] / count),
            (hessian, behind[at].T @ behind[at] / count),
        ):
            torch.testing.assert_close(
                found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            )


def test_alone_in_company_and_resumed_it_has_the_same_bytes(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("qwen3")
    scaled = Method("awq_qronos", transform=part("awq", "transform"), rounding=part("qronos"))
    cells = [
        cell(folder, GPTAQ, bits=3),
        cell(folder, Method("gptaq", rounding=part("gptaq", sequential=False)), bits=3),
        cell(folder, GPTAQ, bits=3, inputs="full_precision"),
        cell(folder, scaled, bits=3),
        cell(folder, GPTQ, bits=3),
    ]
    assert not failures(quantize(cells, folder, tmp_path / "company"))
    for own in cells[:4]:
        key = quantize_key(own)
        quantize([own], folder, tmp_path / "alone", stop_after=2)
        assert not (tmp_path / "alone" / key / "manifest.json").exists()
        assert not failures(quantize([own], folder, tmp_path / "alone"))
        assert content(tmp_path / "alone" / key) == content(tmp_path / "company" / key), own.title


def test_experts_have_none_and_are_counted(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("mixtral", num_hidden_layers=2)
    own = cell(folder, GPTAQ, bits=3)
    assert not failures(quantize([own], folder, tmp_path))
    for index in range(2):
        block = json.loads((tmp_path / quantize_key(own) / f"block-{index:05}.json").read_text())
        linears = block["report"]["linears"]
        experts = sum("calibration_tokens" in each for each in linears.values())
        assert experts and block["report"]["notes"]["cross_left_out"] == experts


def test_it_is_refused_behind_rotations_of_the_residual_stream(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    method = Method("quarot_gptaq", transform=part("quarot", "transform"), rounding=part("gptaq"))
    own = cell(folder, method)
    (failed,) = failures(quantize([own], folder, tmp_path))
    assert "original basis" in str(failed)
    from harness.config.grid import load_sweep

    runtime = load_sweep(
        None, ["model=demo", "method=rtn", "scheme=w4", "evaluations=[]", "device=cpu"]
    ).runtime
    assert any("original basis" in reason for reason in Checker(runtime).reasons(own))
