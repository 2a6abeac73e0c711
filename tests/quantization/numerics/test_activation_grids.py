"""OmniQuant's grid of activations, and gradients through every grid."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from harness.core.cell import ActivationScheme, Cell, Method, Model, Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import LinearShape, Shapes
from harness.evaluation.protocols import depends_on_company
from harness.quantization.inference.activations import ActivationQuantizer, check
from harness.quantization.methods import rtn, spinquant
from harness.quantization.numerics.activations import GRIDS, round_dynamic
from harness.quantization.numerics.training import round_through


def inputs() -> torch.Tensor:
    return torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0)) + 3


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_range_need_not_hold_zero(bits: int) -> None:
    x = inputs() + 10  # no value near zero: a range that holds it wastes codes
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (hi - lo) / (2**bits - 1)
    zero = torch.round(-lo / scale)
    expected = scale * ((torch.round(x / scale) + zero).clamp(0, 2**bits - 1) - zero)
    found = round_dynamic(x, ActivationScheme(bits=bits, symmetric=False, grid="omniquant"))
    assert torch.allclose(found, expected, rtol=1e-6)
    other = round_dynamic(x, ActivationScheme(bits=bits, symmetric=False))
    assert float((found - x).norm()) < 0.5 * float((other - x).norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["token", "tensor", "group"])
@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_through_changes_no_number_and_lets_gradients_pass(
    grid: str, granularity: str, symmetric: bool
) -> None:
    if grid == "omniquant" and symmetric:
        pytest.skip("asymmetric only")
    scheme = ActivationScheme(
        bits=4, grid=grid, granularity=granularity, group_size=16, symmetric=symmetric
    )
    x = inputs().requires_grad_()
    plain, through = round_dynamic(x.detach(), scheme), round_dynamic(x, scheme, round_through)
    assert torch.equal(plain, through)
    (gradient,) = torch.autograd.grad(through.sum(), x)
    assert float((gradient != 0).float().mean()) > 0.5


def test_a_symmetric_omniquant_grid_is_refused() -> None:
    with pytest.raises(MethodError, match="asymmetric only"):
        ActivationQuantizer(ActivationScheme(grid="omniquant"))


# --- blocks of channels in MXFP4 and NVFP4 ---

MXFP4 = ActivationScheme("mxfp4", 4, "group", 32)
NVFP4 = ActivationScheme("nvfp4", 4, "group", 16)
OF_WEIGHTS = {
    "mxfp4": WeightScheme("mxfp4", 4, 32, scale_dtype="e8m0"),
    "nvfp4": WeightScheme("nvfp4", 4, 16, scale_dtype="float8_e4m3"),
}


@pytest.mark.parametrize("scheme", [MXFP4, NVFP4])
def test_a_sequence_is_rounded_as_a_weight_matrix_is(scheme: ActivationScheme) -> None:
    """Elements, block scales and the scale of the whole by the same rules, to the bit."""
    x = inputs()[0] * torch.logspace(-3, 3, 64)
    x[3, :32] = 0
    nearest = rtn.Rounding(rtn.Rounding.Settings())
    rng = torch.Generator()
    weight = nearest.round_layer("q", x, None, OF_WEIGHTS[scheme.format], rng)
    assert torch.equal(round_dynamic(x, scheme), weight.dequantize())
    assert not round_dynamic(torch.zeros(4, 64), scheme).any()


@pytest.mark.parametrize("scheme", [MXFP4, NVFP4])
def test_an_item_is_rounded_alike_in_every_batch(scheme: ActivationScheme) -> None:
    x = inputs()
    x[1] *= 1e4
    together = round_dynamic(x, scheme)
    assert torch.equal(together[:1], round_dynamic(x[:1], scheme))
    assert 0.01 < float((together - x).norm() / x.norm()) < 0.25
    half = round_dynamic(x[:1].half(), scheme)
    assert half.dtype == torch.float16
    assert float((half.float() - x[:1]).norm() / x[:1].norm()) < 0.25


@pytest.mark.parametrize("scheme", [MXFP4, NVFP4])
def test_what_is_no_number_stays_none(scheme: ActivationScheme) -> None:
    x = inputs()
    x[0, 2, 5], x[1, 3, 40] = torch.nan, torch.inf
    rounded = round_dynamic(x, scheme)
    assert bool(rounded[0, 2, 5].isnan()) and not bool(rounded[1, 3, 40].isfinite())
    assert bool(rounded[0, 3].isfinite().all())


def test_a_calibrated_scale_of_the_whole_is_the_largest_magnitude() -> None:
    x = inputs()
    quantizer = ActivationQuantizer(dataclasses.replace(NVFP4, dynamic=False), "q")
    with pytest.raises(MethodError, match="need calibration data"):
        quantizer(x)
    quantizer.observing = True
    assert quantizer(x) is x and quantizer(2 * x[:1]) is not None
    quantizer.observing = False
    largest = max(float(x.abs().max()), 2 * float(x[:1].abs().max()))
    widened = torch.cat((x[0], torch.full((1, 64), largest)))
    assert torch.equal(quantizer(x[0]), round_dynamic(widened, NVFP4)[:-1])
    beyond = quantizer(100 * x)  # block scales end at 448 times the whole's
    assert float(beyond.abs().max()) == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "fields", "reason"),
    [
        (MXFP4, {"group_size": 16}, "activation.group_size=32"),
        (NVFP4, {"granularity": "token"}, "activation.granularity=group"),
        (NVFP4, {"bits": 8}, "activation.bits=4"),
        (MXFP4, {"dynamic": False}, "activation.dynamic=true"),
        (NVFP4, {"symmetric": False}, "no zero points"),
        (NVFP4, {"outlier_threshold": 6.0}, "outliers"),
    ],
)
def test_schemes_that_contradict_their_format_are_refused(
    scheme: ActivationScheme, fields: dict[str, Any], reason: str
) -> None:
    linear = LinearShape("self_attn.q_proj", 64, 64, "qkv")
    shapes = Shapes("llama", 1, (linear,), (), 64, 4, 4, 16, 0)
    weight = WeightScheme(bits=4)
    for dynamic in (True, False) if scheme is NVFP4 else (True,):
        plain = Scheme("s", weight, dataclasses.replace(scheme, dynamic=dynamic))
        assert check(plain, shapes) == []
    changed = Scheme("s", weight, dataclasses.replace(scheme, **fields))
    assert any(reason in problem for problem in check(changed, shapes))
    odd = dataclasses.replace(shapes, linears=(dataclasses.replace(linear, in_features=72),))
    assert any("72" in problem for problem in check(Scheme("s", weight, scheme), odd))
    expert = dataclasses.replace(shapes, linears=(dataclasses.replace(linear, expert=True),))
    assert bool(check(Scheme("s", weight, scheme), expert)) is (scheme is NVFP4)


def test_methods_that_learn_refuse_them_and_batches_are_known_to_matter() -> None:
    linear = LinearShape("self_attn.q_proj", 64, 64, "qkv")
    shapes = Shapes(
        "llama", 1, (linear,), (), 64, 4, 4, 16, 0, rotations=True, ends=("e", "n", "h")
    )
    scheme = Scheme("s", WeightScheme(bits=4, symmetric=True), NVFP4)
    reasons = spinquant.Transform(spinquant.Transform.Settings()).check(scheme, shapes)
    assert any("no gradient" in reason for reason in reasons)

    def cell(activation: ActivationScheme) -> Cell:
        return Cell(Model("m", "m"), Method("none"), Scheme("s", WeightScheme(), activation))

    assert depends_on_company(cell(NVFP4)) and not depends_on_company(cell(MXFP4))
    assert not depends_on_company(cell(dataclasses.replace(NVFP4, dynamic=False)))
