"""HQQ: its limits against other grids, what the optimization promises, both axes."""

from __future__ import annotations

import pytest
import torch
from evidence import generator, llama_shapes, random_weight
from torch import Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.quantization.methods.hqq import AcrossRowsWeight, Rounding
from harness.quantization.numerics.grids import fit
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight


def quantize(
    weight: Tensor, bits: int = 4, group_size: int = 32, dtype: str = "float32", **settings: object
) -> QuantizedWeight:
    scheme = WeightScheme("int", bits, group_size, scale_dtype=dtype)
    return Rounding(Rounding.Settings(**settings)).round_layer(
        "q_proj", weight, None, scheme, generator()
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_optimization_it_is_omniquants_grid(bits: int) -> None:
    weight = random_weight(16, 128)
    grouped = weight.reshape(16, -1, 32)
    expected = fit(grouped, bits, False, "omniquant").nearest(grouped).reshape(16, 128)
    back = quantize(weight, bits, iterations=0, round_initial=True).dequantize()
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_optimizing_lowers_the_mean_absolute_error(bits: int, axis: int) -> None:
    weight = random_weight(64, 128)
    plain = (quantize(weight, bits, iterations=0, axis=axis).dequantize() - weight).abs().mean()
    optimized = (quantize(weight, bits, axis=axis).dequantize() - weight).abs().mean()
    assert float(optimized) <= float(plain) * (1 + 1e-3)


def test_weights_on_a_grid_are_exact_and_keep_their_zero() -> None:
    codes = torch.randint(0, 16, (8, 4, 32), generator=generator())
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (0.25 * (codes.float() - 6)).reshape(8, 128)
    quantized = quantize(weight)
    assert isinstance(quantized, UniformWeight) and quantized.zero is not None
    assert torch.equal(quantized.dequantize(), weight) and bool((quantized.zero == 6).all())


def test_shifting_a_group_by_whole_steps_changes_its_zero_only() -> None:
    codes = torch.randint(0, 16, (8, 4, 32), generator=generator())
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (0.25 * (codes.float() - 6)).reshape(8, 128)
    one, two = quantize(weight), quantize(weight + 3 * 0.25)
    assert (
        isinstance(one, UniformWeight)
        and isinstance(two, UniformWeight)
        and one.zero is not None
        and two.zero is not None
    )
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale)
    torch.testing.assert_close(two.zero, one.zero - 3)


def test_constant_and_zero_groups_survive() -> None:
    weight = random_weight(4, 64)
    weight[0] = 0
    weight[1, :32] = 0.75
    back = quantize(weight).dequantize()
    assert bool((back[0] == 0).all())
    torch.testing.assert_close(back[1, :32], weight[1, :32])


def test_axis_zero_groups_across_rows() -> None:
    weight = random_weight(64, 16)
    weight[:, 3] *= 50  # one column apart: its groups hold it alone
    quantized = quantize(weight, axis=0)
    assert isinstance(quantized, AcrossRowsWeight) and quantized.shape == (64, 16)
    others = [column for column in range(16) if column != 3]
    error = (quantized.dequantize() - weight).abs()[:, others]
    assert float(error.max()) < 0.05


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [3, 4])
def test_packing_is_exact(bits: int, axis: int) -> None:
    quantized = quantize(random_weight(32, 64), bits, dtype="float16", axis=axis)
    assert torch.equal(
        type(quantized).unpack(*quantized.pack()).dequantize(), quantized.dequantize()
    )


def test_bits_per_weight() -> None:
    assert quantize(random_weight(64, 128), 4, 64, "float16").bits_per_weight == 4.5


def test_check_lists_what_cannot_run() -> None:
    shapes = llama_shapes(width=96, inner=160)
    assert (
        Rounding(Rounding.Settings()).check(Scheme("w4g32", WeightScheme("int", 4, 32)), shapes)
        == []
    )
    reasons = Rounding(Rounding.Settings(axis=0)).check(
        Scheme("w4g64", WeightScheme("int", 9, 64, symmetric=True)), shapes
    )
    assert len(reasons) == 4 and "does not divide" in reasons[1]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="axis is 2"):
        Rounding.Settings(axis=2)
