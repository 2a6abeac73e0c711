"""PB-LLM: its two ends, the count of binary weights, feedback, nominal and true bits."""

from __future__ import annotations

import pytest
import torch
from evidence import (
    FakeEvidence,
    HessianEvidence,
    correlated_inputs,
    generator,
    layer_error,
    llama_shapes,
    random_weight,
)
from torch import Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.quantization.methods.pb_llm import PartlyBinaryWeight, Rounding, least
from harness.quantization.numerics.grids import fit


def quantize(
    weight: Tensor,
    evidence: FakeEvidence,
    bits: float = 1.7,
    group_size: int = -1,
    dtype: str = "float32",
    **settings: object,
) -> PartlyBinaryWeight:
    method = Rounding(Rounding.Settings(**settings))  # type: ignore[arg-type]
    scheme = WeightScheme("int", bits, group_size, scale_dtype=dtype)
    quantized = method.round_layer("q_proj", weight, evidence, scheme, generator())
    assert isinstance(quantized, PartlyBinaryWeight)
    return quantized


def identity(width: int) -> HessianEvidence:
    return HessianEvidence(torch.eye(width))


def test_fraction_zero_is_eight_bit_rounding_but_for_one_weight() -> None:
    weight = random_weight(16, 64)
    quantized = quantize(weight, identity(64), 8, feedback=False)
    expected = fit(weight, 8, False, "gptq").nearest(weight)
    differ = quantized.dequantize() != expected
    assert int(quantized.low.sum()) == 1 and int(differ.sum()) <= 1
    assert bool(differ[~quantized.low].logical_not().all())


def test_fraction_one_takes_two_values_per_row_with_the_known_error() -> None:
    weight = random_weight(16, 64)
    quantized = quantize(weight, identity(64), 1, feedback=False)
    back = quantized.dequantize()
    mean = weight.mean(1)
    scale = (weight - mean[:, None]).abs().mean(1)
    assert all(row.unique().numel() == 2 for row in back)
    torch.testing.assert_close(back.amax(1), mean + scale)
    expected = (weight - mean[:, None]).square().sum(1) - 64 * scale.square()
    torch.testing.assert_close((back - weight).square().sum(1), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_the_number_of_binary_weights(fraction: float, group_size: int) -> None:
    weight = torch.randn(16, 64, generator=generator())
    quantized = quantize(
        weight, FakeEvidence(correlated_inputs(64)), 0, group_size, low_fraction=fraction
    )
    size = 16 * (64 if group_size == -1 else group_size)
    for part in quantized.low.split(64 if group_size == -1 else group_size, dim=1):
        assert int(part.sum()) == int(fraction * size) + 1


def test_least_counts_ties_and_everything() -> None:
    assert least(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), 0.5).tolist() == [
        [False, True],
        [True, True],
    ]
    assert bool(least(torch.zeros(2, 2), 0.0).all()) and bool(least(torch.rand(2, 2), 1.0).all())


def test_a_diagonal_hessian_has_nothing_to_feed_back() -> None:
    weight, evidence = (
        random_weight(16, 64),
        HessianEvidence(torch.diag(torch.rand(64, generator=generator()) + 0.1)),
    )
    on, off = quantize(weight, evidence, 2), quantize(weight, evidence, 2, feedback=False)
    assert torch.equal(on.dequantize(), off.dequantize())


@pytest.mark.parametrize("group_size", [-1, 32])
def test_feedback_lowers_the_layer_error(group_size: int) -> None:
    inputs, weight = correlated_inputs(64, length=128), random_weight(48, 64)
    on, off = (
        quantize(weight, FakeEvidence(inputs), 2, group_size, feedback=feedback)
        for feedback in (True, False)
    )
    assert layer_error(weight, on.dequantize(), inputs) < layer_error(
        weight, off.dequantize(), inputs
    )


def test_salience_is_a_choice() -> None:
    weight = random_weight(16, 64)
    by_hessian, by_magnitude = (
        quantize(weight, FakeEvidence(correlated_inputs(64)), salience=s)
        for s in ("hessian", "magnitude")
    )
    assert not torch.equal(by_hessian.low, by_magnitude.low)
    assert float(weight[~by_magnitude.low].abs().min()) >= float(
        weight[by_magnitude.low].abs().max()
    )


def test_nominal_and_true_bits() -> None:
    quantized = quantize(
        random_weight(256, 256),
        FakeEvidence(correlated_inputs(256, length=128)),
        1.7,
        128,
        "float16",
    )
    assert quantized.nominal_bits == pytest.approx(1.7, abs=0.01)
    statistics = 2 * 16 / 128 + (16 + 8) / 256
    assert quantized.bits_per_weight == pytest.approx(2.7 + statistics, abs=0.01)


@pytest.mark.parametrize("bits", [1, 1.7, 4, 8])
def test_packing_is_exact(bits: float) -> None:
    quantized = quantize(
        random_weight(16, 64), FakeEvidence(correlated_inputs(64)), bits, 32, "float16"
    )
    again = PartlyBinaryWeight.unpack(*quantized.pack())
    assert torch.equal(again.dequantize(), quantized.dequantize()) and torch.equal(
        again.low, quantized.low
    )


def test_dead_columns_and_zero_rows_are_harmless() -> None:
    inputs, weight = correlated_inputs(64), random_weight(16, 64)
    inputs[..., 5] = 0
    weight[3] = 0
    back = quantize(weight, FakeEvidence(inputs)).dequantize()
    assert bool(torch.isfinite(back).all()) and float(back[3].abs().max()) < 1e-6


def test_check() -> None:
    shapes = llama_shapes()
    assert (
        Rounding(Rounding.Settings()).check(Scheme("w1.7", WeightScheme("int", 1.7, -1)), shapes)
        == []
    )
    assert (
        Rounding(Rounding.Settings(low_fraction=0.9)).check(
            Scheme("w1.7", WeightScheme("int", 1.7, -1)), shapes
        )
        == []
    )
    reasons = Rounding(Rounding.Settings(low_fraction=0.9)).check(
        Scheme("w3g48", WeightScheme("int", 3, 48)), shapes
    )
    assert (
        len(reasons) == 2 and "1.7 nominal bits" in reasons[0] and "does not divide" in reasons[1]
    )
    with pytest.raises(ValueError, match="from 0 to 1"):
        Rounding.Settings(low_fraction=1.5)
