"""NF4: the oracles of the format, and bitsandbytes' byte layout."""

from __future__ import annotations

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
from harness.core.errors import MethodError
from harness.core.number_formats import NF4
from harness.quantization.methods.nf4 import Rounding
from harness.quantization.numerics.block_maxima import dynamic_table
from harness.quantization.numerics.weights import NormalFloatWeight

TABLE = torch.tensor(NF4)


def quantize(weight: Tensor, block: int = 64, double: bool = False) -> NormalFloatWeight:
    method = Rounding(Rounding.Settings(double_quantization=double))
    quantized = method.round_layer(
        "q_proj", weight, None, WeightScheme("nf4", 4, block), generator()
    )
    assert isinstance(quantized, NormalFloatWeight)
    return quantized


def normal_quantiles() -> Tensor:
    """The table from its definition, [16] float32: quantiles of evenly spaced probabilities, 8 above zero and 7 below."""
    outermost = 0.9677083
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    return (values / values.max()).float()


def test_the_table_is_the_normal_quantiles() -> None:
    torch.testing.assert_close(normal_quantiles(), TABLE, atol=2e-7, rtol=0)


def test_the_largest_magnitude_of_each_block_is_exact() -> None:
    weight = random_weight(16, 64)
    blocks, back = weight.reshape(-1, 64), quantize(weight).dequantize().reshape(-1, 64)
    largest = blocks.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, largest), blocks.gather(1, largest), rtol=0, atol=0)


def test_table_entries_times_the_maximum_are_fixed_points() -> None:
    maxima = torch.tensor([0.3, 2.0, 7.5])
    weight = (maxima[:, None] * TABLE.repeat(4)).reshape(3, 64)
    torch.testing.assert_close(quantize(weight).dequantize(), weight, rtol=0, atol=0)


def test_zeros_stay_zero_and_a_zero_block_too() -> None:
    weight = random_weight(4, 64)
    weight[:, ::3] = 0
    weight[2] = 0
    back = quantize(weight).dequantize()
    assert bool((back[weight == 0] == 0).all())


def test_the_error_is_at_most_half_the_widest_gap() -> None:
    weight = torch.randn(32, 128, generator=generator())
    blocks, back = weight.reshape(-1, 64), quantize(weight).dequantize().reshape(-1, 64)
    relative = (blocks - back).abs() / blocks.abs().amax(1, keepdim=True)
    assert float(TABLE.diff().max()) / 2 == pytest.approx(0.1519, abs=1e-4)
    assert float(relative.max()) <= float(TABLE.diff().max()) / 2 + 1e-6


def test_scaling_by_a_power_of_two_commutes() -> None:
    weight = random_weight(8, 64)
    assert torch.equal(quantize(weight * 8).dequantize(), quantize(weight).dequantize() * 8)


def test_a_value_on_a_midpoint_takes_the_lower_entry() -> None:
    middle = (TABLE[9] + TABLE[10]) / 2
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1] = 1, middle
    assert int(quantize(weight).codes[0, 1]) == 9


def test_blocks_cross_rows_and_the_last_may_be_short() -> None:
    weight = random_weight(3, 40)  # 120 weights: one block of 64, one of 56
    quantized = quantize(weight)
    assert quantized.maxima.read().shape == (2,)
    assert float(quantized.maxima.read()[0]) == float(weight.reshape(-1)[:64].abs().max())


def test_packing_puts_the_first_code_in_the_high_half() -> None:
    quantized = quantize(random_weight(3, 33))  # an odd number of codes
    packed = quantized.pack()[0]["codes"]
    assert packed.shape == (50,)
    assert int(packed[0]) == 16 * int(quantized.codes[0, 0]) + int(quantized.codes[0, 1])
    assert int(packed[-1]) & 15 == 7  # padded with the code of zero


@pytest.mark.parametrize(
    ("double", "expected"), [(False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))]
)
def test_bits_per_weight(double: bool, expected: float) -> None:
    quantized = quantize(random_weight(256, 256), double=double)
    assert quantized.bits_per_weight == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("double", [False, True])
