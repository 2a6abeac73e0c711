"""QA-LoRA: the adapter merges exactly into zero points, and its change of the matrix is constant in each group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence import FakeEvidence, correlated_inputs, generator, random_weight
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.core.errors import ConfigError, MethodError
from harness.quantization.numerics.weights import DenseWeight, UniformWeight


def base(
    bits: int = 4, group_size: int = 16, symmetric: bool = False, **settings: Any
) -> UniformWeight:
    gptq = plugins.build("rounding", "gptq", settings)
    scheme = WeightScheme("int", bits, group_size, symmetric)
    found = gptq.round_layer(
        "q", random_weight(24, 64), FakeEvidence(correlated_inputs(64)), scheme, generator()
    )
    assert isinstance(found, UniformWeight)
    return found


def trained(weight: UniformWeight, bias: Tensor | None = None, zero_dtype: str = "float32") -> Any:
    """A linear whose factors are what training might have left."""
    linear = plugins.build("tuning", "qa_lora", {"rank": 8, "zero_dtype": zero_dtype}).linear(
        "q", weight, bias, None
    )
    linear.start(generator())
    with torch.no_grad():
        linear.up.copy_(random_weight(24, 8, seed=3))
    return linear


@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_merged_equals_unmerged(group_size: int, symmetric: bool, act_order: bool) -> None:
    weight, x, bias = (
        base(3, group_size, symmetric, act_order=act_order),
        correlated_inputs(64)[0],
        torch.arange(24.0),
    )
    linear = trained(weight, bias)
    beside, merged = linear(x), nn.functional.linear(x, linear.stored().dequantize(), bias)
    assert torch.allclose(beside, merged, atol=2e-5 * float(beside.detach().abs().max()))
    assert not torch.allclose(beside, nn.functional.linear(x, weight.dequantize(), bias), atol=1e-3)
    assert torch.equal(linear.stored().codes, weight.codes) and torch.equal(
        linear.stored().scale, weight.scale
    )


def test_the_change_is_one_number_per_row_and_group() -> None:
    weight = base()
    change = (trained(weight).stored().dequantize() - weight.dequantize()).reshape(24, 4, 16)
    assert float((change - change[..., :1]).abs().max()) < 1e-6 and float(change.abs().min()) > 0


def test_columns_in_groups_of_one_are_ordinary_lora() -> None:
    scheme = WeightScheme("int", 4, 2)
    weight = plugins.build("rounding", "rtn", {}).round_layer(
        "q", random_weight(24, 64), None, scheme, generator()
    )
    linear, x = trained(weight), correlated_inputs(64)[0]
    wide = linear.down.detach().repeat_interleave(2, dim=1) / 2
    expected = nn.functional.linear(
        x, weight.dequantize() + linear.scaling * linear.up.detach() @ wide
    )
    assert torch.allclose(linear(x), expected, atol=1e-5 * float(expected.abs().max()))


def test_zero_points_cost_what_they_are_stored_in() -> None:
    weight = base()
    half, full = trained(weight, zero_dtype="float16").stored(), trained(weight).stored()
    assert half.bits_per_weight == pytest.approx(
        4 + 32 / 16
    ) and full.bits_per_weight == pytest.approx(4 + 48 / 16)
    step = float(
        (half.dequantize() - full.dequantize())
        .abs()
        .div(weight.scale.repeat_interleave(16, 1))
        .max()
    )
    assert 0 < step <= 2**-8, "half a spacing of float16 below 16, of a step of the grid"
    again = UniformWeight.unpack(*half.pack())
    assert torch.equal(again.dequantize(), half.dequantize())


def test_untrained_it_is_the_base() -> None:
    weight, x = base(), correlated_inputs(64)[0]
    linear = plugins.build("tuning", "qa_lora", {"rank": 8}).linear("q", weight, None, None)
    linear.start(generator())
    assert torch.equal(linear(x), nn.functional.linear(x, weight.dequantize()))
    assert torch.equal(linear.stored().dequantize(), weight.dequantize())
    assert sum(parameter.numel() for parameter in linear.parameters()) == 8 * (24 + 4)


def test_what_cannot_be_merged_is_said() -> None:
    with pytest.raises(MethodError, match="rounding=gptq"):
        plugins.build("tuning", "qa_lora", {}).linear(
            "q", DenseWeight(random_weight(4, 8)), None, None
        )
    linear = trained(base(), zero_dtype="float16")
    with torch.no_grad():
        linear.up.mul_(1e6)
    with pytest.raises(MethodError, match="zero_dtype=float32"):
        linear.stored()
    with pytest.raises(ConfigError):
        plugins.build("tuning", "qa_lora", {"zero_dtype": "int4"})
