"""BiLLM: the algebra of binarization, disjoint masks, feedback, nominal and true bits."""

from __future__ import annotations

import itertools

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
from harness.quantization.methods.billm import (
    Rounding,
    SplitBinaryWeight,
    binarize,
    choose_columns,
    choose_split,
)


def quantize(
    weight: Tensor,
    evidence: FakeEvidence,
    block: int = 64,
    dtype: str = "float32",
    **settings: object,
) -> SplitBinaryWeight:
    method = Rounding(Rounding.Settings(**settings))  # type: ignore[arg-type]
    quantized = method.round_layer(
        "q_proj", weight, evidence, WeightScheme("int", 1.08, block, scale_dtype=dtype), generator()
    )
    assert isinstance(quantized, SplitBinaryWeight)
    return quantized


def test_the_residual_energy_is_known_exactly() -> None:
    block = torch.randn(16, 40, generator=generator(), dtype=torch.float64)
    mask = torch.rand(16, 40, generator=generator(1)) < 0.6
    (part,) = binarize(block, mask, 1, "float32")
    count = mask.sum(1)
    mean = (block * mask).sum(1) / count
    scale = ((block - mean[:, None]).abs() * mask).sum(1) / count
    expected = (block.square() * mask).sum(1) - count * mean.square() - count * scale.square()
    left = ((block - part.values) * mask).square().sum(1)
    torch.testing.assert_close(left, expected, rtol=1e-5, atol=1e-6)


def test_each_further_order_never_increases_the_error() -> None:
    block, mask = (
        torch.randn(16, 40, generator=generator()),
        torch.rand(16, 40, generator=generator(1)) < 0.5,
    )
    parts = binarize(block, mask, 4)
    rest, energies = block * mask, []
    for part in parts:
        rest = rest - part.values
        energies.append(rest.square().sum(1))
    for before, after in itertools.pairwise(energies):
        assert bool((after <= before + 1e-6).all())


def test_a_full_mask_is_centred_sign_binarization() -> None:
    block = torch.randn(8, 32, generator=generator())
    (part,) = binarize(block, torch.ones_like(block, dtype=torch.bool), 1)
    mean = block.mean(1, keepdim=True)
    torch.testing.assert_close(
        part.values, mean + (block - mean).abs().mean(1, keepdim=True) * (block - mean).sign()
    )


def test_nothing_outside_the_mask_and_empty_rows_are_zero() -> None:
    block, mask = torch.randn(8, 32, generator=generator()), torch.zeros(8, 32, dtype=torch.bool)
    mask[3:, ::2] = True
    values = sum(part.values for part in binarize(block, mask, 2))
    assert (
        isinstance(values, Tensor)
        and bool((values[~mask] == 0).all())
        and bool(torch.isfinite(values).all())
    )


def test_masks_are_disjoint_and_cover_the_block() -> None:
    target = torch.randn(24, 64, generator=generator()).square()
    salient = choose_columns(target, 49)
    assert 1 <= int(salient.sum()) <= 49
    ranked = target.sum(0)
    assert float(ranked[salient].min()) >= float(ranked[~salient].max())
    everywhere = salient.expand(24, -1)
    split = choose_split(target, everywhere)
    above = (target >= split) & ~everywhere
    below = ~above & ~everywhere
    assert bool((above ^ below ^ everywhere).all())


def test_it_beats_plain_binarization_of_the_weights() -> None:
    weight = 0.05 * torch.randn(64, 128, generator=generator())
    weight[:, 7] *= 8
    back = quantize(weight, HessianEvidence(torch.eye(128)), 128, salience="magnitude").dequantize()
    mean = weight.mean(1, keepdim=True)
    plain = mean + (weight - mean).abs().mean(1, keepdim=True) * (weight - mean).sign()
    assert float((back - weight).square().sum()) < float((plain - weight).square().sum())


@pytest.mark.parametrize("salience", ["hessian", "magnitude"])
def test_a_diagonal_hessian_has_nothing_to_feed_back(salience: str) -> None:
    weight, evidence = (
        random_weight(16, 64),
        HessianEvidence(torch.diag(torch.rand(64, generator=generator()) + 0.1)),
    )
    on, off = (
        quantize(weight, evidence, 32, salience=salience, feedback=feedback)
        for feedback in (True, False)
    )
    assert torch.equal(on.dequantize(), off.dequantize())


def test_feedback_lowers_the_layer_error() -> None:
    inputs, weight = correlated_inputs(64, length=128), random_weight(48, 64)
    on, off = (
        quantize(weight, FakeEvidence(inputs), 16, feedback=feedback) for feedback in (True, False)
    )
    assert layer_error(weight, on.dequantize(), inputs) < layer_error(
        weight, off.dequantize(), inputs
    )


def test_what_is_stored_is_what_was_rounded() -> None:
    """In one block without feedback the matrix read back is the sum of its binarizations."""
    weight = random_weight(16, 32)
    quantized = quantize(weight, HessianEvidence(torch.eye(32)), 32, "float16", feedback=False)
    everywhere = quantized.salient.expand(16, -1)
    below = ~quantized.above & ~everywhere
    masks = ((below, 1), (quantized.above, 1), (everywhere, 2))
    expected = sum(
        part.values for mask, order in masks for part in binarize(weight, mask, order, "float16")
    )
    torch.testing.assert_close(quantized.dequantize(), expected, rtol=0, atol=1e-7)


def test_nominal_and_true_bits() -> None:
    quantized = quantize(
        random_weight(64, 256), FakeEvidence(correlated_inputs(256, length=128)), 128, "float16"
    )
    salient = float(quantized.salient.float().mean())
    assert quantized.nominal_bits == 1 + salient
    # signs, split, second signs, statistics, salient columns
    true = 1 + (1 - salient) + salient + 8 * 16 / 128 + 1 / 64
    assert quantized.bits_per_weight == pytest.approx(true, abs=0.01)


def test_packing_is_exact() -> None:
    quantized = quantize(random_weight(17, 64), FakeEvidence(correlated_inputs(64)), 32, "float16")
    again = SplitBinaryWeight.unpack(*quantized.pack())
    assert torch.equal(again.dequantize(), quantized.dequantize()) and torch.equal(
        again.signs, quantized.signs
    )


def test_check() -> None:
    method, shapes = Rounding(Rounding.Settings()), llama_shapes()
    assert method.check(Scheme("w1", WeightScheme("int", 1.08, 32)), shapes) == []
    assert method.check(Scheme("w1", WeightScheme("int", 1.1, 16)), shapes) == []
    assert len(method.check(Scheme("w2", WeightScheme("int", 2, -1)), shapes)) == 2
    reasons = method.check(Scheme("w1", WeightScheme("int", 1, 64)), shapes)
    assert len(reasons) == 1 and "self_attn.q_proj" in reasons[0] and "down_proj" not in reasons[0]
