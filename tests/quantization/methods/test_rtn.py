"""Round to nearest: what the grids promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence import generator, llama_shapes, random_weight
from torch import Tensor

from harness.core import plugins
from harness.core.cell import Override, Scheme, WeightScheme, freeze
from harness.core.errors import ConfigError, MethodError
from harness.quantization.numerics.weights import UniformWeight


def rtn(
    weight: Tensor,
    bits: int = 4,
    group_size: int = -1,
    symmetric: bool = False,
    scale_dtype: str = "float32",
    **settings: Any,
) -> UniformWeight:
    scheme = WeightScheme("int", bits, group_size, symmetric, scale_dtype)
    return plugins.build("rounding", "rtn", settings).round_layer(
        "mlp.up_proj", weight, None, scheme, generator()
    )


@pytest.mark.parametrize("grid", ["gptq", "omniquant"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_twice_is_rounding_once(grid: str, bits: int) -> None:
    once = rtn(random_weight(16, 64), bits, 16, grid=grid).dequantize()
    twice = rtn(once, bits, 16, grid=grid).dequantize()
    torch.testing.assert_close(twice, once, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("grid", ["gptq", "omniquant"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_no_weight_moves_by_more_than_half_a_step(grid: str, bits: int) -> None:
    weight = random_weight(16, 64)
    result = rtn(weight, bits, 32, grid=grid)
    half = (result.scale / 2).repeat_interleave(32, 1)
    moved = (result.dequantize() - weight).abs()
    # Where the range holds zero nothing is clipped but for the rounding of the zero point: one more half step at the ends.
    inside = (result.codes > 0) & (result.codes < 2**bits - 1)
    assert bool((moved[inside] <= half[inside] * (1 + 1e-5)).all())
    assert bool((moved <= 2 * half * (1 + 1e-5)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_on_the_grid_are_reproduced_exactly(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (8, 32), generator=generator(bits)).float()
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1  # both extremes, in every row
    weight = 0.03125 * (codes - 1)
    assert torch.equal(rtn(weight, bits).dequantize(), weight)


def test_one_group_per_row_is_per_channel() -> None:
    weight = random_weight(16, 64)
    assert torch.equal(rtn(weight, 3, 64).dequantize(), rtn(weight, 3, -1).dequantize())


@pytest.mark.parametrize("grid", ["gptq", "awq", "omniquant"])
@pytest.mark.parametrize("power", [-3, 1, 6])
def test_powers_of_two_scale_through(grid: str, power: int) -> None:
    weight = random_weight(16, 64)
    scaled = rtn(weight * 2.0**power, 4, 16, grid=grid).dequantize()
    assert torch.equal(scaled, rtn(weight, 4, 16, grid=grid).dequantize() * 2.0**power)


def test_the_error_of_a_group_is_bounded_by_its_step() -> None:
    weight = random_weight(16, 64)
    result = rtn(weight, 4, 16)
    error = (result.dequantize() - weight).square().reshape(16, 4, 16).sum(-1)
    # Half a step per weight, and a whole one for the two ends that rounding of the zero point may clip.
    assert bool((error <= 16 * result.scale.square()).all())
    assert bool((error <= 16 * (result.scale / 2).square() * 1.5).all())


def test_range_search_is_never_worse_by_its_own_measure() -> None:
    weight = random_weight(16, 64)
    plain, searched = rtn(weight, 3, 32), rtn(weight, 3, 32, range_search=True)
    errors = [
        (result.dequantize() - weight).abs().pow(2.4).reshape(16, 2, 32).sum(-1)
        for result in (plain, searched)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
    assert float(errors[1].sum()) < float(errors[0].sum())


@pytest.mark.parametrize("grid", ["gptq", "awq", "omniquant", "compressed"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_zeros_stay_zero(grid: str, symmetric: bool) -> None:
    if grid == "compressed" and not symmetric:
        pytest.skip("symmetric only")
    weight = random_weight(4, 32)
    weight[1] = 0
    result = rtn(weight, 4, 16, symmetric, grid=grid).dequantize()
    assert torch.equal(result[1], torch.zeros(32))


def test_what_a_group_of_one_sign_becomes_depends_on_the_convention() -> None:
    weight = torch.linspace(0.5, 1.0, 16).repeat(2, 1)
    errors = {
        grid: float((rtn(weight, 4, grid=grid).dequantize() - weight).abs().max())
        for grid in ("gptq", "awq", "omniquant")
    }
    assert errors["omniquant"] < 0.02 < errors["gptq"] < 0.04  # exact at the ends; steps of 1/15
    assert errors["awq"] > 0.4  # the zero point cannot move far enough: the end is clipped


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_bits_per_weight_follow_the_formula(bits: int) -> None:
    weight = random_weight(64, 256)
    assert rtn(weight, bits, 32, scale_dtype="float16").bits_per_weight == bits + (16 + bits) / 32
    assert (
        rtn(weight, bits, 32, symmetric=True, scale_dtype="float16").bits_per_weight
        == bits + 16 / 32
    )


def test_every_layer_that_a_group_size_does_not_divide_is_named() -> None:
    method = plugins.build("rounding", "rtn", {})
    (reason,) = method.check(Scheme("odd", WeightScheme(group_size=48)), llama_shapes(32, 64))
    assert reason.startswith("group size 48 does not divide")
    for layer in (
        "self_attn.q_proj (32)",
        "self_attn.o_proj (32)",
        "mlp.gate_proj (32)",
        "mlp.down_proj (64)",
    ):
        assert layer in reason


def test_overrides_of_single_blocks_are_checked() -> None:
    method = plugins.build("rounding", "rtn", {})
    override = Override(("down_proj",), blocks=(1,), weight=freeze({"group_size": 24}))
    (reason,) = method.check(
        Scheme("mixed", WeightScheme(group_size=16), overrides=(override,)), llama_shapes(32, 64)
    )
    assert reason == (
        "group size 24 does not divide in_features of mlp.down_proj (64); 16 and 32 divide all widths"
    )
    assert not method.check(Scheme("mixed", WeightScheme(group_size=16)), llama_shapes(32, 64))


@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        (WeightScheme(bits=1), "1 bits"),
        (WeightScheme(bits=9), "9 bits"),
        (WeightScheme(bits=2.5), "2.5 bits"),
        (WeightScheme(group_size=0), "group size 0"),
        (WeightScheme(group_size=1), "group size 1"),
        (WeightScheme(format="nf5"), 'format "nf5"'),
        (WeightScheme(scale_dtype="float8"), 'no scale_dtype "float8"'),
    ],
)
def test_impossible_schemes_say_why(scheme: WeightScheme, part: str) -> None:
    (reason,) = plugins.build("rounding", "rtn", {}).check(Scheme("odd", scheme), llama_shapes())
    assert part in reason


def test_a_damaged_weight_and_an_unknown_grid_are_refused() -> None:
    weight = random_weight(4, 16)
    weight[2, 3] = torch.nan
    with pytest.raises(MethodError, match="the weight holds NaN"):
        rtn(weight)
    with pytest.raises(ConfigError, match='no grid "gtpq"'):
        plugins.build("rounding", "rtn", {"grid": "gtpq"})
    assert (
        "symmetric only"
        in plugins.build("rounding", "rtn", {"grid": "compressed"}).check(
            Scheme("x"), llama_shapes()
        )[0]
    )
