"""Uniform grids: what every convention promises, and where conventions differ by design."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.quantization.numerics import grids

KINDS = [
    (convention, symmetric)
    for convention in ("gptq", "awq", "omniquant")
    for symmetric in (False, True)
]
KINDS.append(("compressed", True))
BITS = st.integers(2, 8)


def values_of(seed: int, rows: int = 4, width: int = 16, shift: float = 0.0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + shift


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=BITS,
    kind=st.sampled_from(KINDS),
    shift=st.sampled_from([0.0, 5.0, -5.0]),
)
def test_codes_are_whole_numbers_of_the_width_and_values_are_found_again(
    seed: int, bits: int, kind: tuple[str, bool], shift: float
) -> None:
    convention, symmetric = kind
    values = values_of(seed, shift=shift)
    grid = grids.fit(values, bits, symmetric, convention)
    codes = grid.quantize(values)
    assert codes.shape == values.shape and bool((codes == codes.round()).all())
    assert 0 <= codes.min() and codes.max() <= grid.top == 2**bits - 1
    assert grid.scale.shape == grid.zero.shape == (4, 1)
    assert bool((grid.scale > 0).all()) and bool((grid.zero == grid.zero.round()).all())
    # A grid value is its own nearest grid value.
    nearest = grid.nearest(values)
    torch.testing.assert_close(grid.nearest(nearest), nearest, rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), bits=BITS, kind=st.sampled_from(KINDS))
def test_unclipped_values_move_by_at_most_half_a_step(
    seed: int, bits: int, kind: tuple[str, bool]
) -> None:
    convention, symmetric = kind
    values = values_of(seed)
    grid = grids.fit(values, bits, symmetric, convention)
    unclipped = (torch.round(values / grid.scale) + grid.zero).clamp(0, grid.top) == torch.round(
        values / grid.scale
    ) + grid.zero
    moved = (grid.nearest(values) - values).abs() / grid.scale
    assert bool((moved[unclipped] <= 0.5 + 1e-4).all())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), bits=BITS, power=st.integers(-6, 6), kind=st.sampled_from(KINDS)
)
def test_powers_of_two_scale_through(
    seed: int, bits: int, power: int, kind: tuple[str, bool]
) -> None:
    convention, symmetric = kind
    values = values_of(seed)
    nearest = grids.fit(values, bits, symmetric, convention).nearest(values)
    scaled = values * 2.0**power
    assert torch.equal(
        grids.fit(scaled, bits, symmetric, convention).nearest(scaled), nearest * 2.0**power
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=BITS,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(["float16", "bfloat16"]),
)
def test_scales_are_exact_in_their_storage_type(
    seed: int, bits: int, kind: tuple[str, bool], dtype: str
) -> None:
    convention, symmetric = kind
    grid = grids.fit(values_of(seed) * 1e-3, bits, symmetric, convention, dtype)
    assert torch.equal(grid.scale.to(grids.SCALE_DTYPES[dtype]).float(), grid.scale)


@pytest.mark.parametrize(("convention", "symmetric"), KINDS)
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, 1e-12, 7.0, -7.0, 1e5])
def test_constant_groups_have_a_usable_grid(
    convention: str, symmetric: bool, scale_dtype: str, value: float
) -> None:
    values = torch.full((2, 8), value)
    grid = grids.fit(values, 4, symmetric, convention, scale_dtype)
    assert bool(torch.isfinite(grid.scale).all()) and bool((grid.scale > 0).all())
    nearest = grid.nearest(values)
    assert bool(torch.isfinite(nearest).all())
    if value == 0:
        assert not nearest.any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_is_a_grid_value_where_the_convention_says_so(bits: int) -> None:
    for shift in (0.0, 3.0, -3.0):
        values = values_of(1, shift=shift)
        zeros = torch.zeros_like(values)
        for convention, symmetric in KINDS:
            if convention == "omniquant" and not symmetric:
                continue  # its zero point may lie outside the codes
            assert not grids.fit(values, bits, symmetric, convention).nearest(zeros).any()


def test_hand_computed_grids() -> None:
    row = torch.tensor([[-1.0, 0.0, 2.0]])
    grid = grids.fit(row, 2, False, "gptq")  # scale 3/3, zero round(1)
    assert (grid.scale.item(), grid.zero.item()) == (1.0, 1.0)
    grid = grids.fit(row, 2, True, "gptq")  # -2..2 over 3 steps; codes reach 1 step above zero
    assert (grid.scale.item(), grid.zero.item()) == (pytest.approx(4 / 3), 2.0)
    assert grid.nearest(row)[0, 2].item() == pytest.approx(4 / 3)
    positive = torch.tensor([[1.0, 4.0]])
    grid = grids.fit(positive, 2, False, "awq")  # zero clamp(-1) = 0: 4 becomes 3
    assert (grid.scale.item(), grid.zero.item(), grid.nearest(positive)[0, 1].item()) == (
        1.0,
        0.0,
        3.0,
    )
    grid = grids.fit(positive, 2, False, "omniquant")  # zero -1 is allowed: both ends exact
    assert (grid.zero.item(), grid.nearest(positive).tolist()) == (-1.0, [[1.0, 4.0]])
    grid = grids.fit(positive, 2, False, "gptq")  # range widened to 0..4
    assert grid.scale.item() == pytest.approx(4 / 3)
    assert grids.fit(positive, 4, True, "awq").scale.item() == pytest.approx(4 / 7)
    assert grids.fit(positive, 4, True, "compressed").scale.item() == pytest.approx(8 / 15)


def test_a_row_without_negative_weights_loses_half_of_the_symmetric_gptq_grid() -> None:
    """As in the authors' code: lo stays 0, so the step is max/Q and codes above zero reach less than half of the maximum."""
    row = torch.linspace(0.1, 1.5, 16)[None]
    assert grids.fit(row, 4, True, "gptq").nearest(row).max().item() == pytest.approx(0.7)
    assert grids.fit(row, 4, True, "awq").nearest(row).max().item() == pytest.approx(1.5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(2, 4), kind=st.sampled_from(KINDS))
