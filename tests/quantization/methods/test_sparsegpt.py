"""SparseGPT: limits in which the result is known, and what it gains over pruning without updates."""

from __future__ import annotations

import math

import pytest
import torch
from evidence import FakeEvidence, HessianEvidence, correlated_inputs, generator, layer_error
from evidence import random_weight as random
from pruned import magnitude, sparsegpt, wanda
from torch import Tensor

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.core.sparsity import read_sparsity
from harness.quantization.numerics.pruning import lowest, round_survivors
from harness.quantization.numerics.weights import UniformWeight


def hessian_of(inputs: Tensor) -> Tensor:
    x = inputs.reshape(-1, inputs.shape[-1])
    return x.T @ x / x.shape[0]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_pruning_nothing_leaves_gptq(bits: int, group_size: int) -> None:
    weight, inputs = random(24, 64), correlated_inputs(64)
    evidence = HessianEvidence(hessian_of(inputs))
    scheme = WeightScheme("int", bits, group_size, scale_dtype="float32")
    gptq = plugins.build("rounding", "gptq", {})
    wanted = gptq.round_layer("linear", weight, evidence, scheme, generator())
    assert isinstance(wanted, UniformWeight)
    ours = plugins.build("rounding", "sparsegpt", {})
    nothing = torch.zeros_like(weight, dtype=torch.bool)
    factor = evidence.once(("factor", 0.01, False), lambda: None)  # gptq made it
    sparse = WeightScheme("int", bits, group_size, scale_dtype="float32", sparsity="0.5")
    found = ours._rounded(weight, factor, sparse, nothing)
    assert torch.equal(found.dequantize(), wanted.dequantize())


def test_a_diagonal_hessian_leaves_survivors_as_they_are() -> None:
    weight = random(16, 64)
    diagonal = 0.1 + torch.rand(64, generator=generator(1))
    found = sparsegpt(
        weight, HessianEvidence(diagonal.diag()), block_size=16, damping_fraction=1e-6
    )
    assert torch.equal(found.dequantize(), weight * found.mask)
    for start in range(0, 64, 16):  # each block loses its share by w² H_jj
        here = slice(start, start + 16)
        wanted = lowest(weight[:, here].square() * diagonal[here], 128)
        assert torch.equal(~found.mask[:, here], wanted)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_the_unit_of_the_hessian_changes_nothing(sparsity: str) -> None:
    weight, hessian = random(16, 64), hessian_of(correlated_inputs(64))
    one = sparsegpt(weight, HessianEvidence(hessian), sparsity)
    other = sparsegpt(weight, HessianEvidence(hessian * 2.0**6), sparsity)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.dequantize(), other.dequantize(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_it_lies_between_the_least_squares_optimum_and_no_update(sparsity: str) -> None:
    weight, hessian = random(32, 64), hessian_of(correlated_inputs(64))
    found = sparsegpt(weight, HessianEvidence(hessian), sparsity)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)

    def error(row: int, values: Tensor) -> float:
        difference = (values - weight[row]).double()
        return float(difference @ damped.double() @ difference)

    without_update_is_worse = 0
    for row in range(32):
        kept = found.mask[row].nonzero()[:, 0]
        right = (damped @ weight[row])[kept].double()
        best = torch.zeros(64, dtype=torch.float64)
        best[kept] = torch.linalg.solve(damped[kept][:, kept].double(), right)
        own = error(row, found.dequantize()[row])
        assert own >= error(row, best) * (1 - 1e-5)
        without_update_is_worse += own <= error(row, weight[row] * found.mask[row])
    assert without_update_is_worse == 32


@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("bits", [4, 16])
def test_patterns_hold_whatever_the_block(sparsity: str, bits: int) -> None:
    weight, hessian = random(16, 64), hessian_of(correlated_inputs(64))
    found = sparsegpt(weight, HessianEvidence(hessian), sparsity, bits)
    kept, of = read_sparsity(sparsity).kept, read_sparsity(sparsity).of
    assert bool((found.mask.reshape(16, -1, of).sum(-1) == kept).all())
    smaller = sparsegpt(weight, HessianEvidence(hessian), sparsity, bits, block_size=of)
    assert float((smaller.mask == found.mask).float().mean()) > 0.999


def test_each_block_loses_its_exact_share() -> None:
    weight, hessian = random(15, 64), hessian_of(correlated_inputs(64))
    mask = sparsegpt(weight, HessianEvidence(hessian), "0.3", block_size=24).mask
    counts = [int((~mask[:, a:b]).sum()) for a, b in ((0, 24), (24, 48), (48, 64))]
    assert counts == [108, 108, 72]


def test_it_loses_less_than_wanda_and_wanda_than_magnitude() -> None:
    ordered = 0
    for seed in range(20):
        weight, inputs = random(32, 64, seed), correlated_inputs(64, sequences=8, seed=seed)
        results = (
            sparsegpt(weight, FakeEvidence(inputs)),
            wanda(weight, inputs),
            magnitude(weight, compare="row"),
        )
        errors = [layer_error(weight, each.dequantize(), inputs) for each in results]
        ordered += errors == sorted(errors)
    assert ordered >= 19


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_rounding_in_the_loop_beats_rounding_afterwards(sparsity: str) -> None:
    """With grids of the survivors; with grids of the dense weights it may be worse."""
    gains = []
    for seed in range(12):
        weight, inputs = random(32, 64, seed), correlated_inputs(64, sequences=8, seed=seed)
        evidence = FakeEvidence(inputs)
        joint = sparsegpt(weight, evidence, sparsity, bits=4, grid_on="updated")
        pruned = sparsegpt(weight, evidence, sparsity)
        rounded = WeightScheme("int", 4, -1, scale_dtype="float32", sparsity=sparsity)
        kept = pruned.dequantize()
        apart = round_survivors(kept, ~pruned.mask, rounded, "gptq", "none").dequantize()
        one, two = (layer_error(weight, w, inputs) for w in (joint.dequantize(), apart))
        gains.append(one / two)
    assert sum(gain < 1 for gain in gains) >= 0.9 * len(gains)
    assert math.exp(sum(map(math.log, gains)) / len(gains)) <= 0.95


@pytest.mark.parametrize("mask", ["magnitude", "wanda"])
def test_a_mask_of_another_method_is_kept_and_its_survivors_are_updated(mask: str) -> None:
    weight, inputs = random(32, 64), correlated_inputs(64, sequences=8)
    found = sparsegpt(weight, FakeEvidence(inputs), mask=mask)
    other = magnitude(weight) if mask == "magnitude" else wanda(weight, inputs)
    assert torch.equal(found.mask, other.mask)
    errors = [layer_error(weight, each.dequantize(), inputs) for each in (found, other)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("bits", [4, 16])
def test_dead_columns_become_zero(bits: int) -> None:
    weight, inputs = random(16, 64), correlated_inputs(64)
    inputs[..., [3, 40]] = 0
    found = sparsegpt(weight, FakeEvidence(inputs), "0.5", bits)
    assert not bool(found.dequantize()[:, [3, 40]].any())
    if bits == 16:
        assert not bool(found.mask[:, [3, 40]].any())
