"""FineQuant-style rounding: limits of alpha, the published intuition on outliers, invariances of the choice."""

from __future__ import annotations

import pytest
import torch
from evidence import generator, llama_shapes, random_weight
from torch import Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.quantization.methods.finequant import Rounding, choose_group_size
from harness.quantization.numerics.grids import fit
from harness.quantization.numerics.weights import UniformWeight


def quantize(weight: Tensor, bits: int = 4, **settings: float) -> UniformWeight:
    scheme = WeightScheme("int", bits, -1, symmetric=True)
    quantized = Rounding(Rounding.Settings(**settings)).round_layer(
        "q_proj", weight, None, scheme, generator()
    )  # type: ignore[arg-type]
    assert isinstance(quantized, UniformWeight)
    return quantized


def nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    grouped = weight.reshape(weight.shape[0], -1, group_size)
    return fit(grouped, bits, True, "awq", "float16").nearest(grouped).reshape(weight.shape)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_alpha_one_is_round_to_nearest_per_channel(bits: int) -> None:
    weight = random_weight(16, 256)
    assert torch.equal(quantize(weight, bits, alpha=1.0).dequantize(), nearest(weight, bits, 256))


def test_alpha_zero_is_round_to_nearest_in_the_finest_groups() -> None:
    weight = random_weight(16, 256)
    quantized = quantize(weight, alpha=0.0)
    assert quantized.group_size == 64
    assert torch.equal(quantized.dequantize(), nearest(weight, 4, 64))


@pytest.mark.parametrize(("outlier", "expected"), [(0, 4096), (50, 256), (500, 64)])
def test_outliers_refine_the_groups(outlier: float, expected: int) -> None:
    weight = torch.randn(2048, 4096, generator=generator())
    weight[:41, 7] += outlier  # one outlier in 2 % of the rows
    assert choose_group_size(weight, 0.3, 64) == expected


def test_the_choice_ignores_scale_and_order_of_rows() -> None:
    weight = torch.randn(64, 1024, generator=generator())
    weight[5, 3] = 60
    size = choose_group_size(weight, 0.3, 64)
    assert size < 1024
    assert choose_group_size(weight * 37.5, 0.3, 64) == size
    assert choose_group_size(weight[torch.randperm(64, generator=generator(1))], 0.3, 64) == size


def test_halving_stops_at_odd_sizes_and_at_zero_rows() -> None:
    # 344 = 8 · 43: 172, 86, then 43 < 64
    assert choose_group_size(torch.randn(8, 344, generator=generator()), 0.0, 64) == 86
    assert choose_group_size(torch.zeros(8, 512), 0.0, 64) == 512


def test_packing_is_exact_and_the_lowest_code_unused() -> None:
    quantized = quantize(random_weight(16, 256))
    assert int(quantized.codes.min()) >= 1
    assert torch.equal(UniformWeight.unpack(*quantized.pack()).dequantize(), quantized.dequantize())


def test_check_refuses_zero_points_widths_and_a_given_group_size() -> None:
    method, shapes = Rounding(Rounding.Settings()), llama_shapes()
    assert method.check(Scheme("w4s", WeightScheme("int", 4, -1, symmetric=True)), shapes) == []
    assert len(method.check(Scheme("w5g32", WeightScheme("int", 5, 32)), shapes)) == 3
