"""Methods that store a fine-tune's difference: limits in which the result is known, and planted spectra.

Sources: Delta-CoMe (arXiv 2406.08903), BitDelta (arXiv 2402.10193). Numbers of columns: the authors' plan for 4096 × 4096 (968),
and the formula k = (bits · mn / (m + n) - Σ b k) / b_last for the others.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from evidence import FakeEvidence, correlated_inputs, generator, planted_change, random_weight
from torch import Tensor

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import LinearShape
from harness.quantization.methods.delta_come import filled
from harness.quantization.numerics.deltas import DeltaWeight, LowRankWeight, SignWeight

ROWS, COLUMNS = 96, 64
BUDGET = WeightScheme("delta", 2, 32)


def rounded(
    name: str,
    weight: Tensor,
    base: Tensor,
    scheme: WeightScheme,
    inputs: Tensor | None = None,
    **settings: Any,
) -> DeltaWeight:
    method = plugins.build("rounding", name, settings)
    x = correlated_inputs(weight.shape[1]) if inputs is None else inputs
    evidence = FakeEvidence(x, needs=method.needs, base=base)
    found = method.round_layer("self_attn.q_proj", weight, evidence, scheme, generator())
    assert isinstance(found, DeltaWeight)
    return found


def pair(seed: int = 0, *, decay: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
    """(fine-tune, base, difference)"""
    change = planted_change(ROWS, COLUMNS, seed, decay=decay)
    base = random_weight(ROWS, COLUMNS, seed)
    return base + change, base, change


def error(found: DeltaWeight, weight: Tensor) -> float:
    return float((found.dequantize() - weight).square().sum())


def output_error(found: DeltaWeight, weight: Tensor, inputs: Tensor) -> float:
    x = inputs.reshape(-1, inputs.shape[-1])
    return float((x @ (found.dequantize() - weight).T).square().sum())


# --- low rank -----------------------------------------------------------------------------------------------------------


def test_all_singular_values_give_the_fine_tune() -> None:
    weight, base, change = pair()
    full = rounded("low_rank_delta", weight, base, BUDGET, rank=COLUMNS, factor_dtype="float32")
    assert float((full.dequantize() - weight).abs().max()) <= 5e-5 * float(change.abs().max())


def test_what_a_rank_leaves_is_the_sum_of_squared_singular_values() -> None:
    weight, base, _ = pair()
    sizes = torch.linalg.svdvals(weight - base).double()
    errors = []
    for rank in (1, 4, 12, 30):
        found = rounded("low_rank_delta", weight, base, BUDGET, rank=rank, factor_dtype="float32")
        errors.append(error(found, weight))
        assert errors[-1] == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-3)
        assert isinstance(found.change, LowRankWeight) and found.change.rank == rank
    assert errors == sorted(errors, reverse=True)


def test_bits_of_a_low_rank_are_those_of_its_factors() -> None:
    weight, base, _ = pair()
    found = rounded("low_rank_delta", weight, base, WeightScheme("delta", 1, 128))
    rank = int(1 * ROWS * COLUMNS / (ROWS + COLUMNS) / 16)
    assert found.bits_per_weight == 16 * rank * (ROWS + COLUMNS) / (ROWS * COLUMNS) <= 1


def test_a_scaled_difference_scales_the_factors() -> None:
    _, _, change = pair()
    zero = torch.zeros_like(change)
    one, four = (
        rounded("low_rank_delta", scale * change, zero, BUDGET, factor_dtype="float32")
        for scale in (1, 16)
    )
    assert torch.equal(
        4 * one.change.pack()[0]["left0_values"], four.change.pack()[0]["left0_values"]
    )


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("low_rank_delta", BUDGET),
        ("delta_rtn", WeightScheme("int", 4, 32)),
        ("delta_gptq", WeightScheme("int", 4, 32)),
        ("bitdelta", WeightScheme("sign", 1, -1, True)),
        ("delta_come", BUDGET),
    ],
)
def test_no_difference_gives_the_base(name: str, scheme: WeightScheme) -> None:
    base = random_weight(ROWS, COLUMNS)
    plan = {"groups": [[8, 2], [2, 0]]} if name == "delta_come" else {}
    assert torch.equal(rounded(name, base.clone(), base, scheme, **plan).dequantize(), base)


@pytest.mark.parametrize("name", ["low_rank_delta", "delta_gptq", "bitdelta"])
def test_a_damaged_base_is_named(name: str) -> None:
    weight, base, _ = pair()
    base[1, 1] = float("nan")
    scheme = {"bitdelta": WeightScheme("sign", 1, -1, True), "delta_gptq": WeightScheme("int", 4)}
    with pytest.raises(MethodError, match="base's matrix holds NaN"):
        rounded(name, weight, base, scheme.get(name, BUDGET))


# --- rounded differences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["rtn", "gptq", "sparsegpt"])
def test_from_a_base_of_zeros_it_is_the_inner_rounding(inner: str) -> None:
    weight, _, _ = pair()
    scheme, inputs = WeightScheme("int", 3, 32), correlated_inputs(COLUMNS)
    if inner == "sparsegpt":  # DeltaZip's form
        scheme = WeightScheme("int", 2, -1, True, sparsity="2:4")
    found = rounded(f"delta_{inner}", weight, torch.zeros_like(weight), scheme, inputs)
    method = plugins.build("rounding", inner, {})
    evidence = FakeEvidence(inputs, needs=method.needs) if method.needs else None
    expected = method.round_layer("x", weight, evidence, scheme, generator())
    assert torch.equal(found.change.dequantize(), expected.dequantize())


def test_a_difference_is_easier_to_round_than_the_matrix() -> None:
    """At one scheme the output error falls about as (||ΔX|| / ||WX||)²."""
    base = random_weight(ROWS, COLUMNS)
    weight = base + 0.02 * planted_change(ROWS, COLUMNS)
    inputs, scheme = correlated_inputs(COLUMNS), WeightScheme("int", 4, 32)
    of_change = rounded("delta_gptq", weight, base, scheme, inputs)
    gptq = plugins.build("rounding", "gptq", {})
    evidence = FakeEvidence(inputs, needs=gptq.needs)
    of_matrix = gptq.round_layer("x", weight, evidence, scheme, generator())
    x = inputs.reshape(-1, COLUMNS)
    theirs = float((x @ (of_matrix.dequantize() - weight).T).square().sum())
    assert output_error(of_change, weight, inputs) < theirs / 10


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("rtn", "delta_rtn"),
        ("gptq", "delta_gptq"),
        ("gptq", "delta_come"),
        ("sparsegpt", "delta_sparsegpt"),
    ],
)
def test_the_versions_of_inner_roundings_are_known(inner: str, outer: str) -> None:
    """When the numbers of an inner rounding change, so do those of the differences: raise both versions, then this table."""
    known = {
        ("rtn", "delta_rtn"): (1, 1),
        ("gptq", "delta_gptq"): (1, 1),
        ("gptq", "delta_come"): (1, 1),
        ("sparsegpt", "delta_sparsegpt"): (1, 1),
    }
    facts = (plugins.facts("rounding", name).get("version", 0) for name in (inner, outer))
    assert tuple(facts) == known[inner, outer]


# --- BitDelta -----------------------------------------------------------------------------------------------------------

SIGN = WeightScheme("sign", 1, -1, True)


def test_the_mean_magnitude_is_the_best_scale_of_the_signs() -> None:
    weight, base, _ = pair()
    found = rounded("bitdelta", weight, base, SIGN)
    change = (weight - base).double()
    assert isinstance(found.change, SignWeight)
    alpha = float(found.change.alpha)
    left = float((change - found.change.dequantize().double()).square().sum())
    expected = float(change.square().sum()) - change.numel() * float(change.abs().mean()) ** 2
    assert left == pytest.approx(expected, rel=1e-6)
    for factor in (0.8, 0.95, 1.05, 1.2):
        other = (change - factor * alpha * change.sign()).square().sum()
        assert float(other) > left
    assert found.bits_per_weight == pytest.approx(1 + 32 / change.numel())


def test_signs_of_a_difference() -> None:
    weight, base, _ = pair()
    plus = rounded("bitdelta", weight, base, SIGN).change
    minus = rounded("bitdelta", 2 * base - weight, base, SIGN).change
    assert isinstance(plus, SignWeight) and isinstance(minus, SignWeight)
    there = weight != base
    assert torch.equal(plus.signs[there], ~minus.signs[there])
    rank_one = torch.outer(
        torch.randn(6, generator=generator(1)), torch.randn(5, generator=generator(2))
    )
    signs = rounded("bitdelta", rank_one, torch.zeros(6, 5), SIGN, correlated_inputs(5)).change
    assert isinstance(signs, SignWeight) and torch.equal(signs.signs, rank_one >= 0)
    constant = torch.where(torch.rand(8, 8, generator=generator(3)) < 0.5, 0.25, -0.25)
    exact = rounded("bitdelta", constant, torch.zeros(8, 8), SIGN, correlated_inputs(8))
    assert torch.equal(exact.dequantize(), constant)


def test_a_scale_per_row_is_never_worse() -> None:
    weight, base, _ = pair()
    one = error(rounded("bitdelta", weight, base, SIGN), weight)
    rows = error(rounded("bitdelta", weight, base, SIGN, granularity="row"), weight)
    assert rows < one


# --- Delta-CoMe ---------------------------------------------------------------------------------------------------------


def test_the_plan_leaves_the_columns_of_the_paper() -> None:
    plan = [[8, 2], [3, 32], [2, 0]]
    columns = [
        filled(plan, 1, LinearShape("x", rows, inputs, ""))[-1][1]
        for rows, inputs in ((4096, 4096), (11008, 4096), (1024, 4096))
    ]
    assert columns == [968, 1436, 353]
    assert filled([[8, 1], [3, 4], [2, 0]], 1, LinearShape("x", 64, 64, ""))[-1] == (2, 6)


def test_all_columns_in_full_width_give_the_fine_tune() -> None:
    weight, base, change = pair()
    found = rounded(
        "delta_come", weight, base, BUDGET, groups=[[16, COLUMNS]], factor_dtype="float32"
    )
    assert float((found.dequantize() - weight).abs().max()) <= 5e-5 * float(change.abs().max())
    part = rounded("delta_come", weight, base, BUDGET, groups=[[16, 10]], factor_dtype="float32")
    low = rounded("low_rank_delta", weight, base, BUDGET, rank=10, factor_dtype="float32")
    assert torch.allclose(part.dequantize(), low.dequantize(), atol=1e-5)


def test_wider_groups_are_better_and_eight_bits_nearly_free() -> None:
    weight, base, _ = pair()
    inputs = correlated_inputs(COLUMNS)
    errors = [
        output_error(
            rounded("delta_come", weight, base, BUDGET, inputs, groups=[[bits, 8]]), weight, inputs
        )
        for bits in (2, 3, 4, 8, 16)
    ]
    assert all(after <= 1.01 * before for before, after in itertools.pairwise(errors))
    assert errors[3] <= 1.01 * errors[4]


def test_dead_inputs_have_no_right_vectors() -> None:
    weight, base, _ = pair()
    inputs = correlated_inputs(COLUMNS)
    inputs[..., 7] = 0
    found = rounded("delta_come", weight, base, BUDGET, inputs, groups=[[3, 12]])
    assert not bool(found.change.dequantize()[:, 7].any())


def test_a_short_last_group_of_the_left_side() -> None:
    """20 columns in groups of 16: the second group of U has 4."""
    weight, base, _ = pair(decay=0.95)
    found = rounded("delta_come", weight, base, WeightScheme("delta", 2, 16), groups=[[4, 20]])
    assert isinstance(found.change, LowRankWeight)
    (part,) = found.change.parts
    scale = part.left.pack()[0]["scale"]
    assert tuple(scale.shape) == (ROWS, 2)
    groups = part.left.pack()[0]["column_group"]
    assert sorted(torch.bincount(groups.int()).tolist()) == [4, 16]
    eight = rounded("delta_come", weight, base, WeightScheme("delta", 2, 16), groups=[[8, 20]])
    full = rounded("delta_come", weight, base, WeightScheme("delta", 2, 16), groups=[[16, 20]])
    inputs = correlated_inputs(COLUMNS)
    assert output_error(eight, weight, inputs) <= 1.02 * output_error(full, weight, inputs)


@pytest.mark.parametrize(
    ("spectrum", "winner"), [("decaying", "delta_come"), ("white", "bitdelta")]
)
def test_the_spectrum_decides(spectrum: str, winner: str) -> None:
    """At equal bits: decaying singular values are for mixed widths, white noise is for signs (which leave 1 - 2/π of it)."""
    rows, columns = 256, 512
    base = torch.zeros(rows, columns)
    inputs = torch.randn(4, 256, columns, generator=generator(5))
    white = torch.randn(rows, columns, generator=generator(6))
    left, _, right = torch.linalg.svd(white, full_matrices=False)
    change = (left * 0.95 ** torch.arange(rows)) @ right if spectrum == "decaying" else white
    budget = WeightScheme("delta", 1, 128)
    found = {
        "low_rank_delta": rounded("low_rank_delta", change, base, budget, inputs),
        "bitdelta": rounded("bitdelta", change, base, SIGN, inputs),
        "delta_come": rounded(
            "delta_come", change, base, budget, inputs, groups=[[8, 2], [3, 16], [2, 0]]
        ),
    }
    errors = {
        name: error(each, change) / float(change.square().sum()) for name, each in found.items()
    }
    assert min(errors, key=errors.__getitem__) == winner, errors
    if spectrum == "white":
        assert errors["bitdelta"] == pytest.approx(0.363, abs=0.005)


def test_impossible_plans_are_refused() -> None:
    from evidence import llama_shapes

    shapes = llama_shapes(64, 96)
    method = plugins.build("rounding", "delta_come", {})
    (reason,) = method.check(Scheme("x", WeightScheme("delta", 1, 32)), shapes)[:1]
    assert "leave no column of 2 bits; use scheme.weight.bits=" in reason and "q_proj" in reason
    assert "group_size 24 does not divide" in str(
        plugins.build("rounding", "delta_come", {"groups": [[8, 1], [2, 0]]}).check(
            Scheme("x", WeightScheme("delta", 1, 24)), shapes
        )
    )
    fixed = plugins.build("rounding", "delta_come", {"groups": [[8, 1], [2, 6]]})
    assert "the plan's codes take" in str(
        fixed.check(Scheme("x", WeightScheme("delta", 2, 32)), shapes)
    )
    low = plugins.build("rounding", "low_rank_delta", {})
    (reason,) = low.check(Scheme("x", WeightScheme("delta", 0.25, 32)), shapes)[:1]
    assert "pay for no pair of vectors; use scheme.weight.bits=" in reason


@pytest.mark.parametrize(
    "name,inner,version",
    [
        ("delta_rtn", "rtn", 1),
        ("delta_gptq", "gptq", 1),
        ("delta_sparsegpt", "sparsegpt", 1),
        ("delta_come", "gptq", 1),
    ],
)
def test_a_version_rises_with_that_of_the_rounding_inside(
    name: str, inner: str, version: int
) -> None:
    """A key holds the version of a difference's rounding alone: raise it, and the number here, when the inner one is raised."""
    assert plugins.facts("rounding", inner).get("version", 1) == version
    assert plugins.facts("rounding", name).get("version", 1) >= version
