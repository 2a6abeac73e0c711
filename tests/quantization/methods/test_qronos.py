"""Qronos: GPTQ where the two models' inputs agree, least squares where bits are many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence import FakeEvidence, HessianEvidence, correlated_inputs, generator, random_weight
from torch import Tensor

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.core.errors import ConfigError, MethodError
from harness.quantization.numerics import grids

WIDTH = 64


def two_streams(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Inputs in the full-precision model and behind rounded blocks, [sequences, length, width] each."""
    full = correlated_inputs(width, sequences=8)
    mix = torch.eye(width) + 0.05 * torch.randn(width, width, generator=generator(8))
    return full, full @ mix + 0.05 * torch.randn(full.shape, generator=generator(7))


def evidence_of(full: Tensor, behind: Tensor) -> FakeEvidence:
    return FakeEvidence(behind, original=full, needs=("hessian", "cross"))


def rounded(
    method: str, weight: Tensor, evidence: Any, bits: int = 3, group_size: int = -1, **settings: Any
) -> Tensor:
    scheme = WeightScheme("int", bits, group_size, False, "float32")
    found = plugins.build("rounding", method, settings).round_layer(
        "mlp.up_proj", weight, evidence, scheme, generator()
    )
    return found.dequantize()


def errors(weight: Tensor, found: Tensor, full: Tensor, behind: Tensor) -> float:
    x, y = (each.reshape(-1, weight.shape[1]).double() for each in (full, behind))
    target = x @ weight.double().T
    return float((y @ found.double().T - target).square().sum() / target.square().sum())


@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (3, -1), (2, -1), (3, 16)])
def test_equal_streams_give_gptq_with_the_same_damping(bits: int, group_size: int) -> None:
    _, behind = two_streams()
    weight, evidence = random_weight(64, WIDTH), evidence_of(behind, behind)
    hessian = evidence["hessian"].double()
    damping = 1e-3  # well above float noise in GPTQ's own factor
    fraction = damping * float(torch.linalg.eigvalsh(hessian).max() / hessian.diagonal().mean())
    expected = rounded(
        "gptq", weight, evidence, bits, group_size, damping_fraction=fraction, static_groups=True
    )
    found = rounded(
        "qronos",
        weight,
        evidence,
        bits,
        group_size,
        damping=damping,
        act_order=False,
        fit="original",
    )
    same = (found - expected).abs() <= 1e-5 * expected.abs().max()
    assert float(same.float().mean()) >= 0.995
    assert errors(weight, found, behind, behind) == pytest.approx(
        errors(weight, expected, behind, behind), rel=0.02
    )


class TwoMoments(HessianEvidence):
    def __init__(self, hessian: Tensor, cross: Tensor) -> None:
        super().__init__(hessian)
        self._needs.add("cross")
        self._statistics["cross"] = cross


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_inputs_without_correlation_leave_round_to_nearest(
    act_order: bool, group_size: int
) -> None:
    weight, eye = random_weight(32, WIDTH), torch.eye(WIDTH)
    found = rounded("qronos", weight, TwoMoments(eye, eye), 3, group_size, act_order=act_order)
    expected = rounded("rtn", weight, None, 3, group_size)
    close = (found - expected).abs() <= 1e-5 * expected.abs().max()
    assert float(close.float().mean()) > 0.999


def test_with_many_bits_it_is_least_squares_for_all_columns_but_the_first() -> None:
    full, behind = two_streams()
    weight, evidence = random_weight(32, WIDTH), evidence_of(full, behind)
    h, g, w = (m.double() for m in (evidence["hessian"], evidence["cross"], weight))
    first = (w @ g[:, 0] - w[:, 1:] @ h[0, 1:]) / h[0, 0]
    rest = (w @ g[:, 1:] - first[:, None] * h[0, 1:]) @ torch.linalg.inv(h[1:, 1:])
    limit = errors(weight, torch.cat((first[:, None], rest), dim=1), full, behind)
    few, many = (
        errors(weight, rounded("qronos", weight, evidence, bits, 16, act_order=False), full, behind)
        for bits in (4, 8)
    )
    assert many == pytest.approx(limit, rel=0.1) and many < few
    # rounding the inputs' difference away is worth more than bits
    assert many < 0.5 * errors(weight, rounded("gptq", weight, evidence, 8, 16), full, behind)


