"""LLM.int8(), its weights: error bound, exact maxima, sign symmetry, the restricted range."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import generator, llama_shapes, random_weight
from small import cell, failures, part, windows
from small import quantize as quantize_cells
from torch import Tensor

from harness.core.cell import (
    ActivationScheme,
    Method,
    Scheme,
    WeightScheme,
    baseline_of,
    quantize_key,
)
from harness.core.errors import MethodError
from harness.quantization.inference.activations import ActivationQuantizer
from harness.quantization.inference.linear import QuantizedLinear
from harness.quantization.inference.load import load
from harness.quantization.methods.llm_int8 import Rounding
from harness.quantization.numerics.grids import fit
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

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
    # ties of w · (1 / s) against w / s
    assert float((off != 0).float().mean()) < 1e-3 and int(quantized.codes.min()) >= 1


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


SIXTEEN = Rounding.Settings(outlier_weights="fp16")
APART = Scheme("apart", INT8, ActivationScheme(outlier_threshold=6.0))


def linear(weight: QuantizedWeight, threshold: float, mode: str = "dense") -> QuantizedLinear:
    quantizer = ActivationQuantizer(ActivationScheme(outlier_threshold=threshold))
    return QuantizedLinear(weight, None, torch.float32, torch.device("cpu"), quantizer, mode)


def test_float16_outlier_weights_multiply_the_outliers_and_nothing_else() -> None:
    """t = tiny is the float16 linear, t above every input is plain W8A8, between them each channel has its own matrix."""
    weight, x = random_weight(24, 32), torch.randn(2, 9, 32, generator=generator(1))
    x[:, :, 5] *= 40
    kept = Rounding(SIXTEEN).round_layer("q_proj", weight, None, INT8, generator())
    plain = quantize(weight)
    assert torch.equal(kept.dequantize(), plain.dequantize()) and kept.bits_per_weight == 16
    half = weight.half().float()
    torch.testing.assert_close(linear(kept, 1e-9)(x), x @ half.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear(kept, 1e9)(x), linear(plain, 1e9)(x))
    between, rounded = (
        linear(kept, 10.0)(x),
        ActivationQuantizer(ActivationScheme(outlier_threshold=10.0))(x),
    )
    mixed = plain.dequantize().clone()
    mixed[:, 5] = half[:, 5]
    torch.testing.assert_close(between, rounded @ mixed.T, rtol=1e-5, atol=1e-4)
    assert torch.equal(linear(kept, 10.0, "packed")(x), between)


def test_it_survives_a_checkpoint(tiny_model: Any, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    cells = [
        dataclasses.replace(
            cell(folder, Method(name, rounding=part("llm_int8", outlier_weights=name))),
            scheme=scheme,
        )
        for name in ("int8", "fp16")
        for scheme in [
            dataclasses.replace(APART, activation=ActivationScheme(outlier_threshold=1e-9))
        ]
    ]
    assert not failures(quantize_cells(cells, folder, tmp_path))
    full, _ = load(baseline_of(cells[0]), folder, None)
    errors = []
    with torch.no_grad():
        for one in cells:
            model, _ = load(one, folder, tmp_path / quantize_key(one))
            errors.append(float((model(windows(2)).logits - full(windows(2)).logits).abs().max()))
    assert errors[1] < 0.1 * errors[0], errors


def test_float16_outlier_weights_need_outliers_and_linears_of_their_own() -> None:
    shapes = llama_shapes()
    fused = dataclasses.replace(
        shapes, linears=tuple(dataclasses.replace(each, fused=True) for each in shapes.linears)
    )
    assert not Rounding(SIXTEEN).check(APART, shapes)
    (reason,) = Rounding(SIXTEEN).check(
        dataclasses.replace(APART, activation=ActivationScheme()), shapes
    )
    assert "outlier_threshold" in reason
    (reason,) = Rounding(SIXTEEN).check(APART, fused)
    assert "fused here: self_attn.q_proj" in reason
    with pytest.raises(ValueError, match="int8, fp16"):
        Rounding.Settings(outlier_weights="fp32")
