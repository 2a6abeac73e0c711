"""GPTQ: what its authors' algorithm promises, and where their code has its own mind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence import (
    FakeBlock,
    FakeEvidence,
    HessianEvidence,
    correlated_inputs,
    generator,
    layer_error,
    random_weight,
)
from torch import Tensor

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.core.errors import ConfigError, MethodError
from harness.quantization.numerics import grids
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight


def gptq(
    weight: Tensor,
    evidence: Any,
    bits: int = 4,
    group_size: int = -1,
    symmetric: bool = False,
    scale_dtype: str = "float32",
    **settings: Any,
) -> UniformWeight:
    method = plugins.build("rounding", "gptq", settings)
    scheme = WeightScheme("int", bits, group_size, symmetric, scale_dtype)
    return method.round_layer("self_attn.q_proj", weight, evidence, scheme, generator())


def rtn(
    weight: Tensor, bits: int = 4, group_size: int = -1, symmetric: bool = False
) -> QuantizedWeight:
    scheme = WeightScheme("int", bits, group_size, symmetric, "float32")
    return plugins.build("rounding", "rtn", {}).round_layer(
        "self_attn.q_proj", weight, None, scheme, generator()
    )


def hessian_of(width: int, seed: int = 0) -> Tensor:
    return FakeEvidence(correlated_inputs(width, sequences=8, seed=seed))["hessian"]


def column_by_column(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, block_size: int
) -> Tensor:
    """The published loop, one column and one row of updates at a time, groups fitted on what the authors' code sees."""
    columns = weight.shape[1]
    h = hessian.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, seen_by_groups = weight.clone(), weight.clone()
    result = torch.zeros_like(weight)
    grid = grids.fit(weight, bits, False)
    for j in range(columns):
        if j % block_size == 0:
            seen_by_groups = w.clone()
        if group_size != -1 and j % group_size == 0:
            grid = grids.fit(seen_by_groups[:, j : j + group_size], bits, False)
        result[:, j] = grid.nearest(w[:, j, None])[:, 0]
        error = (w[:, j] - result[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, None, j:]
    return result


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("settings", [{}, {"act_order": True}])
def test_a_diagonal_hessian_leaves_round_to_nearest(
    symmetric: bool, settings: dict[str, Any]
) -> None:
    weight = random_weight(16, 64)
    diagonal = torch.diag(torch.rand(64, generator=generator(5)) + 0.1)
    for hessian in (torch.eye(64), diagonal):
        found = gptq(weight, HessianEvidence(hessian), symmetric=symmetric, **settings)
        assert torch.equal(found.dequantize(), rtn(weight, symmetric=symmetric).dequantize())
        static = gptq(
            weight,
            HessianEvidence(hessian),
            group_size=16,
            static_groups=True,
            symmetric=symmetric,
            **settings,
        )
        assert torch.equal(
            static.dequantize(), rtn(weight, group_size=16, symmetric=symmetric).dequantize()
        )


@pytest.mark.parametrize("settings", [{}, {"act_order": True}, {"range_search": True}])
def test_powers_of_two_in_the_hessian_change_nothing(settings: dict[str, Any]) -> None:
    weight, hessian = random_weight(16, 64), hessian_of(64)
    first = gptq(weight, HessianEvidence(hessian), group_size=16, **settings)
    assert torch.equal(
        first.dequantize(),
        gptq(weight, HessianEvidence(hessian * 2.0**7), group_size=16, **settings).dequantize(),
    )


def test_the_block_size_matters_only_where_groups_are_smaller() -> None:
    weight, hessian = random_weight(16, 128), hessian_of(128)
    small, large = (
        gptq(weight, HessianEvidence(hessian), block_size=size).dequantize() for size in (16, 128)
    )
    # float noise may move a weight that lies between two codes
    assert float((small != large).float().mean()) < 0.01
    grouped = [
        gptq(weight, HessianEvidence(hessian), group_size=16, block_size=size).dequantize()
        for size in (16, 128)
    ]
    assert float((grouped[0] != grouped[1]).float().mean()) > 0.1


@pytest.mark.parametrize(
    ("bits", "group_size", "block_size"),
    [
        (4, -1, 128),
        (2, -1, 32),
        (3, 16, 16),
        (3, 16, 64),
        (4, 64, 16),
        (4, 48, 32),
        (3, 24, 32),
        (4, 32, 1),
    ],
)
def test_it_equals_the_published_loop(bits: int, group_size: int, block_size: int) -> None:
    columns = 96 if group_size in (48, 24) else 128
    weight, hessian = random_weight(12, columns), hessian_of(columns)
    expected = column_by_column(weight, hessian, bits, group_size, block_size)
    found = gptq(
        weight, HessianEvidence(hessian), bits, group_size, block_size=block_size
    ).dequantize()
    close = (found - expected).abs() <= 1e-5 * expected.abs().max()
    assert float(close.float().mean()) > 0.99
    inputs = correlated_inputs(columns, sequences=8)
    assert layer_error(weight, found, inputs) == pytest.approx(
        layer_error(weight, expected, inputs), rel=0.02
    )


@pytest.mark.parametrize("settings", [{}, {"act_order": True}, {"static_groups": True}])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_dead_columns_become_zero(settings: dict[str, Any], group_size: int) -> None:
    weight, inputs = random_weight(16, 64), correlated_inputs(64)
    inputs[..., [3, 40, 63]] = 0
    found = gptq(weight, FakeEvidence(inputs), group_size=group_size, **settings).dequantize()
    assert bool((found[:, [3, 40, 63]] == 0).all())
    assert bool((found[:, [2, 41, 62]] != 0).any())


def test_a_layer_without_any_input_becomes_zero() -> None:
    weight = random_weight(16, 64)
    assert not gptq(weight, HessianEvidence(torch.zeros(64, 64))).dequantize().any()


def test_after_one_column_the_others_are_the_least_squares_optimum() -> None:
    """Brute force on three columns: eq. 3 is the exact optimum of the rest once the first column is fixed."""
    weight, hessian = torch.tensor([[0.31, -0.72, 1.0]]), hessian_of(3)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(3)
    grid = grids.fit(weight, 3, False)
    first = grid.nearest(weight)[:, :1]
    # minimise (r - w) H (r - w)ᵀ over r_1, r_2 with r_0 = first:  δ_rest = - H_rr⁻¹ H_r0 δ_0
    delta = -torch.linalg.solve(damped[1:, 1:], damped[1:, :1] * (first - weight[:, :1]))
    optimum = weight[:, 1:] + delta.T
    second = grid.nearest(optimum[:, :1])
    delta = -(damped[2, 1] / damped[2, 2]) * (second - optimum[:, :1])
    third = grid.nearest(optimum[:, 1:] + delta)
    found = gptq(weight, HessianEvidence(hessian), bits=3).dequantize()
    torch.testing.assert_close(found, torch.cat((first, second, third), 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize(
    "settings",
    [{}, {"act_order": True}, {"act_order": True, "static_groups": True}, {"range_search": True}],
)
def test_the_layer_error_is_below_that_of_round_to_nearest(
    bits: int, group_size: int, settings: dict[str, Any]
) -> None:
    weight, inputs = random_weight(48, 128), correlated_inputs(128, sequences=8)
    found = gptq(weight, FakeEvidence(inputs), bits, group_size, **settings).dequantize()
    assert layer_error(weight, found, inputs) < 0.8 * layer_error(
        weight, rtn(weight, bits, group_size).dequantize(), inputs
    )


def test_act_order_with_dynamic_groups_keeps_the_group_of_every_column() -> None:
    weight, inputs = random_weight(16, 64), correlated_inputs(64)
    found = gptq(weight, FakeEvidence(inputs), group_size=16, act_order=True)
    assert found.column_group is not None and found.column_group.bincount().tolist() == [16] * 4
    order = FakeEvidence(inputs)["hessian"].diagonal().argsort(descending=True)
    assert found.column_group[order[:16]].eq(0).all()
    again = UniformWeight.unpack(*found.pack())
    assert torch.equal(again.dequantize(), found.dequantize())
    static = gptq(weight, FakeEvidence(inputs), group_size=16, act_order=True, static_groups=True)
    assert static.column_group is None
    assert found.stored_bytes - static.stored_bytes == 64  # one byte per column


def test_the_factor_is_shared_by_linears_of_one_input_and_by_bit_widths() -> None:
    block = FakeBlock(needs=("hessian",))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        for bits in (3, 4):
            gptq(block.linear(name).weight.detach(), block.evidence[name], bits, 16)
    evidence = block.evidence["self_attn.q_proj"]
    assert list(evidence.computed.values()) == [1]
    gptq(block.linear("self_attn.q_proj").weight.detach(), evidence, damping_fraction=0.1)
    assert list(evidence.computed.values()) == [1, 1]


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_scales_are_exact_in_the_type_they_are_stored_in(scale_dtype: str) -> None:
    found = gptq(
        random_weight(48, 128), FakeEvidence(correlated_inputs(128)), 8, 32, scale_dtype=scale_dtype
    )
    assert torch.equal(found.scale.to(grids.SCALE_DTYPES[scale_dtype]).float(), found.scale)


def test_errors_of_stored_scales_are_fed_back() -> None:
    weight, inputs = random_weight(48, 128), correlated_inputs(128, sequences=8)
    found = gptq(weight, FakeEvidence(inputs), 8, scale_dtype="bfloat16")
    exact = gptq(weight, FakeEvidence(inputs), 8)
    rounded_after = UniformWeight(
        exact.codes, exact.scale.bfloat16().float(), exact.zero, 8, "bfloat16"
    )
    assert layer_error(weight, found.dequantize(), inputs) < layer_error(
        weight, rounded_after.dequantize(), inputs
    )


def test_broken_hessians_fail_the_cell_by_name() -> None:
    weight = random_weight(8, 16)
    for value, message in ((torch.nan, "NaN or infinity"), (torch.inf, "NaN or infinity")):
        hessian = torch.eye(16)
        hessian[3, 3] = value
        with pytest.raises(MethodError, match=message):
            gptq(weight, HessianEvidence(hessian))
    indefinite = torch.eye(16)
    indefinite[0, 1] = indefinite[1, 0] = 5
    with pytest.raises(MethodError, match="not positive definite"):
        gptq(weight, HessianEvidence(indefinite))
    with pytest.raises(MethodError, match="weight holds NaN"):
        gptq(weight / 0, HessianEvidence(torch.eye(16)))


def test_settings_outside_their_range_are_refused() -> None:
    for settings, part in (
        ({"damping_fraction": 0}, "damping_fraction is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"grid": "awk"}, 'no grid "awk"'),
        ({"blocksize": 64}, 'did you mean "block_size"'),
    ):
        with pytest.raises(ConfigError, match=part):
            plugins.build("rounding", "gptq", settings)


def test_the_pass_learns_whether_to_go_on_sequentially() -> None:
    assert plugins.build("rounding", "gptq", {}).sequential is False
    assert plugins.build("rounding", "gptq", {"sequential": True}).sequential is True
