"""SVDQuant: large directions stay beside what is rounded; iterations never lose what they had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import (
    FakeEvidence,
    correlated_inputs,
    generator,
    layer_error,
    llama_shapes,
    random_weight,
)
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import ActivationScheme, Scheme, WeightScheme, make_part
from harness.core.errors import ConfigError, MethodError
from harness.quantization.inference.activations import ActivationQuantizer
from harness.quantization.inference.linear import QuantizedLinear
from harness.quantization.numerics.adapters import AdaptedWeight
from harness.quantization.numerics.weights import QuantizedWeight

W4 = WeightScheme("int", 4, 32, False, "float32")


def layer() -> tuple[Tensor, FakeEvidence, Tensor]:
    inputs = correlated_inputs(96, sequences=8)
    return random_weight(64, 96), FakeEvidence(inputs), inputs


def rounded(
    weight: Tensor, evidence: FakeEvidence | None, scheme: WeightScheme = W4, **settings: Any
) -> QuantizedWeight:
    method = plugins.build("rounding", "svdquant", {"adapter_dtype": "float32", **settings})
    return method.round_layer("self_attn.q_proj", weight, evidence, scheme, generator())


def test_rank_0_is_the_base() -> None:
    weight, evidence, _ = layer()
    rtn = plugins.build("rounding", "rtn", {}).round_layer("q", weight, None, W4, generator())
    assert torch.equal(rounded(weight, evidence, rank=0).dequantize(), rtn.dequantize())


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_at_full_rank_it_is_the_matrix_and_rounding_absorbs_the_factors(
    dtype: str, error: float
) -> None:
    weight, evidence, _ = layer()
    found = rounded(weight, evidence, rank=64, adapter_dtype=dtype).dequantize()
    assert float((found - weight).norm() / weight.norm()) < error


def test_a_matrix_of_low_rank_is_all_in_its_factors() -> None:
    rng = generator(1)
    weight = torch.randn(64, 4, generator=rng) @ torch.randn(4, 96, generator=rng)
    found = rounded(weight, None, rank=4, objective="weight")
    assert isinstance(found, AdaptedWeight)
    assert torch.allclose(found.up @ found.down, weight, atol=1e-5)


@pytest.mark.parametrize("objective", ["output", "weight"])
@pytest.mark.parametrize("compensate", [False, True])
def test_iterations_never_raise_the_objective(objective: str, compensate: bool) -> None:
    weight, evidence, inputs = layer()
    losses = []
    for iterations in (1, 2, 5, 20):
        found = rounded(
            weight,
            evidence,
            rank=8,
            objective=objective,
            compensate=compensate,
            iterations=iterations,
        ).dequantize()
        losses.append(
            layer_error(weight, found, inputs)
            if objective == "output"
            else float((found - weight).square().sum())
        )
    assert losses == sorted(losses, reverse=True)
    assert compensate or losses[-1] < losses[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scheme", [W4, WeightScheme("int", 3, 32, False, "float32")])
def test_at_one_rank_eora_leaves_less_output_error(scheme: WeightScheme, seed: int) -> None:
    """EoRA sees the error of rounding, SVDQuant only the matrix."""
    weight, inputs = random_weight(64, 96, seed), correlated_inputs(96, sequences=8, seed=seed)
    evidence = FakeEvidence(inputs)
    ours = layer_error(weight, rounded(weight, evidence, scheme, rank=8).dequantize(), inputs)
    eora = plugins.build(
        "rounding", "eora", {"base": "rtn", "rank": 8, "adapter_dtype": "float32"}
    ).round_layer("q", weight, evidence, scheme, generator())
    assert layer_error(weight, eora.dequantize(), inputs) <= ours


def test_the_low_rank_part_reads_unrounded_inputs() -> None:
    """As the authors' kernels do: their branch is in 16 bits."""
    weight, evidence, inputs = layer()
    found = rounded(weight, evidence, rank=8)
    assert isinstance(found, AdaptedWeight)
    rounding = ActivationQuantizer(ActivationScheme(bits=4), "test")
    linear = QuantizedLinear(found, None, torch.float32, torch.device("cpu"), rounding)
    x = inputs[0]
    expected = nn.functional.linear(rounding(x), found.base.dequantize()) + nn.functional.linear(
        x, found.up @ found.down
    )
    assert not torch.allclose(rounding(x), x, atol=1e-2)
    assert torch.allclose(linear(x), expected, atol=1e-4)


def test_data_free_by_weight_error() -> None:
    settings = {"base": "rtn", "base_settings": {}}
    assert make_part("rounding", "svdquant", {**settings, "objective": "weight"}).needs == ()
    assert make_part("rounding", "svdquant", settings).needs == ("hessian",)
    on_gptq = {"base": "gptq", "base_settings": {}, "objective": "weight"}
    assert make_part("rounding", "svdquant", on_gptq).needs == ("hessian",)


def test_refusals(tmp_path: Path) -> None:
    scheme, shapes = Scheme("w4", W4), llama_shapes(kv_heads=2)
    method = plugins.build("rounding", "svdquant", {"rank": 20})
    (reason,) = method.check(scheme, shapes)
    assert "rank 20 is more than the smaller side of self_attn.k_proj [16 × 32]" in reason
    assert not plugins.build("rounding", "svdquant", {"rank": 16}).check(scheme, shapes)
    for settings, message in (
        ({"iterations": 0}, "iterations is 0"),
        ({"objective": "both"}, 'no objective "both"'),
    ):
        with pytest.raises(ConfigError, match=message):
            plugins.build("rounding", "svdquant", settings)
    weight, evidence, _ = layer()
    weight[0, 0] = torch.nan
    with pytest.raises(MethodError, match="NaN"):
        rounded(weight, evidence, rank=4)
