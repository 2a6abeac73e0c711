"""PEQA: rounding at step 0, the same integers ever after, and scales that do what scales do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import FakeEvidence, correlated_inputs, generator, random_weight
from small import cell, part, quantize, windows
from torch import Tensor

from harness.core import plugins
from harness.core.cell import Method, WeightScheme, quantize_key, untuned
from harness.core.errors import ConfigError, MethodError
from harness.core.events import Quantized
from harness.quantization.formats.native import Checkpoint, CheckpointWriter
from harness.quantization.numerics.weights import DenseWeight, QuantizedWeight, UniformWeight
from harness.quantization.pipeline.tuning import run_tuning


def rtn(
    weight: Tensor, bits: int = 4, group_size: int = -1, symmetric: bool = False
) -> UniformWeight:
    scheme = WeightScheme("int", bits, group_size, symmetric)
    return plugins.build("rounding", "rtn", {}).round_layer("q", weight, None, scheme, generator())


def linear_of(weight: QuantizedWeight, bias: Tensor | None = None, **settings: Any) -> Any:
    return plugins.build("tuning", "peqa", settings).linear("q", weight, bias, None)


@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_at_step_zero_it_is_round_to_nearest(group_size: int, symmetric: bool) -> None:
    base = rtn(random_weight(24, 64), 3, group_size, symmetric)
    linear = linear_of(base)
    assert torch.equal(linear.weight(), base.dequantize()) and torch.equal(
        linear.stored().dequantize(), base.dequantize()
    )
    x, bias = correlated_inputs(64)[0], torch.arange(24.0)
    assert torch.equal(
        linear_of(base, bias)(x), torch.nn.functional.linear(x, base.dequantize(), bias)
    )


def test_one_parameter_per_row_or_group() -> None:
    weight = random_weight(24, 64)
    assert [
        sum(p.numel() for p in linear_of(rtn(weight, 4, size)).parameters()) for size in (-1, 16)
    ] == [24, 24 * 4]


def test_a_scale_scales_its_output() -> None:
    base = rtn(random_weight(24, 64))
    linear, x = linear_of(base), correlated_inputs(64)[0]
    before = linear(x)
    with torch.no_grad():
        linear.change[5] = base.scale[5]  # s0 + Δs = 2 s0
        linear.change[7] = -2 * base.scale[7]
    factor = torch.ones(24)
    factor[5], factor[7] = 2, -1
    assert torch.equal(linear(x), before * factor)
    assert torch.equal(
        QuantizedWeight.kinds["uniform"].unpack(*linear.stored().pack()).dequantize(),
        linear.stored().dequantize(),
    )


def test_the_gradient_is_that_of_the_product() -> None:
    base = rtn(random_weight(8, 32), 4, 16)
    linear, target = linear_of(base), random_weight(8, 32, seed=1)
    loss = (linear.weight() - target).square().sum()
    (gradient,) = torch.autograd.grad(loss, linear.change)
    groups = base.codes.reshape(8, 2, 16).float() - base.zero.reshape(8, 2, 1)  # type: ignore[union-attr]
    expected = (2 * (base.dequantize() - target).reshape(8, 2, 16) * groups).sum(-1)
    assert torch.allclose(gradient, expected, rtol=1e-4)


def test_groups_out_of_order_are_trained_too() -> None:
    weight = random_weight(16, 64)
    scheme = WeightScheme("int", 4, 16)
    gptq = plugins.build("rounding", "gptq", {"act_order": True})
    base = gptq.round_layer("q", weight, FakeEvidence(correlated_inputs(64)), scheme, generator())
    assert base.column_group is not None
    assert torch.equal(linear_of(base).stored().dequantize(), base.dequantize())


@pytest.mark.parametrize("group_size", [-1, 32])
def test_a_tuned_model_keeps_its_integers(
    tiny_model: Callable[..., Path], tmp_path: Path, group_size: int
) -> None:
    folder = tiny_model("llama")
    method = Method(
        "peqa", rounding=part("rtn"), tuning=part("peqa", "tuning", epochs=4, rate=0.002)
    )
    c = cell(folder, method, 3, group_size)
    quantize([untuned(c)], folder, tmp_path)
    base = tmp_path / quantize_key(untuned(c))
    writer = CheckpointWriter(tmp_path / quantize_key(c), {})
    *_, last = run_tuning(c, folder, base, windows(4, 24), writer)
    assert isinstance(last, Quantized)
    notes = last.record["tuning"]
    assert notes["loss"][-1] < notes["loss"][0] and notes["negative_scales"] >= 0
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / quantize_key(c))
    trained = 0
    for index in range(3):
        for name, weight in before.block(index).weights.items():
            tuned = after.block(index).weights[name]
            assert isinstance(weight, UniformWeight) and isinstance(tuned, UniformWeight)
            assert torch.equal(tuned.codes, weight.codes) and torch.equal(tuned.zero, weight.zero)  # type: ignore[arg-type]
            assert not torch.equal(tuned.scale, weight.scale)
            trained += weight.scale.numel()
    assert notes["trained_parameters"] == trained
    assert after.manifest["bits_per_weight"] > before.manifest["bits_per_weight"], (
        "scales are float32 now, and counted"
    )


def test_other_layouts_are_refused() -> None:
    with pytest.raises(MethodError, match="rounding=rtn"):
        linear_of(DenseWeight(random_weight(4, 8)))


@pytest.mark.parametrize("settings", [{"epochs": -1}, {"rate": 0.0}, {"scale_dtype": "float8"}])
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plugins.build("tuning", "peqa", settings)
