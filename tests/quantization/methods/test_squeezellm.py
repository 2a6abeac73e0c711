"""SqueezeLLM: sensitivity decides where values lie, the worst weights are kept, sizes are honest."""

from __future__ import annotations

import pytest
import torch
from evidence import FakeEvidence, correlated_inputs, generator, llama_shapes, random_weight
from torch import Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.quantization.methods import any_precision
from harness.quantization.methods.squeezellm import Rounding, largest
from harness.quantization.numerics.codebooks import LookupWeight


def quantize(
    weight: Tensor, gradients: Tensor, bits: int = 3, dtype: str = "float32", **settings: float
) -> LookupWeight:
    evidence = FakeEvidence(
        correlated_inputs(weight.shape[1]), gradients=gradients, needs=("squared_gradient",)
    )
    method = Rounding(Rounding.Settings(**settings))  # type: ignore[arg-type]
    quantized = method.round_layer(
        "q_proj", weight, evidence, WeightScheme("int", bits, -1, scale_dtype=dtype), generator()
    )
    assert isinstance(quantized, LookupWeight)
    return quantized


DENSE = {"sensitive_fraction": 0.0, "outlier_fraction": 0.0}


def test_dense_at_the_seed_width_is_any_precisions_seed() -> None:
    weight = random_weight(16, 200)
    gradients = torch.randn(2, 16, 200, generator=generator(3))
    evidence = FakeEvidence(correlated_inputs(200), gradients=gradients)
    method = any_precision.Rounding(any_precision.Rounding.Settings())
    seed = method.round_layer(
        "q_proj", weight, evidence, WeightScheme("int", 3, scale_dtype="float32"), generator()
    )
    assert torch.equal(quantize(weight, gradients, 3, **DENSE).dequantize(), seed.dequantize())


def test_kept_weights_are_exact_and_counted() -> None:
    weight = random_weight(32, 200)
    gradients = torch.ones(1, 32, 200)
    gradients[0, 5, 7] = 100
    quantized = quantize(weight, gradients)
    back = quantized.dequantize()
    assert quantized.outliers is not None and quantized.outliers.values.numel() == round(
        0.0005 * 6400
    ) + round(0.004 * 6400)
    top = weight.abs().flatten().topk(20).indices
    assert torch.equal(back.flatten()[top], weight.flatten()[top]) and float(back[5, 7]) == float(
        weight[5, 7]
    )


def test_keeping_outliers_lowers_the_weighted_error() -> None:
    weight = random_weight(32, 200)
    gradients = torch.randn(2, 32, 200, generator=generator(3))
    importance = gradients.square().sum(0)
    dense, sparse = (
        quantize(weight, gradients, **settings).dequantize() for settings in (DENSE, {})
    )
    assert float((importance * (sparse - weight).square()).sum()) < float(
        (importance * (dense - weight).square()).sum()
    )


def test_largest_takes_exactly_the_share() -> None:
    assert largest(torch.tensor([[1.0, 3.0], [3.0, 0.0]]), 0.25).tolist() == [
        [False, True],
        [False, False],
    ]
    assert not bool(largest(torch.ones(3, 3), 0.0).any())


def test_rows_without_gradient_follow_their_dense_weights() -> None:
    weight = random_weight(4, 200)
    weight[1, 0] = 50.0
    back = quantize(weight, torch.zeros(1, 4, 200), outlier_fraction=0.0025).dequantize()
    assert float(back[1, 0]) == 50 and float((back - weight)[1].abs().max()) < 0.3


@pytest.mark.parametrize("settings", [{}, DENSE])
def test_packing_is_exact(settings: dict[str, float]) -> None:
    weight = random_weight(16, 200)
    quantized = quantize(
        weight, torch.randn(2, 16, 200, generator=generator(3)), 4, "float16", **settings
    )
    assert torch.equal(LookupWeight.unpack(*quantized.pack()).dequantize(), quantized.dequantize())
    if settings is DENSE:
        assert quantized.bits_per_weight == 4 + 16 * 16 / 200


def test_check_and_settings() -> None:
    method, shapes = Rounding(Rounding.Settings()), llama_shapes()
    assert method.check(Scheme("w3", WeightScheme("int", 3)), shapes) == []
    assert len(method.check(Scheme("w3.5g16", WeightScheme("int", 3.5, 16)), shapes)) == 2
    with pytest.raises(ValueError, match="together below 1"):
        Rounding.Settings(outlier_fraction=1.0)