@pytest.mark.parametrize("group_size", [-1, 16])
def test_the_first_column_is_rounded_before_the_others_are_solved(group_size: int) -> None:
    """The two steps as the paper has them, q_0 in the least squares, against one solution and GPTQ's loop over all columns."""
    full, behind = two_streams()
    weight, evidence = random_weight(32, WIDTH), evidence_of(full, behind)
    damping = 1e-4
    found = rounded(
        "qronos", weight, evidence, 3, group_size, act_order=False, damping=damping, fit="original"
    )
    h, g, w = (m.double() for m in (evidence["hessian"], evidence["cross"], weight))
    eye = damping * torch.linalg.eigvalsh(h).max() * torch.eye(WIDTH, dtype=h.dtype)
    size = WIDTH if group_size == -1 else group_size
    grid = [grids.fit(weight[:, a : a + size], 3, False) for a in range(0, WIDTH, size)]
    expected = torch.empty_like(w)

    def nearest(column: int, values: Tensor) -> Tensor:
        return grid[column // size].nearest(values.float()[:, None])[:, 0].double()

    expected[:, 0] = nearest(0, (w @ g[:, 0] - w[:, 1:] @ h[0, 1:]) / h[0, 0])
    inverse = torch.linalg.inv(h[1:, 1:] + eye[1:, 1:])
    rest = (w @ (g + eye)[:, 1:] - expected[:, :1] * h[0, 1:]) @ inverse
    upper = torch.linalg.cholesky(inverse, upper=True)
    for j in range(WIDTH - 1):
        expected[:, j + 1] = nearest(j + 1, rest[:, j])
        rest[:, j:] -= (rest[:, j] - expected[:, j + 1])[:, None] / upper[j, j] * upper[j, j:]
    same = (found - expected).abs() <= 1e-5 * expected.abs().max()
    assert float(same.float().mean()) > 0.99
    assert errors(weight, found, full, behind) == pytest.approx(
        errors(weight, expected, full, behind), rel=0.02
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_it_comes_closer_than_gptaq_and_gptq(bits: int, group_size: int) -> None:
    full, behind = two_streams()
    weight, evidence = random_weight(64, WIDTH), evidence_of(full, behind)
    qronos, ordered, gptaq, gptq = (
        errors(weight, rounded(name, weight, evidence, bits, group_size, **own), full, behind)
        for name, own in (
            ("qronos", {"act_order": False}),
            ("qronos", {}),
            ("gptaq", {}),
            ("gptq", {}),
        )
    )
    assert min(qronos, ordered) < gptaq < gptq


def test_block_sizes_change_nothing_and_powers_of_two_neither() -> None:
    full, behind = two_streams()
    weight = random_weight(32, WIDTH)
    found = rounded("qronos", weight, evidence_of(full, behind))
    for other in (
        rounded("qronos", weight, evidence_of(full, behind), block_size=1),
        rounded("qronos", weight, evidence_of(full * 16, behind * 16)),
    ):
        assert float((found != other).float().mean()) < 0.01


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_end_at_zero_and_a_dead_layer_is_rounded_too(act_order: bool) -> None:
    full, behind = two_streams()
    behind[..., [0, 40]] = 0
    weight = random_weight(16, WIDTH)
    found = rounded("qronos", weight, evidence_of(full, behind), 3, 16, act_order=act_order)
    assert not found[:, [0, 40]].any() and bool(torch.isfinite(found).all())
    nothing = torch.zeros_like(behind)
    assert not rounded("qronos", weight, evidence_of(nothing, nothing), act_order=act_order).any()


def test_what_breaks_down_says_so() -> None:
    full, behind = two_streams()
    with pytest.raises(MethodError, match="NaN or infinity"):
        rounded("qronos", random_weight(8, WIDTH), evidence_of(full, behind / 0))
    negative = -torch.eye(WIDTH)
    negative[0, 0] = 5.0
    with pytest.raises(MethodError, match="larger damping"):
        rounded("qronos", random_weight(8, WIDTH), TwoMoments(negative, negative))
    for settings in ({"damping": 0.0}, {"fit": "moved"}, {"block_size": 0}):
        with pytest.raises(ConfigError):
            plugins.build("rounding", "qronos", settings)


def test_the_scale_of_a_whole_matrix_follows_what_its_groups_are_fitted_on() -> None:
    """A target of twice the matrix: nvfp4's factor of the matrix itself would cut the groups that hold its largest weights."""
    _, behind = two_streams()
    hessian = evidence_of(behind, behind)["hessian"]
    weight, scheme = random_weight(32, WIDTH), WeightScheme("nvfp4", 4, 16, False, "float8_e4m3")
    method = plugins.build("rounding", "qronos", {})
    found = method.round_layer("q", weight, TwoMoments(hessian, 2 * hessian), scheme, generator())
    assert float(found.dequantize().abs().max()) > 1.5 * float(weight.abs().max())
