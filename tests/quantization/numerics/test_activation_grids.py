"""OmniQuant's grid of activations, and gradients through every grid."""

from __future__ import annotations

import pytest
import torch

from harness.core.cell import ActivationScheme
from harness.core.errors import MethodError
from harness.quantization.inference.activations import ActivationQuantizer
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