def test_packing_is_exact(double: bool) -> None:
    quantized = quantize(random_weight(50, 72), block=32, double=double)
    again = NormalFloatWeight.unpack(*quantized.pack())
    assert torch.equal(again.dequantize(), quantized.dequantize()) and torch.equal(
        again.codes, quantized.codes
    )


def test_double_quantization_keeps_the_codes_and_little_error() -> None:
    weight = random_weight(128, 128)
    once, twice = quantize(weight), quantize(weight, double=True)
    assert torch.equal(once.codes, twice.codes)
    torch.testing.assert_close(twice.maxima.read(), once.maxima.read(), rtol=0.05, atol=1e-3)


def test_check_refuses_what_nf4_is_not() -> None:
    method, shapes = Rounding(Rounding.Settings()), llama_shapes()
    assert method.check(Scheme("nf4", WeightScheme("nf4", 4, 64)), shapes) == []
    reasons = method.check(Scheme("w3", WeightScheme("int", 3, 48)), shapes)
    assert len(reasons) == 3 and all("mlp.down_proj" in reason for reason in reasons)


def test_a_damaged_weight_fails_the_cell() -> None:
    weight = random_weight(4, 64)
    weight[1, 1] = torch.nan
    with pytest.raises(MethodError, match="NaN or infinity"):
        quantize(weight)


# ---- FP4, and the library itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(16, 64), (3, 50)])
def test_it_equals_bitsandbytes(format_: str, double: bool, shape: tuple[int, int]) -> None:
    """Bit for bit, where the library is installed; short last blocks are where we differ, so they are left out."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight(*shape)
    method = Rounding(Rounding.Settings(double_quantization=double))
    ours = method.round_layer("q_proj", weight, None, WeightScheme(format_, 4, 64), generator())
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type=format_, compress_statistics=double
    )
    theirs = functional.dequantize_4bit(packed, state)
    whole = weight.numel() // 64 * 64
    assert torch.equal(ours.dequantize().flatten()[:whole], theirs.flatten()[:whole])
    if format_ == "nf4" and whole == weight.numel():
        assert torch.equal(ours.pack()[0]["codes"], packed.flatten())


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128])
def test_rtn_with_double_quantized_scales_equals_bitsandbytes(format_: str, block: int) -> None:
    """Codes, bytes of the scales and dequantized weights, where the library is installed.

    Its CPU kernel looks 8-bit codes up in a table of 65,536 entries, and misses the nearest by one where a value is that close to
    a midpoint; its CUDA kernel and its implementation in torch do not.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight(96, 512)
    weight[5, :block] = 0
    ours = plugins.build("rounding", "rtn", {}).round_layer(
        "q_proj", weight, None, double(format_, block), generator()
    )
    packed, state = functional.quantize_4bit(
        weight, blocksize=block, quant_type=format_, compress_statistics=True
    )
    stored = ours.pack()[0]
    assert torch.equal(stored["maxima_scale"], state.state2.absmax) and float(
        stored["maxima_offset"]
    ) == float(state.offset)
    codes, theirs = stored["maxima_codes"].long(), state.absmax.long()
    missed = codes != theirs
    table = dynamic_table()
    middle = (table[codes] + table[theirs]) / 2
    maxima = weight.reshape(-1, block).abs().amax(1) - stored["maxima_offset"]
    unit = maxima / stored["maxima_scale"].repeat_interleave(256)[: maxima.numel()]
    assert int((codes - theirs).abs().max()) <= 1 and float(
        (unit - middle)[missed].abs().sum()
    ) < 2e-5 * (1 + int(missed.sum()))
    same = ~missed.repeat_interleave(block).reshape(weight.shape)
    assert torch.equal(ours.dequantize()[same], functional.dequantize_4bit(packed, state)[same])
    if format_ == "nf4":  # zeros have two codes in FP4
        assert torch.equal(stored["codes"], packed.flatten())


