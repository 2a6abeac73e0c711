"""Kernels agree with simulation: exactly in integers, up to the order of a sum and one rounding in floats."""

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
from harness.quantization.inference import kernels
from harness.quantization.inference.activations import ActivationQuantizer
from harness.quantization.inference.kernels.protocols import Kernel
from harness.quantization.inference.linear import QuantizedLinear
from harness.quantization.inference.load import load
from harness.quantization.numerics.activations import codes_per_token, round_dynamic
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

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


# --- weights alone: bfloat16 inputs times 4 or 8 bits ---


BF16 = torch.bfloat16
INT4 = WeightScheme(bits=4, group_size=32, scale_dtype="bfloat16")


def random_codes(
    bits: int, group: int, zeros: bool, rows: int = 64, columns: int = 256
) -> UniformWeight:
    """Codes over the whole range, scales of either sign that bfloat16 holds, any zero points: no fault stays hidden."""
    generator = rng(bits + group)
    size = columns if group == -1 else group
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, columns // size, generator=generator) + 0.5) * 0.02
    scale *= torch.where(torch.rand(scale.shape, generator=generator) < 0.3, -1.0, 1.0)
    zero = torch.randint(0, 2**bits, scale.shape, generator=generator).float() if zeros else None
    return UniformWeight(codes, scale.to(BF16).float(), zero, bits, "bfloat16")


def prepared(held: UniformWeight) -> tuple[Kernel, dict[str, torch.Tensor]]:
    found = kernels.choose(held, None, BF16, CPU)
    return found, found.prepare(held, CPU)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("zeros", [False, True])
def test_int4pack_holds_the_codes(group: int, zeros: bool) -> None:
    held = random_codes(4, group, zeros)
    kernel, buffers = prepared(held)
    assert kernel.name == "int4pack"
    difference = (kernel.dequantize(buffers) - held.dequantize()).abs()
    # offsets are bfloat16: exact without zero points, else within a 32nd of a step
    step = held.scale.abs().repeat_interleave(group, dim=1)
    assert bool((difference <= (step / 32 if zeros else torch.zeros_like(step))).all())


def test_int8pack_holds_the_codes() -> None:
    held = random_codes(8, -1, False)
    kernel, buffers = prepared(held)
    assert kernel.name == "int8pack" and torch.equal(kernel.dequantize(buffers), held.dequantize())


@pytest.mark.parametrize(
    ("bits", "group", "zeros"), [(4, 32, True), (4, 128, False), (8, -1, False)]
)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_product_is_rounded_once(bits: int, group: int, zeros: bool, rows: int) -> None:
    """|y - ref| ≤ u|ref| + n 2^-24 Σ|x w|: a wrong zero point of one group in 256 breaks it."""
    held = random_codes(bits, group, zeros)
    kernel, buffers = prepared(held)
    x = torch.randn(rows, 256, generator=rng(9)).to(BF16)
    weight = kernel.dequantize(buffers).double()
    expected = x.double() @ weight.T
    bound = 2**-8 * expected.abs() + 256 * 2**-24 * (x.double().abs() @ weight.abs().T)
    assert bool(((kernel.multiply(x, buffers, None).double() - expected).abs() <= bound).all())


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, -1)])
def test_a_row_does_not_depend_on_its_batch(bits: int, group: int) -> None:
    kernel, buffers = prepared(random_codes(bits, group, False))
    x = torch.randn(16, 256, generator=rng(9)).to(BF16)
    together = kernel.multiply(x, buffers, None)
    alone = torch.cat([kernel.multiply(row[None], buffers, None) for row in x])
    assert torch.equal(together, alone)


def test_a_planted_fault_is_seen_in_the_weights() -> None:
    """A zero point of one group off by one, scales of two groups exchanged."""
    held = random_codes(4, 32, True)
    kernel, _ = prepared(held)
    assert held.zero is not None
    zero, scale = held.zero.clone(), held.scale.clone()
    zero[5, 3] += 1
    scale[7, [1, 2]] = scale[7, [2, 1]]
    for wrong, row in ((replace(held, zero=zero), 5), (replace(held, scale=scale), 7)):
        difference = (kernel.dequantize(kernel.prepare(wrong, CPU)) - held.dequantize()).abs()
        step = held.scale.abs().repeat_interleave(32, dim=1)
        assert (difference > step / 32).any(dim=1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize(
    ("held", "dtype", "reason"),
    [
        (random_codes(4, 32, False, rows=24), BF16, "out_features 24 is no multiple of 16"),
        (random_codes(8, -1, False, columns=24), BF16, "in_features that are a multiple of 16"),
        (random_codes(4, 16, False), BF16, "groups of 16"),
        (random_codes(3, 32, False), BF16, "3 bits"),
        (random_codes(4, 32, False), torch.float32, "bfloat16 alone"),
        (replace(random_codes(4, 32, False), column_group=torch.arange(256)), BF16, "act_order"),
        (
            replace(random_codes(4, 32, False), scale=torch.full((64, 8), 1 + 2**-10)),
            BF16,
            "not exact in bfloat16",
        ),
    ],
)
def test_what_a_kernel_cannot_hold_is_refused(
    held: UniformWeight, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(MethodError, match=reason):
        QuantizedLinear(held, None, dtype, CPU, None, "native")


def test_a_kernel_can_be_asked_for_by_name() -> None:
    held = random_codes(4, 32, False)
    made = QuantizedLinear(held, None, BF16, CPU, None, "native:int4pack")
    assert made.kernel is not None and made.kernel.name == "int4pack"
    with pytest.raises(MethodError, match="int8pack"):
        QuantizedLinear(held, None, BF16, CPU, None, "native:int8pack")
    with pytest.raises(MethodError, match="int4pack"):
        QuantizedLinear(held, None, BF16, CPU, None, "native:int4pac")


def test_nothing_but_the_codes_is_loaded() -> None:
    held = random_codes(4, 32, True)
    made = QuantizedLinear(held, None, BF16, CPU, None, "native")
    loaded = sum(b.numel() * b.element_size() for b in made.buffers())
    assert loaded == held.codes.numel() * (4 / 8 + 4 / 32)  # codes; scale and offset in bfloat16


@pytest.mark.parametrize(
    "scheme", [INT4, WeightScheme(bits=8, symmetric=True, scale_dtype="bfloat16")]
)
def test_a_model_of_native_products_is_as_near_as_a_dense_one(
    scheme: WeightScheme, tiny_model: Any, tmp_path: Path
) -> None:
    """KL to the simulation in float32 is at most twice that of dequantized bfloat16 matrices."""
    folder = tiny_model("llama", hidden_size=64, intermediate_size=128)
    own = replace(
        cell(folder, Method("rtn", rounding=part("rtn", grid="awq"))), scheme=Scheme("w", scheme)
    )
    quantize([own], folder, tmp_path / "store")
    checkpoint = tmp_path / "store" / quantize_key(own)
    half = replace(own, model=replace(own.model, dtype="bfloat16"))
    tokens = torch.randint(0, 259, (8, 128), generator=rng(5))

    def log_probabilities(cell_: Any, mode: str) -> torch.Tensor:
        with torch.no_grad():
            logits = load(cell_, folder, checkpoint, mode=mode)[0](tokens).logits
        return logits.float().log_softmax(-1).flatten(0, 1)

    exact = log_probabilities(own, "dense")

    def divergence(mode: str) -> float:
        other = log_probabilities(half, mode)
        return float((exact.exp() * (exact - other)).sum(-1).mean())

    assert divergence("native") <= 2 * divergence("dense")
