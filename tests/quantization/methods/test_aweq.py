"""AWEQ: equal ranges, the function kept, and no mean shift after correction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import FakeBlock, generator, llama_shapes
from small import cell, failures, part, quantize, windows

from harness.core.cell import (
    ActivationScheme,
    Method,
    Scheme,
    WeightScheme,
    baseline_of,
    quantize_key,
)
from harness.quantization.formats.native import Checkpoint
from harness.quantization.inference.load import load
from harness.quantization.methods.aweq import Rounding, Transform
from harness.quantization.numerics.activations import round_dynamic

W3 = Scheme("w3", WeightScheme(bits=3))
W4A4 = Scheme("w4a4", WeightScheme(bits=4), ActivationScheme(bits=4))


def test_both_ranges_become_equal_and_the_function_stays() -> None:
    block = FakeBlock()
    hidden = block.inputs()[0]
    with torch.no_grad():
        before = block.run(hidden)
        Transform(Transform.Settings()).rewrite_block(block, W3, generator())
        after = block.run(hidden)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    block.observe()
    for pair in (pair for pair in block.shapes.pairs if pair.kind == "norm"):
        weights = torch.stack(
            [block.linear(name).weight.detach().abs().amax(0) for name in pair.consumers]
        ).amax(0)
        assert torch.allclose(block.evidence[pair.consumers[0]]["abs_max"], weights, rtol=1e-4)


@pytest.mark.parametrize("scheme", [W3, W4A4], ids=lambda scheme: scheme.name)
def test_no_mean_shift_is_left_in_the_first_linears(scheme: Scheme) -> None:
    """Whose inputs rounding does not change: E[W' x' + b'] = E[W x] to float32's accuracy, per output channel."""
    block = FakeBlock()
    originals = {
        name: block.linear(name).weight.detach().double().clone()
        for name in ("self_attn.q_proj", "self_attn.v_proj")
    }
    weights = Rounding(Rounding.Settings()).round_block(block, scheme, generator())
    x = torch.cat([block.evidence["self_attn.q_proj"]["inputs"]]).double()
    rounded = (
        x if scheme.activation is None else round_dynamic(x.float(), scheme.activation).double()
    )
    for name, weight in originals.items():
        bias = block.linear(name).bias
        assert bias is not None
        shift = (
            (rounded @ weights[name].dequantize().double().T + bias.double() - x @ weight.T)
            .flatten(0, 1)
            .mean(0)
        )
        assert float(shift.abs().max()) < 1e-6 * float((x @ weight.T).abs().max())
        uncorrected = (
            (rounded @ weights[name].dequantize().double().T - x @ weight.T).flatten(0, 1).mean(0)
        )
        assert float(uncorrected.abs().max()) > 1e-4


def test_a_second_correction_adds_nothing() -> None:
    """The rounded weights are on the grid and the shift is gone: rounding the rounded block again leaves its biases."""
    block = FakeBlock()
    method = Rounding(Rounding.Settings(grid="gptq"))
    weights = method.round_block(
        block, replace(W3, weight=replace(W3.weight, scale_dtype="float32")), generator()
    )
    biases = {}
    with torch.no_grad():
        for name, weight in weights.items():
            block.linear(name).weight.copy_(weight.dequantize())
            biases[name] = block.linear(name).bias.detach().clone()
    method.round_block(
        block, replace(W3, weight=replace(W3.weight, scale_dtype="float32")), generator()
    )
    for name, bias in biases.items():
        assert torch.allclose(block.linear(name).bias, bias, atol=1e-4 * float(bias.abs().max())), (
            name
        )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_made_and_own_biases_reach_the_loaded_model(
    family: str, tiny_model: Any, tmp_path: Path
) -> None:
    folder = tiny_model(family)
    outputs = {}
    for name, method in {
        "rtn": Method("rtn", rounding=part("rtn", grid="awq")),
        "aweq": Method("aweq", part("aweq", "transform"), part("aweq")),
    }.items():
        own = cell(folder, method, bits=3)
        assert not failures(quantize([own], folder, tmp_path / "store"))
        checkpoint = tmp_path / "store" / quantize_key(own)
        if name == "aweq":
            assert "mlp.down_proj.bias" in Checkpoint.open(checkpoint).block(0).dense
        with torch.no_grad():
            outputs[name] = load(own, folder, checkpoint)[0](windows()).logits
    with torch.no_grad():
        full = load(baseline_of(own), folder, None)[0](windows()).logits
    shift = {
        name: float((logits - full).flatten(0, 1).mean(0).square().mean())
        for name, logits in outputs.items()
    }
    assert shift["aweq"] < shift["rtn"]


def test_what_cannot_be_corrected_is_refused() -> None:
    shapes = llama_shapes()
    fused = replace(shapes, linears=tuple(replace(each, fused=True) for each in shapes.linears))
    static = Scheme(
        "s", WeightScheme(bits=8), ActivationScheme(granularity="tensor", dynamic=False)
    )
    rounding = Rounding(Rounding.Settings())
    assert (
        "fused" in rounding.check(W3, fused)[0] and "dynamic" in rounding.check(static, shapes)[0]
    )
    assert Transform(Transform.Settings()).check(W3, replace(shapes, pairs=()))
    with pytest.raises(ValueError, match="awq"):
        Rounding.Settings(grid="awk")
