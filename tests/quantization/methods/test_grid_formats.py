"""RTN, GPTQ and AWQ on every number format: one mechanism, the same promises."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from evidence import (
    FakeBlock,
    FakeEvidence,
    HessianEvidence,
    correlated_inputs,
    generator,
    layer_error,
    llama_shapes,
    random_weight,
)

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import ConfigError
from harness.core.number_formats import FORMATS
from harness.quantization.numerics.grids import Fitting
from harness.quantization.numerics.weights import ElementWeight, QuantizedWeight


def scheme_of(name: str, scale_dtype: str = "float16", group_size: int = 16) -> WeightScheme:
    if name == "int":
        return WeightScheme("int", 4, group_size, False, scale_dtype)
    fixed = FORMATS[name]
    return WeightScheme(
        name, fixed.bits, fixed.block or group_size, False, fixed.scale_dtype or scale_dtype
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"act_order": True}, {"static_groups": True, "act_order": True}, {"range_search": True}],
)
def test_gptq_beats_rtn_and_stays_on_the_grid(name: str, settings: dict[str, bool]) -> None:
    weight, inputs = random_weight(16, 64), correlated_inputs(64)
    scheme = scheme_of(name)
    rtn = plugins.build("rounding", "rtn", {}).round_layer(
        "up_proj", weight, None, scheme, generator()
    )
    gptq = plugins.build("rounding", "gptq", settings).round_layer(
        "up_proj", weight, FakeEvidence(inputs), scheme, generator()
    )
    assert isinstance(gptq, ElementWeight) and gptq.kind == "element"
    # groups of columns far apart cost more than they gain
    slack = 1.6 if gptq.column_group is not None else 1.0
    assert layer_error(weight, gptq.dequantize(), inputs) < slack * layer_error(
        weight, rtn.dequantize(), inputs
    )
    parts, meta = gptq.pack()
    assert torch.equal(
        QuantizedWeight.kinds["element"].unpack(parts, meta).dequantize(), gptq.dequantize()
    )
    values = {value for value in FORMATS[name].element.values if math.isfinite(value)}
    plain = gptq.dequantize() / (
        gptq.scale[:, gptq.column_group.long()]
        if gptq.column_group is not None
        else gptq.scale.repeat_interleave(gptq.group_size, 1)
    )
    assert all(
        min(abs(found - value) for value in values) < 1e-5 * max(1, abs(found))
        for found in plain.flatten()[:64].tolist()
    )


@pytest.mark.parametrize("name", ["int", "nf4", "fp8_e4m3", "mxfp4", "nvfp4"])
def test_gptq_without_correlation_is_rtn(name: str) -> None:
    weight = random_weight(16, 64)
    evidence = FakeEvidence(torch.eye(64)[None] * 8)  # H is a multiple of the identity
    for scale_dtype in ("float16", "float8_e4m3"):
        scheme = scheme_of(name, scale_dtype)
        rtn = plugins.build("rounding", "rtn", {}).round_layer(
            "up_proj", weight, None, scheme, generator()
        )
        gptq = plugins.build("rounding", "gptq", {}).round_layer(
            "up_proj", weight, evidence, scheme, generator()
        )
        assert torch.equal(gptq.dequantize(), rtn.dequantize())


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "nvfp4", "fp8_e4m3"])
def test_awq_scales_and_clips_on_every_format(name: str) -> None:
    scheme = Scheme("test", scheme_of(name))
    block = FakeBlock(needs=("abs_mean", "hessian"))
    transform = plugins.build("transform", "awq", {})
    assert transform.check(scheme, block.shapes) == []
    notes = transform.rewrite_block(block, scheme, generator())
    assert all(note["loss"] <= note["loss_without"] for note in notes["scales"].values())
    weight, evidence = random_weight(16, 64), FakeEvidence(correlated_inputs(64))
    rounding = plugins.build("rounding", "awq", {})
    clipped = rounding.round_layer(
        "mlp.up_proj", weight, evidence, scheme.weight, generator()
    ).dequantize()
    plain = (
        plugins.build("rounding", "rtn", {})
        .round_layer("mlp.up_proj", weight, None, scheme.weight, generator())
        .dequantize()
    )
    inputs = correlated_inputs(64)
    assert layer_error(weight, clipped, inputs) <= layer_error(weight, plain, inputs) * 1.2


@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        (
            WeightScheme("mxfp4", 4, 16, scale_dtype="e8m0"),
            "mxfp4 has blocks of 32, not group_size 16",
        ),
        (WeightScheme("mxfp4", 4, 32), "mxfp4 has e8m0 scales"),
        (WeightScheme("fp8_e4m3", 4), "fp8_e4m3 has 8 bits, not 4"),
        (WeightScheme("nf4", 4, 16, scale_dtype="e8m0"), 'no scale_dtype "e8m0"'),
        (WeightScheme("mxfp5", 4), 'no number format "mxfp5"'),
        (WeightScheme("nf4", 4, 48), "group size 48 does not divide"),
    ],
)
def test_contradictions_are_refused_with_the_way_out(scheme: WeightScheme, part: str) -> None:
    for kind, name in (
        ("rounding", "rtn"),
        ("rounding", "gptq"),
        ("rounding", "awq"),
        ("transform", "awq"),
    ):
        reasons = plugins.build(kind, name, {}).check(Scheme("odd", scheme), llama_shapes())
        assert len(reasons) == 1 and part in reasons[0], reasons


def test_float_zero_points_serve_every_method_on_grids_and_no_other() -> None:
    scheme = Scheme("w3", WeightScheme("int", 3, 16, zero_point="float"))
    weight, evidence = random_weight(16, 64), FakeEvidence(correlated_inputs(64))
    for name in ("rtn", "gptq", "awq"):
        method = plugins.build("rounding", name, {})
        assert method.check(scheme, llama_shapes()) == []
        found = method.round_layer("mlp.up_proj", weight, evidence, scheme.weight, generator())
        zero = found.zero  # type: ignore[attr-defined]
        assert bool((zero != zero.round()).any()) and found.bits_per_weight == 3 + 32 / 16
        plain = method.round_layer(
            "mlp.up_proj", weight, evidence, WeightScheme("int", 3, 16), generator()
        )
        assert (found.dequantize() - weight).norm() < (plain.dequantize() - weight).norm()
    (reason,) = plugins.build("rounding", "omniquant", {}).check(scheme, llama_shapes())
    assert "zero_point=integer" in reason
    (reason,) = plugins.build("rounding", "rtn", {}).check(
        Scheme("w3sym", WeightScheme("int", 3, 16, True, zero_point="float")), llama_shapes()
    )
    assert "symmetric" in reason
    (reason,) = plugins.build("rounding", "rtn", {}).check(
        Scheme("fp8", WeightScheme("fp8_e4m3", 8, zero_point="float")), llama_shapes()
    )
    assert "no zero points" in reason


@pytest.mark.parametrize("scale_dtype", ["float16", "float8_e4m3"])
def test_signed_scales_serve_every_method_on_grids_and_no_other(scale_dtype: str) -> None:
    own = WeightScheme("int", 4, 16, True, scale_dtype, signed_scales=True)
    weight, evidence = random_weight(16, 64), FakeEvidence(correlated_inputs(64))
    for name in ("rtn", "gptq", "awq"):
        method = plugins.build("rounding", name, {})
        assert method.check(Scheme("w4", own), llama_shapes()) == []
        found = method.round_layer("mlp.up_proj", weight, evidence, own, generator())
        scale = found.scale  # type: ignore[attr-defined]
        assert 0.3 < float((scale < 0).float().mean()) < 0.7
        again = type(found).unpack(*found.pack())
        assert torch.equal(again.dequantize(), found.dequantize())
        if scale_dtype == "float16":
            assert found.bits_per_weight == 4 + 16 / 16  # the sign costs nothing
        assert (found.dequantize() - weight).norm() < 0.2 * weight.norm()
    (reason,) = plugins.build("rounding", "omniquant", {}).check(
        Scheme("w4", WeightScheme("int", 4, 16, True, signed_scales=True)), llama_shapes()
    )
    assert "signed_scales=false" in reason
    assert "symmetric" in WeightScheme("int", 4, 16, signed_scales=True).contradictions()[0]
    assert "symmetric" in WeightScheme("nf4", 4, 64, True, signed_scales=True).contradictions()[0]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "mxfp8_e4m3", "mxint8", "nvfp4"])
@pytest.mark.parametrize("rule", ["neighbours", "neighbours_mae"])
def test_neighbours_are_never_worse_in_any_block(name: str, rule: str) -> None:
    fixed = FORMATS[name]
    scheme = WeightScheme(name, fixed.bits, fixed.block, scale_dtype=fixed.scale_dtype)
    weight = random_weight(64, 256)
    blocks = weight.reshape(-1, fixed.block)
    fitting = Fitting.of(weight, scheme, search=rule)
    searched, plain = fitting.fit(blocks), dataclasses.replace(fitting, search="none").fit(blocks)
    power = 1 if rule.endswith("mae") else 2
    errors = [
        (grid.nearest(blocks) - blocks).abs().pow(power).sum(-1) for grid in (searched, plain)
    ]
    assert bool((errors[0] <= errors[1]).all()) and bool((errors[0] < errors[1]).any())
    found = plugins.build("rounding", "rtn", {"scale_search": rule}).round_layer(
        "mlp.up_proj", weight, None, scheme, generator()
    )
    assert torch.equal(found.dequantize(), searched.nearest(blocks).reshape(weight.shape))
    assert torch.equal(type(found).unpack(*found.pack()).dequantize(), found.dequantize())


def test_four_over_six_scales_are_those_of_its_paper() -> None:
    """arXiv 2512.02010: of E4M3(max/6/t) and E4M3(1.5 max/6/t), t = max|W| / (6 · 256), the one of the smaller squared error."""
    scheme = WeightScheme("nvfp4", 4, 16, scale_dtype="float8_e4m3")
    weight = random_weight(64, 256)
    found = plugins.build("rounding", "rtn", {"scale_search": "neighbours"}).round_layer(
        "mlp.up_proj", weight, None, scheme, generator()
    )
    t = weight.abs().max() / (6 * 256)
    blocks = weight.reshape(-1, 16)
    steps = blocks.abs().amax(-1, keepdim=True) / 6 / t
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def on(scale: torch.Tensor) -> torch.Tensor:
        distance = (blocks.abs().div(scale)[..., None] - levels).abs()
        return levels[distance.argmin(-1)] * blocks.sign() * scale

    six, four = (on((f * steps).to(torch.float8_e4m3fn).float() * t) for f in (1.0, 1.5))
    to_four = ((four - blocks).square().sum(-1) < (six - blocks).square().sum(-1))[:, None]
    expected = torch.where(to_four, four, six).reshape(weight.shape)
    assert float((found.dequantize() - expected).abs().gt(1e-7).float().mean()) < 1e-3
    assert 0.3 < float(to_four.float().mean()) < 0.6


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_block_of_one_weight_and_a_matrix_of_zeros_are_kept(name: str) -> None:
    fixed = FORMATS[name]
    scheme = WeightScheme(name, 4, fixed.block, scale_dtype=fixed.scale_dtype)
    rtn = plugins.build("rounding", "rtn", {"scale_search": "neighbours"})
    weight = torch.zeros(4, 64)
    weight[0, 5], weight[1, 40] = 3.0, -6.0
    for values in (weight, torch.zeros(4, 64)):
        found = rtn.round_layer("mlp.up_proj", values, None, scheme, generator())
        torch.testing.assert_close(found.dequantize(), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_gptq_without_correlation_and_awq_without_clipping_search_as_rtn_does(name: str) -> None:
    fixed = FORMATS[name]
    scheme = WeightScheme(name, 4, fixed.block, scale_dtype=fixed.scale_dtype)
    weight, inputs = random_weight(64, 128), correlated_inputs(128, sequences=8)
    search = {"scale_search": "neighbours"}

    def rounded(method: str, evidence: FakeEvidence, **settings: bool) -> torch.Tensor:
        return (
            plugins.build("rounding", method, {**search, **settings})
            .round_layer("mlp.up_proj", weight, evidence, scheme, generator())
            .dequantize()
        )

    expected = rounded("rtn", FakeEvidence(inputs))
    assert torch.equal(rounded("gptq", HessianEvidence(torch.eye(128))), expected)
    assert torch.equal(rounded("awq", FakeEvidence(inputs), clip=False), expected)
    correlated = rounded("gptq", FakeEvidence(inputs))
    assert layer_error(weight, correlated, inputs) < layer_error(weight, expected, inputs)


def test_a_search_that_a_scheme_does_not_have_is_refused() -> None:
    integers = Scheme("w4g32", WeightScheme("int", 4, 32))
    for name in ("rtn", "gptq", "awq"):
        (reason,) = plugins.build("rounding", name, {"scale_search": "neighbours"}).check(
            integers, llama_shapes()
        )
        assert "scale_search=range" in reason
        assert not plugins.build("rounding", name, {"scale_search": "both"}).check(
            integers, llama_shapes()
        )
        with pytest.raises(ConfigError, match="neighbours_mae"):
            plugins.build("rounding", name, {"scale_search": "six"})
    with pytest.raises(ConfigError, match="range_search=false"):
        plugins.build("rounding", "rtn", {"scale_search": "both", "range_search": True})


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_the_older_name_of_the_range_search_is_the_same_search(name: str) -> None:
    weight, evidence = random_weight(16, 64), FakeEvidence(correlated_inputs(64))
    scheme = WeightScheme("int", 3, 16)
    older, newer = (
        plugins.build("rounding", name, settings).round_layer(
            "mlp.up_proj", weight, evidence, scheme, generator()
        )
        for settings in ({"range_search": True}, {"scale_search": "range"})
    )
    assert torch.equal(older.dequantize(), newer.dequantize())
