"""Any-Precision: nested widths, errors that fall with the bits, exact rows, invariances."""

from __future__ import annotations

import itertools

import pytest
import torch
from evidence import FakeEvidence, correlated_inputs, generator, llama_shapes, random_weight
from torch import Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.quantization.methods.any_precision import Rounding
from harness.quantization.numerics.codebooks import LookupWeight


def evidence_of(gradients: Tensor) -> FakeEvidence:
    return FakeEvidence(
        correlated_inputs(gradients.shape[-1]), gradients=gradients, needs=("squared_gradient",)
    )


def gradients_for(weight: Tensor, seed: int = 5) -> Tensor:
    return torch.randn(3, *weight.shape, generator=generator(seed)) * torch.rand(
        weight.shape[1], generator=generator(seed + 1)
    )


def quantize(
    weight: Tensor,
    gradients: Tensor,
    bits: int,
    dtype: str = "float32",
    seed: int = 0,
    **settings: int,
) -> LookupWeight:
    scheme = WeightScheme("int", bits, -1, scale_dtype=dtype)
    method = Rounding(Rounding.Settings(**settings))
    quantized = method.round_layer(
        "q_proj", weight, evidence_of(gradients), scheme, generator(seed)
    )
    assert isinstance(quantized, LookupWeight)
    return quantized


def test_the_weighted_error_never_grows_with_the_bits() -> None:
    weight = random_weight(24, 300)
    gradients = gradients_for(weight)
    importance = gradients.square().sum(0).double()
    errors = []
    for bits in range(3, 9):
        back = quantize(weight, gradients, bits).dequantize()
        errors.append((importance * (back - weight).double().square()).sum(1))
    for coarse, fine in itertools.pairwise(errors):
        assert bool((fine <= coarse * (1 + 1e-6) + 1e-12).all())
    assert float(errors[-1].sum()) < 0.01 * float(errors[0].sum())


def test_codes_are_prefixes_of_finer_codes() -> None:
    weight = random_weight(16, 300)
    gradients = gradients_for(weight)
    parent = quantize(weight, gradients, 8).codes
    for bits in range(3, 8):
        assert torch.equal(quantize(weight, gradients, bits).codes, parent >> (8 - bits))


def test_all_widths_are_made_together_and_equal_those_made_alone() -> None:
    weight = random_weight(8, 300)
    gradients = gradients_for(weight)
    evidence, method = evidence_of(gradients), Rounding(Rounding.Settings())
    for bits in (4, 8, 3):
        together = method.round_layer("q", weight, evidence, WeightScheme("int", bits), generator())
        alone = quantize(weight, gradients, bits, "float16")
        assert torch.equal(together.dequantize(), alone.dequantize())
    assert list(evidence.computed.values()) == [1]


def test_rows_of_few_values_are_exact() -> None:
    levels = torch.randn(16, 8, generator=generator())
    weight = levels.gather(1, torch.randint(0, 8, (16, 300), generator=generator(1)))
    torch.testing.assert_close(
        quantize(weight, torch.ones(1, 16, 300), 6).dequantize(), weight, rtol=1e-6, atol=1e-6
    )


def test_entries_are_means_of_their_members_when_all_weights_count_alike() -> None:
    weight = random_weight(8, 300)
    quantized = quantize(weight, torch.ones(1, 8, 300), 5)
    for code in range(32):
        member = quantized.codes == code
        mean = (weight.double() * member).sum(1) / member.sum(1)
        filled = member.any(1)
        torch.testing.assert_close(
            quantized.table[filled, code].double(), mean[filled], rtol=1e-5, atol=1e-6
        )


def test_scaling_the_sensitivity_changes_nothing() -> None:
    weight = random_weight(8, 200)
    gradients = gradients_for(weight)
    assert torch.equal(
        quantize(weight, gradients, 4).dequantize(),
        quantize(weight, gradients * 16, 4).dequantize(),
    )


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_tables_ascend(bits: int) -> None:
    weight = random_weight(16, 300)
    assert bool((quantize(weight, gradients_for(weight), bits).table.diff(dim=1) >= 0).all())


def test_rows_without_gradient_are_clustered_alike() -> None:
    weight = random_weight(8, 200)
    gradients = gradients_for(weight)
    gradients[:, 3] = 0
    row, without, alike = weight[3:4], gradients[:, 3:4], torch.ones(1, 1, 200)
    assert torch.equal(quantize(row, without, 4).dequantize(), quantize(row, alike, 4).dequantize())
    assert bool(torch.isfinite(quantize(weight, gradients, 4).dequantize()).all())


def test_sensitive_weights_are_served_better() -> None:
    weight, gradients = random_weight(16, 300), torch.full((1, 16, 300), 0.01)
    gradients[:, :, :30] = 1
    error = (quantize(weight, gradients, 3).dequantize() - weight).square().mean(0)
    assert float(error[:30].mean()) < 0.5 * float(error[30:].mean())


def test_bits_of_the_served_width() -> None:
    weight = random_weight(8, 1024)
    gradients = gradients_for(weight)
    for bits in (3, 4, 8):
        assert (
            quantize(weight, gradients, bits, "float16").bits_per_weight
            == bits + 16 * 2**bits / 1024
        )


def test_packing_is_exact() -> None:
    weight = random_weight(8, 300)
    quantized = quantize(weight, gradients_for(weight), 5, "float16")
    assert torch.equal(LookupWeight.unpack(*quantized.pack()).dequantize(), quantized.dequantize())


def test_broken_gradients_fail_the_cell() -> None:
    gradients = torch.ones(1, 4, 64)
    gradients[0, 0, 0] = torch.inf
    with pytest.raises(MethodError, match="squared gradients hold NaN"):
        quantize(random_weight(4, 64), gradients, 3)


def test_check() -> None:
    method, shapes = Rounding(Rounding.Settings()), llama_shapes()
    assert method.check(Scheme("w4", WeightScheme("int", 4)), shapes) == []
    assert len(method.check(Scheme("w2g32", WeightScheme("int", 2, 32)), shapes)) == 2
    (reason,) = method.check(Scheme("w6", WeightScheme("int", 6)), shapes)
    assert "self_attn.q_proj" in reason and "down_proj" not in reason
