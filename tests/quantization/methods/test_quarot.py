"""QuaRot: the function of the whole model stays, in every family; outliers go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import FakeBlock, generator, llama_shapes
from small import cell, failures, part, quantize, windows

from harness.core.cell import (
    ActivationScheme,
    KVScheme,
    Method,
    Model,
    Scheme,
    WeightScheme,
    baseline_of,
    quantize_key,
)
from harness.data import model_folders
from harness.quantization.inference.load import load
from harness.quantization.methods.quarot import Transform
from harness.quantization.numerics.inputs import of_module

SCHEME = Scheme("w4", WeightScheme(bits=4))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_rotated_unrounded_model_keeps_its_logits(
    family: str, online: bool, tiny_model: Any, tmp_path: Path
) -> None:
    """Grouped queries, biases and tied heads among them; through pass, checkpoint and loading."""
    folder = tiny_model(family)
    rotated = cell(folder, Method("rotated", transform=part("quarot", "transform", online=online)))
    assert not failures(quantize([rotated], folder, tmp_path / "store"))
    full, _ = load(baseline_of(rotated), folder, None)
    found, _ = load(rotated, folder, tmp_path / "store" / quantize_key(rotated))
    tokens = windows(2)
    with torch.no_grad():
        assert difference(found(tokens).logits, full(tokens).logits) < 1e-4


def test_gptq_sees_rotated_inputs(tiny_model: Any, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    method = Method("quarot_gptq", part("quarot", "transform"), part("gptq"))
    one = cell(folder, method, bits=8)
    assert not failures(quantize([one], folder, tmp_path / "store"))
    full, _ = load(baseline_of(one), folder, None)
    found, _ = load(one, folder, tmp_path / "store" / quantize_key(one))
    with torch.no_grad():
        assert difference(found(windows(2)).logits, full(windows(2)).logits) < 0.05


def test_planted_outliers_of_norms_vanish_and_others_are_spread() -> None:
    plain, planted = FakeBlock(), FakeBlock()
    with torch.no_grad():
        planted.module.get_submodule("input_layernorm").weight[5] *= 256  # type: ignore[index, operator]
        for name in "qkv":
            planted.linear(f"self_attn.{name}_proj").weight[:, 5] /= 256
        # of down's input: only a rotation spreads it
        planted.linear("mlp.up_proj").weight[7] *= 256
        planted.linear("mlp.down_proj").weight[:, 7] /= 256
    for block in (plain, planted):
        Transform(Transform.Settings()).rewrite_block(block, SCHEME, generator())
    for name in "qkv":
        one, other = (block.linear(f"self_attn.{name}_proj").weight for block in (plain, planted))
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    x = torch.zeros(1, 64)
    x[0, 7] = 256.0
    assert float(of_module_applied(planted, "mlp.down_proj", x).abs().max()) == pytest.approx(
        256 / 8
    )


def of_module_applied(block: FakeBlock, name: str, x: torch.Tensor) -> torch.Tensor:
    from harness.quantization.numerics.inputs import apply

    return apply(x, of_module(block.linear(name)))


def test_rounding_to_4_bits_gains_by_it(tmp_path: Path) -> None:
    """The demo model with activation outliers, W4A4: plain rounding destroys it, rotated it is as good as the model without."""
    model = Model("demo", "demo:activation_outliers", digest="x")
    folder = model_folders.model_folder(model)
    scheme = Scheme("w4a4", WeightScheme(bits=4, symmetric=True), ActivationScheme(bits=4))
    losses = {}
    tokens = windows(4, 64, 200)
    for name in ("rtn", "quarot"):
        transform = part("quarot", "transform") if name == "quarot" else None
        method = Method(name, transform, part("rtn", grid="awq"))
        own = dataclasses.replace(cell(folder, method), model=model, scheme=scheme)
        assert not failures(quantize([own], folder, tmp_path))
        full, _ = load(baseline_of(own), folder, None)
        found, _ = load(own, folder, tmp_path / quantize_key(own))
        with torch.no_grad():
            expected, got = (each(tokens).logits.log_softmax(-1) for each in (full, found))
        losses[name] = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert losses["quarot"] < 0.5 * losses["rtn"], losses


def test_rotated_keys_give_the_same_scores_and_round_better(tiny_model: Any) -> None:
    folder = tiny_model("llama")
    base = cell(folder, Method("none"))
    kv = KVScheme(bits=16, group_size=16, residual=0, key_axis="token", value_axis="token")
    with torch.no_grad():
        full = load(baseline_of(base), folder, None)[0](windows(2)).logits
        for hadamard in (False, True):
            own = dataclasses.replace(
                baseline_of(base),
                scheme=Scheme("kv", kv=dataclasses.replace(kv, hadamard=hadamard)),
            )
            assert difference(load(own, folder, None)[0](windows(2)).logits, full) < 2e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rotations": False}, "does not allow rotations"),
        ({"experts": 8}, "experts"),
        ({"hidden_size": 30}, "no Hadamard matrix"),
    ],
)
def test_what_cannot_be_turned_is_refused_in_the_plan(change: dict[str, Any], reason: str) -> None:
    shapes = dataclasses.replace(llama_shapes(), **change)
    (found,) = Transform(Transform.Settings()).check(SCHEME, shapes)
    assert reason in found
