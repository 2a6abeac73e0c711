"""Products of codes agree with simulation: exactly in integers, up to the order of a sum in floats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import cell, part, quantize, windows

from harness.core import plugins
from harness.core.cell import ActivationScheme, Method, Scheme, WeightScheme, quantize_key
from harness.core.errors import MethodError
from harness.quantization.inference.activations import ActivationQuantizer
from harness.quantization.inference.linear import QuantizedLinear
from harness.quantization.inference.load import load
from harness.quantization.numerics.activations import codes_per_token, round_dynamic
from harness.quantization.numerics.weights import QuantizedWeight

CPU = torch.device("cpu")
INT8 = WeightScheme(bits=8, symmetric=True)
FP8 = WeightScheme("fp8_e4m3", 8, scale_dtype="float32")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(scheme: WeightScheme, rows: int = 48, columns: int = 64) -> QuantizedWeight:
    values = torch.randn(rows, columns, generator=rng(0)) * 0.05
    return plugins.build("rounding", "rtn", {"grid": "awq"}).round_layer(
        "q", values, None, scheme, rng(1)
    )


def inputs(*shape: int) -> torch.Tensor:
    x = torch.randn(*(shape or (2, 9, 64)), generator=rng(2))
    x[..., 3] *= 40
    return x


def both(
    scheme: WeightScheme, activation: ActivationScheme, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = torch.randn(48, generator=rng(3))
    made = [
        QuantizedLinear(
            weight(scheme), bias, torch.float32, CPU, ActivationQuantizer(activation), mode
        )
        for mode in ("dense", "native")
    ]
    assert torch.allclose(made[0].weight, made[1].weight, rtol=1e-6)
    with torch.no_grad():
        return made[0](x), made[1](x)


@pytest.mark.parametrize("grid", ["smoothquant", "compressed", "llama_quant"])
def test_int8_equals_its_simulation(grid: str) -> None:
    simulated, native = both(INT8, ActivationScheme(grid=grid), inputs())
    assert torch.allclose(native, simulated, rtol=1e-5, atol=1e-5 * float(simulated.abs().max()))


def test_fp8_equals_its_simulation() -> None:
    simulated, native = both(FP8, ActivationScheme("fp8_e4m3"), inputs())
    assert torch.allclose(native, simulated, rtol=1e-4, atol=1e-4 * float(simulated.abs().max()))


def test_integer_sums_are_exact() -> None:
    """Codes and scales are powers of two: nothing rounds, so simulation in float64 and the integer product have the same bits."""
    activation = ActivationScheme()
    x = torch.randint(-127, 128, (5, 64), generator=rng(4)).float()
    x[:, 0] = 127.0  # scale 1
    codes, scale = codes_per_token(x, activation)
    assert torch.equal(codes.float(), x) and torch.equal(scale, torch.ones(5, 1))
    held = weight(INT8)
    native = QuantizedLinear(
        held, None, torch.float32, CPU, ActivationQuantizer(activation), "native"
    )
    integers = native.get_buffer("codes").double()
    expected = (x.double() @ integers.T).float() * native.get_buffer("scale")
    assert torch.equal(native(x), expected)


@pytest.mark.parametrize(
    "activation",
    [
        ActivationScheme(),
        ActivationScheme(grid="llama_quant"),
        ActivationScheme(grid="compressed"),
        ActivationScheme("fp8_e4m3"),
    ],
)
def test_codes_times_scales_are_the_rounded_activations(activation: ActivationScheme) -> None:
    codes, scale = codes_per_token(inputs(), activation)
    assert torch.equal(codes.float() * scale, round_dynamic(inputs(), activation))


def test_one_token_and_none() -> None:
    for x in (inputs(1, 1, 64), inputs(0, 64)):
        simulated, native = both(INT8, ActivationScheme(), x)
        assert native.shape == simulated.shape and torch.allclose(native, simulated, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "activation"),
    [
        (WeightScheme(bits=8), ActivationScheme()),  # zero points
        (WeightScheme(bits=8, group_size=16, symmetric=True), ActivationScheme()),
        (WeightScheme(bits=4, symmetric=True), ActivationScheme()),
        (INT8, ActivationScheme(bits=4)),
        (INT8, ActivationScheme(granularity="tensor")),
        (INT8, ActivationScheme(outlier_threshold=6.0)),
        (INT8, ActivationScheme("fp8_e5m2")),
        (INT8, ActivationScheme("fp8_e4m3")),  # codes up to 127 are not all in E4M3
        (INT8, None),
    ],
)
def test_other_formats_are_refused_and_nothing_is_substituted(
    scheme: WeightScheme, activation: ActivationScheme | None
) -> None:
    quantizer = None if activation is None else ActivationQuantizer(activation)
    with pytest.raises(MethodError, match="use mode dense"):
        QuantizedLinear(weight(scheme), None, torch.float32, CPU, quantizer, "native")


@pytest.mark.parametrize(
    ("scheme", "activation"), [(INT8, ActivationScheme()), (FP8, ActivationScheme("fp8_e4m3"))]
)
def test_a_whole_model_agrees(
    scheme: WeightScheme, activation: ActivationScheme, tiny_model: Any, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    own = replace(
        cell(folder, Method("rtn", rounding=part("rtn", grid="awq"))),
        scheme=Scheme("w8a8", scheme, activation),
    )
    quantize([own], folder, tmp_path / "store")
    with torch.no_grad():
        checkpoint = tmp_path / "store" / quantize_key(own)
        simulated, native = (
            load(own, folder, checkpoint, mode=mode)[0](windows(2)).logits
            for mode in ("dense", "native")
        )
    # a sum in another order moves some activation to the neighbouring code of the next layer
    assert float((native - simulated).abs().mean() / simulated.abs().mean()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("scheme", "activation", "bound"),
    [(INT8, ActivationScheme(), 1e-5), (FP8, ActivationScheme("fp8_e4m3"), 1e-2)],
)
def test_on_a_card(scheme: WeightScheme, activation: ActivationScheme, bound: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    dense, native = (
        QuantizedLinear(
            weight(scheme), None, torch.float32, device, ActivationQuantizer(activation), mode
        )
        for mode in ("dense", "native")
    )
    for x in (inputs(2, 9, 64).to(device), inputs(1, 1, 64).to(device)):
        expected, found = dense(x), native(x)
        assert float((found - expected).abs().max() / expected.abs().max()) < bound