def test_a_searched_range_never_loses(seed: int, bits: int, kind: tuple[str, bool]) -> None:
    convention, symmetric = kind
    values = values_of(seed, width=32)
    plain, searched = (
        grids.fit(values, bits, symmetric, convention),
        grids.shrink_range(values, bits, symmetric, convention),
    )
    errors = [(grid.nearest(values) - values).abs().pow(2.4).sum(-1) for grid in (plain, searched)]
    assert bool((errors[1] <= errors[0]).all())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=BITS,
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    shift=st.sampled_from([0.0, 0.5, 5.0, -5.0]),
)
def test_signed_grids_hold_the_largest_weight_with_its_sign(
    seed: int, bits: int, dtype: str, shift: float
) -> None:
    values = values_of(seed, rows=16, shift=shift)
    grid = grids.fit(values, bits, True, "signed", dtype)
    assert torch.equal(grid.scale.to(grids.SCALE_DTYPES[dtype]).float(), grid.scale)
    assert bool((grid.zero == 2 ** (bits - 1)).all())
    place = values.abs().argmax(-1, keepdim=True)
    largest = values.gather(-1, place)
    assert torch.equal(grid.scale < 0, largest > 0)
    codes = grid.quantize(values)
    assert 0 <= codes.min() and codes.max() <= grid.top
    assert not codes.gather(-1, place).any()  # the lowest code
    found = grid.nearest(values)
    rounding = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]  # of the scale
    torch.testing.assert_close(found.gather(-1, place), largest, rtol=rounding, atol=0)
    middle = 2 ** (bits - 1)
    reach = largest.abs() * (middle - 1) / middle  # of the other side
    inside = (values * largest.sign() > 0) | (values.abs() <= reach)
    moved = (found - values).abs() / grid.scale.abs()
    assert bool((moved[inside] <= 0.5 + 2 * middle * rounding).all())


def test_signed_grids_by_hand() -> None:
    rows = torch.tensor([[-1.0, 0.25, 0.5], [-0.5, 0.25, 1.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    grid = grids.fit(rows, 3, True, "signed")
    assert grid.scale[:, 0].tolist() == [0.25, -0.25, -0.25, 1.0]  # the positive end wins a tie
    assert grid.quantize(rows).tolist() == [[0, 5, 6], [6, 3, 0], [7, 4, 0], [4, 4, 4]]
    assert grid.nearest(rows).tolist() == [[-1, 0.25, 0.5], [-0.5, 0.25, 1], [-0.75, 0, 1], [0] * 3]


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [1e-45, 1e-12, 7.0, -7.0, 1e7, -1e7])
def test_signed_grids_of_constant_groups_are_usable(scale_dtype: str, value: float) -> None:
    values = torch.full((2, 8), value)
    grid = grids.fit(values, 4, True, "signed", scale_dtype)
    assert bool((grid.scale.sign() == -values[:, :1].sign()).all())
    assert bool(torch.isfinite(grid.nearest(values)).all())


def test_about_half_of_the_signed_scales_are_negative() -> None:
    grid = grids.fit(values_of(3, rows=2048), 4, True, "signed")
    assert 0.45 < float((grid.scale < 0).float().mean()) < 0.55


def test_unknown_conventions_are_named() -> None:
    with pytest.raises(ValueError, match='no asymmetric grid "compressed"'):
        grids.fit(values_of(0), 4, False, "compressed")
    with pytest.raises(ValueError, match='no symmetric grid "gtpq"'):
        grids.fit(values_of(0), 4, True, "gtpq")