# ---- double quantization as a property of the scheme -------------------------------------------------------------------


def double(format_: str = "nf4", block: int = 64) -> WeightScheme:
    return WeightScheme(format_, 4, block, scale_dtype="double_quantized")


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
def test_rtn_stores_what_this_rounding_stores(format_: str) -> None:
    weight = random_weight(40, 192)
    weight[3] = 0
    scheme = double(format_)
    theirs = plugins.build("rounding", "rtn", {}).round_layer(
        "q_proj", weight, None, scheme, generator()
    )
    setting = Rounding(Rounding.Settings(double_quantization=True))
    for ours in (
        Rounding(Rounding.Settings()).round_layer("q_proj", weight, None, scheme, generator()),
        setting.round_layer("q_proj", weight, None, WeightScheme(format_, 4, 64), generator()),
    ):
        assert theirs.kind == ours.kind and theirs.pack()[1] == ours.pack()[1]
        parts, own = theirs.pack()[0], ours.pack()[0]
        assert parts.keys() == own.keys() and all(
            torch.equal(parts[name], own[name]) for name in parts
        )


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
def test_every_rounding_that_takes_formats_takes_it(format_: str) -> None:
    weight, inputs = random_weight(64, 256), correlated_inputs(256)
    scheme, errors = double(format_), {}
    for name, evidence in (
        ("rtn", None),
        ("gptq", FakeEvidence(inputs)),
        ("awq", FakeEvidence(inputs)),
    ):
        method = plugins.build("rounding", name, {})
        assert method.check(Scheme("double", scheme), llama_shapes(128, 256)) == []
        result = method.round_layer("up_proj", weight, evidence, scheme, generator())
        assert isinstance(result, NormalFloatWeight)
        assert result.bits_per_weight == pytest.approx(
            4 + 8 / 64 + 2 * 32 / weight.numel()
        )  # one second-level block, one mean
        assert torch.equal(
            NormalFloatWeight.unpack(*result.pack()).dequantize(), result.dequantize()
        )
        plain = WeightScheme(format_, 4, 64, scale_dtype="float32")
        once = plugins.build("rounding", name, {}).round_layer(
            "up_proj", weight, evidence, plain, generator()
        )
        errors[name] = layer_error(weight, result.dequantize(), inputs)
        assert errors[name] < 1.05 * layer_error(weight, once.dequantize(), inputs), (
            "second-level codes cost little"
        )
    assert errors["gptq"] < errors["rtn"]


def test_groups_that_are_no_neighbours_are_refused() -> None:
    scheme, shapes = Scheme("double", double()), llama_shapes(128, 256)
    (reason,) = plugins.build("rounding", "gptq", {"act_order": True}).check(scheme, shapes)
    assert "static_groups=true" in reason
    assert (
        plugins.build("rounding", "gptq", {"act_order": True, "static_groups": True}).check(
            scheme, shapes
        )
        == []
    )
    (reason,) = plugins.build("rounding", "rtn", {}).check(
        Scheme("odd", WeightScheme("fp8_e4m3", 8, scale_dtype="double_quantized")), shapes
    )
    assert 'no scale_dtype "double_quantized"' in reason
    (reason,) = plugins.build("rounding", "rtn", {}).check(
        Scheme("odd", WeightScheme(scale_dtype="double_quantized")), shapes
    )
    assert 'no scale_dtype "double_quantized"' in reason


def test_fp4_has_the_librarys_magnitudes() -> None:
    method = Rounding(Rounding.Settings())
    table = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    weight = torch.cat((table, -table)).repeat(4)[None] * 3
    result = method.round_layer("q_proj", weight, None, WeightScheme("fp4", 4, 64), generator())
    assert isinstance(result, NormalFloatWeight)
    torch.testing.assert_close(result.dequantize(), weight, rtol=1e-7, atol=0)
    assert result.codes[0, :8].tolist() == list(range(8)) and result.codes[
        0, 9:16
    ].tolist() == list(range(9, 16))
