"""Block Hadamard and MR-GPTQ: the function and the row norms stay, GPTQ gains by it, linears of one input keep one Hessian."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import (
    FakeBlock,
    FakeEvidence,
    correlated_inputs,
    generator,
    layer_error,
    llama_shapes,
    random_weight,
)
from small import cell, content, failures, part, quantize, windows
from torch import Tensor

from harness.core.cell import Cell, Method, Scheme, WeightScheme, baseline_of, quantize_key
from harness.core.number_formats import FORMATS
from harness.quantization.inference.load import load
from harness.quantization.methods import gptq
from harness.quantization.methods.block_hadamard import Transform
from harness.quantization.numerics import hadamard
from harness.quantization.pipeline.walk import Walk

W4 = Scheme("w4", WeightScheme(bits=4))
MR_GPTQ = Method(
    "mr_gptq", part("block_hadamard", "transform", size=16), part("gptq", static_groups=True)
)


def of_format(name: str) -> WeightScheme:
    fixed = FORMATS[name]
    return WeightScheme(name, 4, fixed.block or 16, scale_dtype=fixed.scale_dtype or "float32")


def rotated(x: Tensor, size: int) -> Tensor:
    return hadamard.transform(x.unflatten(-1, (-1, size))).flatten(-2)


def fp4(folder: Path, name: str, method: Method = MR_GPTQ) -> Cell:
    return dataclasses.replace(cell(folder, method), scheme=Scheme(name, of_format(name)))


def test_twice_is_the_identity_and_norms_of_rows_stay() -> None:
    method, block = Transform(Transform.Settings(size=16)), FakeBlock()
    before = {s.name: block.linear(s.name).weight.detach().clone() for s in block.shapes.linears}
    method.rewrite_block(block, W4, generator())
    for name, weight in before.items():
        now = block.linear(name).weight.detach()
        assert float((now - weight).abs().max()) > 0.01
        torch.testing.assert_close(now.norm(dim=1), weight.norm(dim=1), rtol=1e-6, atol=0)
        torch.testing.assert_close(rotated(now, 16), weight, rtol=1e-5, atol=1e-7)


def test_one_outlying_channel_is_spread_over_its_block_and_no_further() -> None:
    x = torch.zeros(1, 64)
    x[0, 20] = 8.0
    spread = rotated(x, 16)
    assert torch.equal(spread.abs()[0, 16:32], torch.full((16,), 2.0))
    assert not spread[0, :16].any() and not spread[0, 32:].any()


@pytest.mark.parametrize("size", [0, 1, 8, 48, 256])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="16, 32, 64, 128"):
        Transform.Settings(size=size)


def test_what_cannot_be_rotated_is_refused_in_the_plan() -> None:
    shapes = llama_shapes()
    (reason,) = Transform(Transform.Settings()).check(W4, shapes)
    assert "self_attn.q_proj (32)" in reason and reason.endswith("transform.size=32")
    assert Transform(Transform.Settings(size=32)).check(W4, shapes) == []
    odd = [dataclasses.replace(linear, in_features=36, fused=True) for linear in shapes.linears]
    undivided, fused = Transform(Transform.Settings(size=32)).check(
        W4, dataclasses.replace(shapes, linears=tuple(odd))
    )
    assert "no size of 16, 32, 64, 128 divides" in undivided and "fused" in fused


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("size", [16, 32, 128])
def test_gptq_gains_by_the_rotation_where_channels_are_correlated(name: str, size: int) -> None:
    """arXiv 2509.23202: rotations help GPTQ in FP4, more than they help round to nearest."""
    weight, inputs = random_weight(64, 256), correlated_inputs(256)
    errors = {}
    for k in (1, size):
        turned, x = (t if k == 1 else rotated(t, k) for t in (weight, inputs))
        method = gptq.Rounding(gptq.Rounding.Settings(static_groups=True))
        result = method.round_layer("q", turned, FakeEvidence(x), of_format(name), generator())
        errors[k] = layer_error(turned, result.dequantize(), x)
    assert errors[size] < 0.7 * errors[1]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_unrounded_model_keeps_its_logits(family: str, tiny_model: Any, tmp_path: Path) -> None:
    folder = tiny_model(family)
    method = Method("rotated", transform=part("block_hadamard", "transform", size=32))
    one = cell(folder, method)
    assert not failures(quantize([one], folder, tmp_path))
    full, _ = load(baseline_of(one), folder, None)
    found, _ = load(one, folder, tmp_path / quantize_key(one))
    with torch.no_grad():
        expected = full(windows(2)).logits
        assert (
            float((found(windows(2)).logits - expected).abs().max() / expected.abs().max()) < 1e-5
        )


def test_cells_in_company_and_resumed_have_the_bytes_of_cells_alone(
    tiny_model: Any, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    pair = [fp4(folder, "mxfp4"), fp4(folder, "nvfp4")]
    assert not failures(quantize(pair, folder, tmp_path / "company"))
    quantize(pair[:1], folder, tmp_path / "alone", stop_after=1)
    assert not failures(quantize(pair[:1], folder, tmp_path / "alone"))
    key = quantize_key(pair[0])
    assert content(tmp_path / "alone" / key) == content(tmp_path / "company" / key)
    manifest = content(tmp_path / "alone" / key)["manifest.json"]
    plain = fp4(folder, "mxfp4", Method("gptq", rounding=part("gptq", static_groups=True)))
    quantize([plain], folder, tmp_path / "plain")
    without = content(tmp_path / "plain" / quantize_key(plain))["manifest.json"]
    linears = len(manifest["linears"])
    assert manifest["unquantized_bits"] - without["unquantized_bits"] == 96 * linears
    assert manifest["bits_per_weight"] == without["bits_per_weight"]


def test_linears_with_equal_input_transforms_share_their_statistics(tiny_model: Any) -> None:
    folder = tiny_model("llama")
    walk = Walk(folder, "float32", "cpu")
    plain = {location.name: location.group for location in walk.blocks.locations(0)}
    tensors = walk.blocks.tensors(0)
    rows = {name: torch.tensor([[4, 16, 1]], dtype=torch.int32) for name in plain}
    rows["self_attn.v_proj"] = torch.tensor([[2, 32, 1]], dtype=torch.int32)
    held = {f"{name}.input_hadamard": value for name, value in rows.items()}
    groups = {x.name: x.group for x in walk._locations(0, {**tensors, **held})}
    assert groups["self_attn.q_proj"] == groups["self_attn.k_proj"] != groups["self_attn.v_proj"]
    assert groups["mlp.gate_proj"] == groups["mlp.up_proj"] != groups["mlp.down_proj"]
    stages = {x.name: x.stage or x.group for x in walk._locations(0, {**tensors, **held})}
    assert stages == plain, "true-sequential rounds in the same order"
