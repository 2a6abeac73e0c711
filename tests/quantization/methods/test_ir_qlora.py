"""IR-QLoRA: codes say more than NF4's, shifts are stored, and the connections fold into the factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence import correlated_inputs, generator, random_weight
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.quantization.methods.ir_qlora import ShiftedWeight, entropy, resized
from harness.quantization.numerics.weights import NormalFloatWeight, UniformWeight

NF4 = WeightScheme("nf4", 4, 64, scale_dtype="float32")
DOUBLE = WeightScheme("nf4", 4, 64, scale_dtype="double_quantized")


def rounded(
    weight: Tensor, scheme: WeightScheme = NF4, name: str = "ir_qlora", **settings: Any
) -> Any:
    return plugins.build("rounding", name, settings).round_layer(
        "q", weight, None, scheme, generator()
    )


def entropies(weight: Any, count: int = 16, size: int = 64) -> Tensor:
    codes = weight.base.codes if isinstance(weight, ShiftedWeight) else weight.codes
    return entropy(codes.reshape(-1, size), count)


def test_entropy_is_that_of_the_histogram() -> None:
    codes = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1]])
    assert entropy(codes, 4).tolist() == [0.0, 2.0, 1.0]


def test_codes_say_more_than_those_of_nf4() -> None:
    weight = random_weight(64, 256)
    plain, centred, searched = (
        rounded(weight, name="nf4"),
        rounded(weight, shift_steps=0),
        rounded(weight),
    )
    assert isinstance(plain, NormalFloatWeight) and isinstance(searched, ShiftedWeight)
    assert float(entropies(searched).mean()) > float(entropies(plain).mean())
    assert bool((entropies(searched) >= entropies(centred)).all()), (
        "the median itself is among the shifts"
    )
    assert float(entropies(searched).max()) <= 4


def test_the_chosen_shift_is_the_best_of_the_grid() -> None:
    weight, steps = random_weight(4, 64), 6
    found = entropies(rounded(weight, shift_steps=steps))
    middle = weight.median(1, keepdim=True).values
    reach = (weight - middle).abs().amax(1, keepdim=True)
    grid = [0.1 * 0.5410872 * k / steps for k in range(-steps, steps + 1)]
    tried = torch.stack([entropies(rounded(weight - middle - f * reach, name="nf4")) for f in grid])
    assert torch.allclose(found, tried.max(0).values, atol=0.15)
    assert torch.allclose(found.mean(), tried.max(0).values.mean(), atol=0.05)


@pytest.mark.parametrize(
    ("scheme", "bits"), [(NF4, 4 + 32 / 64), (DOUBLE, 4 + 8 / 64 + 32 / 16384)]
)
def test_shifts_are_stored_in_eight_bits_and_counted(scheme: WeightScheme, bits: float) -> None:
    weight = rounded(random_weight(128, 256), scheme)
    assert weight.bits_per_weight == pytest.approx(bits + 8 / 64 + 32 / 16384, rel=1e-3)
    tensors, meta = weight.pack()
    assert torch.equal(ShiftedWeight.unpack(tensors, meta).dequantize(), weight.dequantize())


def test_shifted_blocks_are_near_the_weights() -> None:
    weight = random_weight(64, 256)
    errors = [
        float((rounded(weight, name=name).dequantize() - weight).square().mean())
        for name in ("nf4", "ir_qlora")
    ]
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("shape", [(3, 40), (1, 16), (5, 64), (300, 64)])
def test_sizes_that_no_group_divides(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    found = rounded(weight)
    assert found.shape == shape and bool(torch.isfinite(found.dequantize()).all())
    assert float((found.dequantize() - weight).square().sum() / weight.square().sum()) < 0.05


def test_constant_blocks_are_kept() -> None:
    weight = torch.cat((torch.zeros(2, 64), torch.full((2, 64), 0.25)))
    assert torch.allclose(rounded(weight).dequantize(), weight, atol=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integer_ranges_are_scaled_for_entropy(bits: int, symmetric: bool) -> None:
    weight, scheme = random_weight(64, 256), WeightScheme("int", bits, 32, symmetric)
    plain, searched = rounded(weight, scheme, "rtn"), rounded(weight, scheme)
    assert isinstance(searched, UniformWeight)
    gain = entropies(searched, 2**bits, 32) - entropies(plain, 2**bits, 32)
    assert float(gain.min()) >= 0 and float(gain.mean()) > 0, (
        "the whole range is among the candidates"
    )
    ratio = searched.scale / plain.scale
    assert float(ratio.min()) > 0.89 and float(ratio.max()) < 1.11


@pytest.mark.parametrize(("columns", "rows", "rank"), [(64, 32, 8), (64, 160, 64), (48, 20, 8)])
def test_connections_fold_into_the_factors(columns: int, rows: int, rank: int) -> None:
    base = rounded(random_weight(rows, columns), WeightScheme("int", 4, 16))
    linear = plugins.build("tuning", "ir_qlora", {"rank": rank, "adapter_dtype": "float32"}).linear(
        "q", base, None, None
    )
    linear.start(generator())
    x = correlated_inputs(columns)[0]
    assert torch.equal(linear(x), nn.functional.linear(x, base.dequantize())), (
        "no connection and B = 0 at first"
    )
    with torch.no_grad():
        linear.before.fill_(0.7)
        linear.after.fill_(-0.4)
        linear.up.copy_(random_weight(rows, rank, seed=5))
        beside, folded = linear(x), nn.functional.linear(x, linear.stored().dequantize())
    assert torch.allclose(beside, folded, atol=2e-5 * float(beside.abs().max()))
    assert (
        len(list(linear.parameters())) == 4 and linear.before.numel() == linear.after.numel() == 1
    )


def test_widths_change_by_means_and_copies() -> None:
    x = torch.arange(8.0)
    assert resized(x, 4).tolist() == [0.5, 2.5, 4.5, 6.5]
    assert resized(x, 16).tolist() == [v for v in range(8) for _ in range(2)]
    assert resized(torch.arange(6.0), 4).tolist() == [1, 1, 4, 4], (
        "the greatest common divisor of runs"
    )
