"""Hessians: accumulation in any batching, and factors that are what they claim to be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.core.errors import MethodError
from harness.quantization.numerics.hessians import (
    accumulate_hessian,
    damped,
    factored,
    inverse_factor,
)


def inputs_of(tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 63), max_size=4, unique=True), seed=st.integers(0, 100))
def test_the_mean_does_not_depend_on_the_batches(cuts: list[int], seed: int) -> None:
    x = inputs_of(64, 6, seed)
    hessian, seen = torch.zeros(6, 6), 0
    for batch in torch.tensor_split(x, sorted(cuts)):
        seen = accumulate_hessian(hessian, batch[None], seen)
    assert seen == 64
    torch.testing.assert_close(hessian, x.T @ x / 64)


def test_half_precision_inputs_are_summed_in_float32() -> None:
    x = (inputs_of(256, 8) * 200).half()
    hessian = torch.zeros(8, 8)
    accumulate_hessian(hessian, x, 0)
    assert bool(torch.isfinite(hessian).all())  # 200² · 256 is beyond float16
    torch.testing.assert_close(hessian, x.float().T @ x.float() / 256)


def test_damping_is_relative_to_the_mean_diagonal_and_leaves_its_input_alone() -> None:
    hessian = torch.diag(torch.tensor([1.0, 2.0, 0.0, 3.0]))
    kept = hessian.clone()
    h, dead = damped(hessian, 0.1)
    assert torch.equal(hessian, kept) and dead.tolist() == [False, False, True, False]
    torch.testing.assert_close(h.diagonal(), torch.tensor([1.0, 2.0, 1.0, 3.0]) + 0.1 * 7 / 4)


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 24), seed=st.integers(0, 100))
def test_the_factor_is_upper_triangular_and_squares_to_the_inverse(width: int, seed: int) -> None:
    x = inputs_of(3 * width + 8, width, seed)
    h, _ = damped(x.T @ x / len(x), 0.01)
    upper = inverse_factor(h)
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
    torch.testing.assert_close(upper.T @ upper @ h, torch.eye(width), rtol=0, atol=2e-3)


def test_act_order_factors_the_permuted_hessian() -> None:
    x = inputs_of(64, 8) * torch.tensor([1.0, 5, 2, 0, 3, 4, 0, 0.5])
    hessian = x.T @ x / 64
    factor = factored(hessian, 0.01, act_order=True)
    assert factor.order is not None and factor.order.tolist()[:4] == [1, 5, 4, 2]
    # in the original order
    assert factor.dead.tolist() == [False, False, False, True, False, False, True, False]
    permuted, _ = damped(hessian[factor.order][:, factor.order], 0.01)
    torch.testing.assert_close(factor.upper, inverse_factor(permuted))
    assert factored(hessian, 0.01).order is None


def test_what_cannot_be_factored_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(MethodError, match=r"NaN or infinity.*wider dtype"):
        damped(torch.tensor([[torch.nan]]), 0.01)
    with pytest.raises(MethodError, match=r"\[2 × 2\] is not positive definite.*damping_fraction"):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    rank_one = torch.ones(4, 4)
    factored(rank_one, 0.01)  # damping makes it definite
    with pytest.raises(MethodError, match="not positive definite"):
        inverse_factor(rank_one)
