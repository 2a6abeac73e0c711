"""LLM.int8(), its weights: error bound, exact maxima, sign symmetry, the restricted range."""

from __future__ import annotations

import pytest
import torch
from evidence import generator, llama_shapes, random_weight
from torch import Tensor

from harness.cell import Scheme, WeightScheme
from harness.errors import MethodError
from harness.methods.llm_int8 import Rounding
from harness.numerics.grids import fit
from harness.numerics.weights import UniformWeight

INT8 = WeightScheme("int", 8, -1, symmetric=True)


def quantize(weight: Tensor) -> UniformWeight:
    quantized = Rounding(Rounding.Settings()).round_layer("q_proj", weight, None, INT8, generator())
    assert isinstance(quantized, UniformWeight)
    return quantized


def test_the_error_is_at_most_half_a_step() -> None:
    weight = random_weight(32, 64).half().float()
    bound = weight.abs().amax(1, keepdim=True) / 254
    assert bool(((quantize(weight).dequantize() - weight).abs() <= bound * (1 + 1e-4)).all())


def test_the_row_maximum_is_exact_in_float16() -> None:
    weight = random_weight(64, 64).half()
    place = weight.abs().float().argmax(1, keepdim=True)
    back = quantize(weight.float()).dequantize().half()
    assert torch.equal(back.gather(1, place), weight.gather(1, place))


def test_it_is_the_symmetric_absolute_maximum_grid_without_its_lowest_code() -> None:
    weight = random_weight(32, 64).half().float()
    quantized = quantize(weight)
    grid = fit(weight, 8, symmetric=True, convention="awq")
    off = quantized.codes.float() - grid.quantize(weight)
    assert float((off != 0).float().mean()) < 1e-3 and int(quantized.codes.min()) >= 1      # ties of w · (1 / s) against w / s


def test_negating_the_matrix_negates_the_result() -> None:
    weight = random_weight(16, 32)
    assert torch.equal(quantize(-weight).dequantize(), -quantize(weight).dequantize())


def test_a_zero_row_stays_zero() -> None:
    weight = random_weight(4, 32)
    weight[1] = 0
    assert bool((quantize(weight).dequantize()[1] == 0).all())


def test_scales_are_float32_and_counted() -> None:
    assert quantize(random_weight(8, 64)).bits_per_weight == 8 + 32 / 64


def test_packing_is_exact() -> None:
    quantized = quantize(random_weight(8, 64))
    assert torch.equal(UniformWeight.unpack(*quantized.pack()).dequantize(), quantized.dequantize())


def test_values_beyond_float16_fail_the_cell() -> None:
    weight = random_weight(4, 32)
    weight[0, 0] = 1e6
    with pytest.raises(MethodError, match="65504"):
        quantize(weight)


def test_check_refuses_other_formats() -> None:
    method, shapes = Rounding(Rounding.Settings()), llama_shapes()
    assert method.check(Scheme("w8", INT8), shapes) == []
    assert len(method.check(Scheme("w4g32", WeightScheme("int", 4, 32)), shapes)) == 3
