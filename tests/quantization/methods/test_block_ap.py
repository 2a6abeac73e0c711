"""Block-AP: starts at round to nearest on the plain range, follows the published gradients, and lowers the block's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import FakeBlock, generator, llama_shapes, random_weight
from small import cell, content, failures, part, quantize
from torch import Tensor

from harness.core import plugins
from harness.core.cell import (
    ActivationScheme,
    Calibration,
    Method,
    Scheme,
    WeightScheme,
    quantize_key,
)
from harness.core.errors import ConfigError, MethodError
from harness.data.demo.tiny import build
from harness.quantization.methods.block_ap import _Trained
from harness.quantization.methods.blockwise import GroupedMatrix, block_loss
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight


def w(bits: int, group_size: int = 16, scale_dtype: Any = "float32") -> WeightScheme:
    return WeightScheme("int", bits, group_size, False, scale_dtype)


def rounded(
    block: FakeBlock, scheme: WeightScheme, activation: ActivationScheme | None = None, **own: Any
) -> dict[str, QuantizedWeight]:
    method = plugins.build("rounding", "block_ap", own)
    return method.round_block(block, Scheme("test", scheme, activation), generator())


def error(block: FakeBlock, weights: dict[str, QuantizedWeight]) -> float:
    values = {name: weight.dequantize() for name, weight in weights.items()}
    with torch.no_grad():
        return sum(float(block_loss(block, i, values)) for i in range(len(block.inputs()))) / len(
            block.inputs()
        )


@pytest.mark.parametrize("group_size", [16, -1])
def test_untrained_it_is_round_to_nearest_on_the_plain_range(group_size: int) -> None:
    block = FakeBlock()
    for name, found in rounded(block, w(3, group_size), epochs=0).items():
        weight = block.linear(name).weight.detach()
        groups = weight.reshape(weight.shape[0], -1, 16 if group_size == 16 else weight.shape[1])
        lo, hi = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (hi - lo) / 7
        zero = torch.round(-lo / scale).clamp(0, 7)
        codes = (torch.round(groups / scale) + zero).clamp(0, 7)
        expected = (scale * (codes - zero)).reshape(weight.shape)
        assert torch.equal(found.dequantize(), expected)


def test_gradients_are_the_published_ones() -> None:
    """∂w = inside; ∂s = (q - z) - inside w / s; ∂z = s (inside - 1)."""
    groups = random_weight(4, 32, seed=2).reshape(4, 2, 16)
    matrix, upstream = (
        _Trained(GroupedMatrix(groups, w(3))),
        torch.randn(4, 32, generator=generator(6)),
    )
    with torch.no_grad():
        matrix.scale.mul_(0.7)  # some codes are clamped
        matrix.zero.add_(0.2)  # rounded away
    matrix.nearest().backward(upstream)
    s, z = matrix.scale.detach(), torch.round(matrix.zero.detach()).clamp(0, 7)
    raw = torch.round(groups / s) + z
    q, g = raw.clamp(0, 7), upstream.reshape(groups.shape)
    inside = (q == raw).float()
    assert 0 < float(inside.mean()) < 1
    assert torch.allclose(matrix.weight.grad, g * inside, atol=1e-6)
    expected = (g * ((q - z) - inside * groups / s)).sum(-1, keepdim=True)
    assert torch.allclose(matrix.scale.grad, expected, atol=1e-5)
    expected = (g * s * (inside - 1)).sum(-1, keepdim=True)
    assert torch.allclose(matrix.zero.grad, expected, atol=1e-6)


def test_zero_points_beyond_the_codes_still_learn() -> None:
    groups = random_weight(4, 16).abs().reshape(4, 1, 16) + 1  # far from 0: zero points are clamped
    matrix = _Trained(GroupedMatrix(groups, w(3)))
    assert bool((matrix.zero < 0).all())
    matrix.nearest().sum().backward()
    assert matrix.zero.grad is not None and bool((matrix.zero.grad != 0).all())
    with torch.no_grad():
        matrix.scale.fill_(1e-9)
        assert float(matrix.grid()[0].min()) == pytest.approx(1e-4)


@pytest.mark.parametrize("bits", [2, 3])
def test_training_lowers_the_loss_and_the_block_error(bits: int) -> None:
    block, rates = FakeBlock(), {"weight_rate": 0.001, "scale_rate": 0.001}
    start = error(block, rounded(block, w(bits), epochs=0))
    found = rounded(block, w(bits), epochs=15, batch=4, **rates)
    notes = block.notes["block_ap"]
    assert notes["loss"][0] == pytest.approx(start, rel=1e-4)
    assert len(notes["loss"]) == 15 and notes["loss"][-1] < 0.9 * start
    assert error(block, found) < 0.9 * start and 0 < notes["codes_changed"] < 1
    for weight in found.values():
        assert isinstance(weight, UniformWeight) and weight.zero is not None
        assert bool(((weight.zero >= 0) & (weight.zero < 2**bits)).all())


def test_what_is_not_trained_stays() -> None:
    def values(**own: Any) -> dict[str, Tensor]:
        found = rounded(FakeBlock(), w(2), epochs=2, **own)
        return {name: weight.dequantize() for name, weight in found.items()}

    start = values(train_weights=False, train_scales=False, train_zeros=False)
    still = values(weight_rate=0.0, scale_rate=0.0)
    assert all(torch.equal(start[name], still[name]) for name in start)
    scales = rounded(FakeBlock(), w(2), epochs=2, train_weights=False, train_zeros=False)
    before = rounded(FakeBlock(), w(2), epochs=0)
    for name, weight in scales.items():
        first = before[name]
        assert isinstance(weight, UniformWeight) and isinstance(first, UniformWeight)
        assert not torch.equal(weight.scale, first.scale)
        assert torch.equal(weight.zero, first.zero)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_trained_as_they_are_stored(dtype: str) -> None:
    target = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    for found in rounded(FakeBlock(), w(3, scale_dtype=dtype), epochs=1).values():
        assert isinstance(found, UniformWeight)
        assert torch.equal(found.scale.to(target).float(), found.scale)


def test_refusals_and_broken_numbers() -> None:
    shapes = llama_shapes()
    method = plugins.build("rounding", "block_ap", {})
    (reason,) = method.check(Scheme("s", WeightScheme("int", 4, 16, True)), shapes)
    assert "trains zero points; use symmetric=false" in reason
    (reason,) = method.check(Scheme("s", w(4), ActivationScheme(dynamic=False)), shapes)
    assert "static activation scales" in reason
    for settings, message in (
        ({"epochs": -1}, "epochs is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"weight_rate": -1.0}, "weight_rate is -1"),
        ({"min_rate_factor": 0.5}, "min_rate_factor is 0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            plugins.build("rounding", "block_ap", settings)
    block = FakeBlock(index=2)

    def poison(of: FakeBlock) -> None:
        of.calibration[1, 2, 3] = torch.nan

    block.change(poison)
    with pytest.raises(MethodError, match="block 2: the loss of epoch 1 is nan"):
        rounded(block, w(3), epochs=1)


def test_little_calibration_data_is_worth_a_warning(tmp_path: Path) -> None:
    method, few = plugins.build("rounding", "block_ap", {}), cell(tmp_path, Method("block_ap"))
    (warning,) = method.warnings(few, llama_shapes())
    assert "240 tokens (tiny)" in warning and "8.4 million" in warning
    enough = Calibration("c4", "demo", samples=4096, length=2048)
    assert not method.warnings(
        cell(tmp_path, Method("block_ap"), calibration=enough), llama_shapes()
    )


def test_a_cell_alone_has_the_bytes_that_it_has_in_company(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("llama", folder, num_hidden_layers=2)
    method = Method("block_ap", rounding=part("block_ap", epochs=1))
    own, other = cell(folder, method, bits=3), cell(folder, method, bits=2)
    assert not failures(quantize([own], folder, tmp_path / "alone"))
    assert not failures(quantize([other, own], folder, tmp_path / "company"))
    key = quantize_key(own)
    assert content(tmp_path / "alone" / key) == content(tmp_path / "company" / key)
