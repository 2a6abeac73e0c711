"""Importance-weighted round to nearest: never worse by its own measure; plain rounding where nothing is weighted or searched."""

from __future__ import annotations

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
from torch import Tensor

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.quantization.methods.imatrix_rtn import importance_of
from harness.quantization.numerics.weights import QuantizedWeight

SIGNED = WeightScheme("int", 4, 32, True, "float32", signed_scales=True)


class Means(FakeEvidence):
    """Evidence that holds a given mean square [in] and nothing else."""

    def __init__(self, square_mean: Tensor) -> None:
        super().__init__(torch.zeros(1, 1, square_mean.shape[0]), needs=("square_mean",))
        self._statistics["square_mean"] = square_mean


def rounded(
    weight: Tensor, square_mean: Tensor, scheme: WeightScheme, **settings: Any
) -> QuantizedWeight:
    method = plugins.build("rounding", "imatrix_rtn", settings)
    assert method.check(Scheme("s", scheme), llama_shapes()) == []
    return method.round_layer("self_attn.q_proj", weight, Means(square_mean), scheme, generator())


def nearest(weight: Tensor, scheme: WeightScheme, **settings: Any) -> QuantizedWeight:
    method = plugins.build("rounding", "rtn", settings)
    return method.round_layer("self_attn.q_proj", weight, None, scheme, generator())


def group_losses(weight: Tensor, found: QuantizedWeight, importance: Tensor, size: int) -> Tensor:
    error = (found.dequantize() - weight).double().square() * importance.double()
    return error.reshape(weight.shape[0], -1, size).sum(-1)


def test_nothing_weighted_and_nothing_tried_is_signed_rounding_to_nearest() -> None:
    weight, means = random_weight(16, 64), torch.rand(64, generator=generator(1))
    for dtype in ("float16", "float32", "float8_e4m3"):
        scheme = WeightScheme("int", 4, 32, True, dtype, signed_scales=True)
        found = rounded(weight, means, scheme, importance="none", refit=False, steps=0)
        assert torch.equal(found.dequantize(), nearest(weight, scheme).dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("importance", ["activations", "plain", "none"])
@pytest.mark.parametrize(
    ("symmetric", "zero_point", "settings"),
    [
        (True, "integer", {}),
        (True, "integer", {"refit": False}),
        (False, "integer", {}),
        (False, "float", {}),
    ],
)
def test_no_group_is_worse_than_the_plain_grid(
    bits: int, importance: str, symmetric: bool, zero_point: str, settings: dict[str, Any]
) -> None:
    weight, evidence = random_weight(24, 64), FakeEvidence(correlated_inputs(64))
    means = evidence["square_mean"]
    scheme = WeightScheme(
        "int", bits, 32, symmetric, "float32", zero_point, signed_scales=symmetric
    )
    u = importance_of(weight, means, importance)
    found = rounded(weight, means, scheme, importance=importance, **settings)
    plain = group_losses(weight, nearest(weight, scheme), u, 32)
    searched = group_losses(weight, found, u, 32)
    assert bool((searched <= plain * (1 + 1e-4)).all())
    assert float(searched.sum()) < 0.95 * float(plain.sum())
    assert found.bits_per_weight == nearest(weight, scheme).bits_per_weight


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "nvfp4", "fp8_e4m3"])
def test_other_formats_take_the_weighted_search(name: str) -> None:
    from harness.core.number_formats import FORMATS

    fixed = FORMATS[name]
    scheme = WeightScheme(
        name, fixed.bits, fixed.block or 32, scale_dtype=fixed.scale_dtype or "float32"
    )
    weight = random_weight(24, 64)
    means = FakeEvidence(correlated_inputs(64))["square_mean"]
    u = importance_of(weight, means, "activations")
    found = rounded(weight, means, scheme)
    # nvfp4's matrix scale leaves room for larger block scales, so its plain grid is another one
    plain = nearest(weight, scheme, scale_search="neighbours" if name == "nvfp4" else "none")
    searched, others = (group_losses(weight, each, u, scheme.group_size) for each in (found, plain))
    assert bool((searched <= others * (1 + 1e-5)).all()) and float(searched.sum()) < float(
        others.sum()
    )


def test_large_inputs_lose_less() -> None:
    weight, inputs = random_weight(32, 64), correlated_inputs(64, outliers=6)
    means = FakeEvidence(inputs)["square_mean"]
    errors = {
        importance: layer_error(
            weight, rounded(weight, means, SIGNED, importance=importance).dequantize(), inputs
        )
        for importance in ("activations", "plain", "none")
    }
    assert errors["plain"] < 0.8 * errors["none"] and errors["activations"] < 0.8 * errors["none"]


@pytest.mark.parametrize("scheme", [SIGNED, WeightScheme("int", 3, 32, False, "float32")])
def test_the_unit_of_the_inputs_means_nothing(scheme: WeightScheme) -> None:
    weight, means = random_weight(16, 64), torch.rand(64, generator=generator(1)) + 0.1
    first = rounded(weight, means, scheme).dequantize()
    for power in (-40, 7):
        assert torch.equal(rounded(weight, means * 2.0**power, scheme).dequantize(), first)
    even = torch.full((64,), 0.25)
    assert torch.equal(
        rounded(weight, even, scheme, importance="plain").dequantize(),
        rounded(weight, means, scheme, importance="none").dequantize(),
    )


def test_inputs_that_were_never_active_move_no_scale() -> None:
    weight = random_weight(16, 64)
    means = torch.rand(64, generator=generator(1)) + 0.1
    means[[3, 40]] = 0
    other = weight.clone()
    # larger weights would widen the range of candidates; smaller ones move nothing but their own error
    other[:, [3, 40]] *= -0.5
    found, again = (
        rounded(each, means, SIGNED, importance="plain").dequantize() for each in (weight, other)
    )
    alive = means > 0
    same = found[:, alive] == again[:, alive]
    # groups whose largest weight belongs to such an input start from another range
    assert float(same.float().mean()) > 0.9
    assert bool(torch.isfinite(rounded(weight, torch.zeros(64), SIGNED).dequantize()).all())


def test_a_group_of_zeros_stays_and_an_exact_group_is_found_again() -> None:
    means = torch.rand(64, generator=generator(1)) + 0.1
    codes = torch.randint(-8, 8, (16, 64), generator=generator(2)).float()
    codes[:, [0, 32]] = -8  # the extreme entry of each group
    weight = codes * 0.125
    weight[3, :32] = 0
    found = rounded(weight, means, SIGNED).dequantize()
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=0)
    assert not found[3, :32].any()


def test_check_names_what_it_cannot_round() -> None:
    method = plugins.build("rounding", "imatrix_rtn", {})
    (reason,) = method.check(Scheme("w4g32sym", WeightScheme("int", 4, 32, True)), llama_shapes())
    assert "signed_scales=true" in reason
    (reason,) = method.check(Scheme("w4g4", WeightScheme("int", 4, 4)), llama_shapes())
    assert "groups of 4" in reason
    with pytest.raises(ValueError, match="activations, plain, none"):
        type(method).Settings(importance="hessian")
