"""Number formats: every code, the nearest of them, and the rules of their scales; beside torch and compressed-tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from harness.core.cell import WeightScheme
from harness.core.number_formats import FORMATS, floating
from harness.quantization.numerics.grids import Fitting, decode, encode
from harness.quantization.numerics.weights import QuantizedWeight, on_grid

SCALES = ("float16", "bfloat16", "float32", "float8_e4m3")
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def scheme_of(name: str, scale_dtype: str = "float16", group_size: int = 32) -> WeightScheme:
    if name == "int":
        return WeightScheme("int", 4, group_size, False, scale_dtype)
    fixed = FORMATS[name]
    return WeightScheme(
        name, fixed.bits, fixed.block or group_size, False, fixed.scale_dtype or scale_dtype
    )


def weights(rows: int = 8, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def quantized(weight: Tensor, scheme: WeightScheme, search: str = "none") -> QuantizedWeight:
    size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    groups = weight.reshape(weight.shape[0], -1, size)
    grid = Fitting.of(weight, scheme, search=search).fit(groups)
    return on_grid(grid.quantize(groups), grid, scheme)


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_its_own_nearest(name: str) -> None:
    element = FORMATS[name].element
    codes = torch.arange(2**element.bits, dtype=torch.uint8)
    values = decode(codes, element)
    assert len(element.values) == 2**element.bits
    finite = torch.isfinite(values)
    back = encode(values[finite], element)
    assert torch.equal(decode(back, element), values[finite])
    nonzero = values[finite] != 0
    assert torch.equal(back[nonzero], codes[finite][nonzero]), "only the two zeros share a value"


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_is_nearest_by_brute_force_and_ends_saturate(name: str) -> None:
    element = FORMATS[name].element
    finite = torch.tensor([value for value in element.values if math.isfinite(value)])
    largest = float(finite.abs().max())
    x = torch.cat(
        (torch.linspace(-1.2 * largest, 1.2 * largest, 4001), torch.linspace(-0.02, 0.02, 801))
    )
    found = decode(encode(x, element), element)
    best = (x[:, None] - finite).abs().amin(1)
    torch.testing.assert_close((x - found).abs(), best, rtol=1e-6, atol=1e-9)
    assert bool(torch.isfinite(decode(encode(torch.tensor([1e30, -1e30]), element), element)).all())


@pytest.mark.parametrize("name", FLOAT8)
def test_codes_are_those_of_torch(name: str) -> None:
    element, dtype = FORMATS[name].element, FLOAT8[name]
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(dtype).float()
    finite = torch.isfinite(theirs)
    assert torch.equal(torch.isfinite(decode(codes, element)), finite)
    assert torch.equal(decode(codes, element)[finite], theirs[finite])
    ordered = theirs[finite].sort().values
    # ties between every two neighbours, to the even code
    middles = (ordered[1:] + ordered[:-1]) / 2
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * torch.logspace(
        -6, 2, 20_000
    )
    x = torch.cat((middles, theirs[finite], noise)).clamp(ordered[0], ordered[-1])
    x = x[x != 0]
    assert torch.equal(encode(x, element), x.to(dtype).view(torch.uint8))


def test_tables_of_the_standards() -> None:
    assert floating(2, 1).values[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    largest = {
        name: max(v for v in FORMATS[name].element.values if math.isfinite(v)) for name in FORMATS
    }
    assert (
        largest["mxfp6_e2m3"] == 7.5 and largest["mxfp6_e3m2"] == 28 and largest["fp8_e4m3"] == 448
    )
    assert (
        largest["fp8_e5m2"] == 57344
        and largest["mxint8"] == 127 / 64
        and largest["nf4"] == largest["fp4"] == 1
    )
    emax = {name: FORMATS[name].element.emax for name in FORMATS if name.startswith("mx")}
    assert emax == {
        "mxfp4": 2,
        "mxfp6_e2m3": 2,
        "mxfp6_e3m2": 4,
        "mxfp8_e4m3": 8,
        "mxfp8_e5m2": 15,
        "mxint8": 0,
    }


def test_e2m1_is_what_compressed_tensors_rounds_to() -> None:
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, FP6_E2M3_DATA

    x = torch.cat((torch.linspace(-6, 6, 2001), torch.arange(-24, 25) / 4))
    for name, cast in (
        ("mxfp4", FP4_E2M1_DATA.cast_to_fp4),
        ("mxfp6_e2m3", FP6_E2M3_DATA.cast_to_fp6),
    ):
        element = FORMATS[name].element
        assert torch.equal(decode(encode(x, element), element), cast(x.clone()).float())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    power=st.integers(-30, 20),
    name=st.sampled_from([n for n in FORMATS if n.startswith("mx")]),
)
def test_microscaling_scales_follow_the_specification(seed: int, power: int, name: str) -> None:
    weight = weights(seed=seed) * 2.0**power
    fixed = FORMATS[name]
    result = quantized(weight, scheme_of(name))
    assert fixed.block == 32
    expected = weight.reshape(8, 2, 32).abs().amax(-1).double().log2().floor() - fixed.element.emax
    assert torch.equal(result.scale.double(), 2.0**expected)  # type: ignore[attr-defined]
    assert torch.equal(
        result.dequantize() * 2.0, quantized(weight * 2, scheme_of(name)).dequantize()
    )


def test_nvfp4_scales_are_e4m3_times_one_number() -> None:
    weight = weights()
    weight[3] *= 50
    result = quantized(weight, scheme_of("nvfp4"))
    parts, _ = result.pack()
    assert parts["scale"].dtype == torch.float8_e4m3fn and parts["scale"].shape == (8, 4)
    assert float(parts["tensor_scale"]) == pytest.approx(float(weight.abs().max()) / 6 / 448)
    assert float(parts["scale"].float().max()) == 448
    assert result.bits_per_weight == 4 + 8 / 16 + 32 / weight.numel()


@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize("name", ["int", *FORMATS])
def test_what_is_stored_is_what_was_chosen(name: str, scale_dtype: str) -> None:
    scheme = scheme_of(name, scale_dtype)
    weight = weights()
    weight[2] = 0
    weight[5] *= 1e-4
    result = quantized(weight, scheme)
    parts, meta = result.pack()
    again = QuantizedWeight.kinds[result.kind].unpack(parts, meta)
    assert torch.equal(again.dequantize(), result.dequantize())
    assert torch.equal(again.pack()[0]["codes"], parts["codes"])
    assert not result.dequantize()[2].any()
    error = (result.dequantize() - weight).norm() / weight.norm()
    assert float(error) < (0.07 if scheme.bits > 4 else 0.2)


@pytest.mark.parametrize("name", ["int", *FORMATS])
def test_bits_per_weight_are_the_bytes_on_disk(name: str) -> None:
    for scale_dtype in SCALES:
        result = quantized(weights(256, 512), scheme_of(name, scale_dtype))
        on_disk = 8 * len(save(result.pack()[0])) / (256 * 512)
        assert on_disk == pytest.approx(result.bits_per_weight, rel=0.02)


@pytest.mark.parametrize("name", FORMATS)
def test_a_searched_scale_is_never_worse_by_its_own_measure(name: str) -> None:
    weight = weights()
    plain, searched = (
        quantized(weight, scheme_of(name, "float32"), search).dequantize()
        for search in ("none", "range")
    )
    errors = [
        (w - weight).abs().pow(2.4).reshape(8, -1, FORMATS[name].block or 32).sum(-1)
        for w in (plain, searched)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", ["nf4", "fp4", "fp8_e4m3", "fp8_e5m2"])
def test_a_whole_row_may_share_a_scale(name: str) -> None:
    weight = weights()
    result = quantized(weight, scheme_of(name, "float32", group_size=-1))
    assert result.scale.shape == (8, 1)  # type: ignore[attr-defined]
    largest = weight.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(result.dequantize().gather(1, largest), weight.gather(1, largest))


# ---- float zero points ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_float_zero_points_are_stored_as_chosen_and_counted(bits: int, scale_dtype: str) -> None:
    weight = weights(64, 128)
    weight[2] = 0
    weight[5] = weight[5].abs() + 0.01  # a range without zero
    scheme = WeightScheme("int", bits, 32, False, scale_dtype, "float")
    result = quantized(weight, scheme)
    parts, meta = result.pack()
    assert meta["zero"] == "float" and parts["zero"].dtype == {
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
    }.get(scale_dtype, torch.float16)
    assert torch.equal(
        QuantizedWeight.kinds[result.kind].unpack(parts, meta).dequantize(), result.dequantize()
    )
    widths = {"float16": 32, "bfloat16": 32, "float32": 64, "float8_e4m3": 24}
    extra = 32 / weight.numel() if scale_dtype == "float8_e4m3" else 0
    assert result.bits_per_weight == bits + widths[scale_dtype] / 32 + extra
    assert not result.dequantize()[2].any()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    bits=st.integers(2, 8),
    convention=st.sampled_from(["gptq", "awq", "omniquant"]),
)
def test_float_zero_points_put_both_ends_of_the_range_on_the_grid(
    seed: int, bits: int, convention: str
) -> None:
    values = weights(seed=seed)
    scheme = WeightScheme("int", bits, -1, False, "float32", "float")
    grid = Fitting.of(values, scheme, convention).fit(values)
    nearest, step = grid.nearest(values), grid.scale
    assert bool(((nearest - values).abs() <= 0.5001 * step).all()), "nothing is clipped"
    ends = torch.cat((values.amin(1, keepdim=True), values.amax(1, keepdim=True)), 1)
    assert bool(((grid.nearest(ends) - ends).abs() <= 1e-3 * step).all())
