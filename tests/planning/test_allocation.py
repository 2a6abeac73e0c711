"""The choice of a budget: exact against brute force, within its limit, and never worse after measured swaps."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest

from harness.core.cell import (
    ActivationScheme,
    Cell,
    Method,
    Model,
    Override,
    Part,
    Scheme,
    WeightScheme,
    from_json,
    quantize_key,
    to_json,
)
from harness.core.errors import PlanError
from harness.core.shapes import LinearShape
from harness.planning.allocation import (
    PATIENCE,
    Choice,
    bits_of,
    choose,
    groups_of,
    improve,
    interval,
    matrices_of,
    mixed_cell,
    value_of,
)

GROUPS, CANDIDATES = 6, 3


def table(rng: random.Random) -> tuple[list[list[int]], list[list[float]]]:
    """Costs that grow with the candidate, and values that fall with it in most rows."""
    costs, values = [], []
    for _ in range(GROUPS):
        size = rng.choice((64, 96, 128, 1000))
        costs.append([size * bits + rng.randrange(8) for bits in (2, 3, 4)])
        row = sorted((rng.random() for _ in range(CANDIDATES)), reverse=True)
        values.append(row if rng.random() < 0.8 else rng.sample(row, CANDIDATES))
    return costs, values


@pytest.mark.parametrize("seed", range(200))
def test_the_choice_equals_brute_force(seed: int) -> None:
    """Every budget at which anything changes: the bits of all 729 assemblies are tried by a few per table."""
    rng = random.Random(seed)
    costs, values = table(rng)
    every = [
        (bits_of(costs, choice), value_of(values, choice))
        for choice in itertools.product(range(CANDIDATES), repeat=GROUPS)
    ]
    for limit in rng.sample([bits for bits, _ in every], 12):
        best = min(value for bits, value in every if bits <= limit)
        found = choose(costs, values, limit)
        assert found.value <= best and found.bits <= limit and found.lost_bits == 0
        assert (found.bits, found.value) == (
            bits_of(costs, found.choice),
            value_of(values, found.choice),
        )


def test_more_bits_are_never_worse() -> None:
    costs, values = table(random.Random(3))
    low, high = interval(costs)
    found = [choose(costs, values, limit).value for limit in range(low, high + 1, 7)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]


def test_costs_in_units_stay_within_the_limit_and_lose_no_more_than_they_say() -> None:
    rng, rounded = random.Random(11), 0
    for _ in range(20):
        costs, values = table(rng)
        low, high = interval(costs)
        limit = rng.randrange(low, high)
        coarse = choose(costs, values, limit, max_states=8)
        rounded += coarse.lost_bits > 0
        assert coarse.bits <= limit
        assert coarse.value <= choose(costs, values, max(low, limit - coarse.lost_bits)).value
    assert rounded > 10


def test_of_equal_values_the_cheaper_and_spare_bits_where_they_cost_nothing() -> None:
    costs = [[10, 20], [10, 20], [10, 20]]
    assert choose(costs, [[1.0, 0.5], [1.0, 1.0], [1.0, 2.0]], 60).choice == (1, 1, 0)
    # nothing is gained by the second group's 20, and nothing lost: the spare bits go there
    assert choose(costs, [[1.0, 0.5], [1.0, 1.0], [1.0, 2.0]], 40).choice == (1, 0, 0)
    # one of two equal moves fits: the group listed first stays cheap in the sum, ties are the same on every run
    twice = [choose(costs, [[1.0, 0.5], [1.0, 0.5], [0.0, 0.0]], 40) for _ in range(2)]
    assert twice[0] == twice[1] and twice[0].bits == 40


def test_a_limit_below_the_cheapest_assembly_is_refused() -> None:
    with pytest.raises(PlanError, match="cheapest assembly takes 30 bits"):
        choose([[10, 20]] * 3, [[1.0, 0.0]] * 3, 29)


# --- swaps ----------------------------------------------------------------------------------------------------------------------


def interacting(choice: Choice) -> float:
    """A divergence that no table predicts: pairs of groups with candidate 0 hurt each other."""
    low = [group for group, candidate in enumerate(choice) if candidate == 0]
    return 1.0 + sum(0.5 / (1 + abs(a - b)) for a in low for b in low if a < b) + len(low)


def test_swaps_end_no_worse_than_they_began_and_within_the_limit() -> None:
    costs, values = [[2, 3, 4]] * 6, [[3.0 + g, 1.0, 0.5] for g in range(6)]
    start, limit = (1,) * 6, 18
    kept: list[Choice] = []
    end, divergence, tried = improve(
        start, interacting(start), costs, [values], limit, interacting, 64, kept.append
    )
    assert divergence <= interacting(start) and divergence == interacting(end)
    assert all(bits_of(costs, trial.choice) <= limit for trial in tried)
    assert kept == [trial.choice for trial in tried if trial.accepted]
    assert len({trial.choice for trial in tried}) == len(tried), "nothing is measured twice"


def test_a_swap_is_kept_only_where_the_measurement_falls() -> None:
    """The table likes every swap; the measurement likes one of them."""
    costs, values = [[2, 3]] * 4, [[float(g), 0.0] for g in range(4)]
    wanted = (0, 1, 0, 1)
    end, divergence, tried = improve(
        (1, 1, 0, 0), 1.0, costs, [values], 10, lambda c: 0.5 if c == wanted else 2.0, 64
    )
    assert end == wanted and divergence == 0.5
    assert [trial.accepted for trial in tried].count(True) == 1


@pytest.mark.parametrize("trials", [0, 1, 5])
def test_no_more_trials_than_allowed(trials: int) -> None:
    costs, values = [[2, 3]] * 8, [[float(g), 0.0] for g in range(8)]
    start = (1, 1, 1, 1, 0, 0, 0, 0)
    assert len(improve(start, 1.0, costs, [values], 20, lambda c: 1.0, trials)[2]) == trials


def test_swaps_end_after_many_in_vain() -> None:
    costs, values = [[2, 3]] * 12, [[float(g), 0.0] for g in range(12)]
    start = (1,) * 6 + (0,) * 6
    assert len(improve(start, 1.0, costs, [values], 30, lambda c: 1.0, 64)[2]) == PATIENCE


# --- groups and cells -----------------------------------------------------------------------------------------------------------

LLAMA = (
    *(LinearShape(f"self_attn.{name}_proj", 8, 8, "attention") for name in "qkv"),
    LinearShape("self_attn.o_proj", 8, 8, "output"),
    LinearShape("mlp.gate_proj", 16, 8, "mlp"),
    LinearShape("mlp.up_proj", 16, 8, "mlp"),
    LinearShape("mlp.down_proj", 8, 16, "down"),
)


def grouped(linears: tuple[LinearShape, ...], together: str, blocks: int = 2) -> list[list[str]]:
    found = groups_of(matrices_of(linears, blocks), linears, together)
    assert sum(map(len, found)) == blocks * len(linears)
    assert all(len({block for block, _ in members}) == 1 for members in found)
    return [[name.rpartition(".")[2] for _, name in members] for members in found]


def test_groups_of_a_dense_model() -> None:
    assert len(grouped(LLAMA, "none")) == 14
    serving = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert grouped(LLAMA, "serving") == serving * 2
    assert len(grouped(LLAMA, "block")) == 2


def test_matrices_of_one_parameter_are_one_group_always() -> None:
    fused = tuple(
        dataclasses.replace(linear, fused=linear.group in ("attention", "mlp")) for linear in LLAMA
    )
    assert grouped(fused, "none") == grouped(LLAMA, "serving")


def test_experts_of_a_block_have_one_group_per_projection() -> None:
    """An override names a linear by its short name, which all experts of a block share."""
    experts = tuple(
        LinearShape(f"mlp.experts.{e}.{name}", 8, 8, f"expert {e} {group}", expert=True)
        for e in range(3)
        for name, group in (("gate", "in"), ("up", "in"), ("down", "mid"))
    )
    assert [sorted(set(each)) for each in grouped(experts, "none", 1)] == [
        ["gate"],
        ["up"],
        ["down"],
    ]
    assert len(grouped(experts, "serving", 1)) == 1


def candidates(**more: Any) -> list[Cell]:
    part = Part("gptq", needs=("hessian",))
    return [
        Cell(
            Model("m", "m", digest="d"),
            Method("gptq", rounding=part),
            Scheme(f"w{bits}", WeightScheme(bits=bits, group_size=32), **more),
        )
        for bits in (2, 3, 4)
    ]


def test_the_cell_of_a_choice_gives_every_matrix_the_scheme_of_its_candidate() -> None:
    rng, cells = random.Random(5), candidates(activation=ActivationScheme())
    groups = groups_of(matrices_of(LLAMA, 4), LLAMA, "serving")
    weights = [len(members) for members in groups]
    for _ in range(20):
        choice = tuple(rng.randrange(3) for _ in groups)
        base, cell = mixed_cell(cells, groups, weights, choice, "b@3")
        for members, candidate in zip(groups, choice, strict=True):
            for block, linear in members:
                assert cell.scheme.weight_for(block, linear) == cells[candidate].scheme.weight
                assert cell.scheme.activation_for(block, linear) == ActivationScheme()
        share = [sum(w for w, c in zip(weights, choice, strict=True) if c == k) for k in range(3)]
        assert share[base] == max(share)
        again = mixed_cell(cells, groups, weights, choice, "another name")[1]
        assert quantize_key(again) == quantize_key(cell)
        assert from_json(Cell, to_json(cell)) == cell


def test_a_uniform_choice_is_the_candidate_itself() -> None:
    cells = candidates()
    groups = groups_of(matrices_of(LLAMA, 2), LLAMA, "none")
    assert mixed_cell(cells, groups, [1] * len(groups), (1,) * len(groups), "x") == (1, cells[1])


def test_overrides_of_activations_stay() -> None:
    """Candidates may treat the inputs of some linears apart; a mixture of their weights does so too."""
    own = Override(("down_proj",), None, (), (("bits", 4),))
    cells = candidates(activation=ActivationScheme(), overrides=(own,))
    groups = groups_of(matrices_of(LLAMA, 2), LLAMA, "serving")
    choice = (0, 1, 1, 2, 1, 1, 1, 1)
    _, cell = mixed_cell(cells, groups, [1] * len(groups), choice, "x")
    activation = cell.scheme.activation_for(0, "mlp.down_proj")
    assert activation is not None and activation.bits == 4
    assert cell.scheme.weight_for(0, "mlp.down_proj").bits == 4


def test_roundings_of_a_choice() -> None:
    """Where candidates differ in their rounding, each matrix gets that of its candidate; keys tell the assignments apart."""
    first, *others = candidates()
    rtn = dataclasses.replace(others[0], method=Method("rtn", rounding=Part("rtn")))
    cells = [first, rtn]
    groups = groups_of(matrices_of(LLAMA, 2), LLAMA, "serving")
    weights = [1] * len(groups)
    keys = set()
    for swapped in range(1, len(groups)):
        choice = tuple(int(group == swapped) for group in range(len(groups)))
        _, cell = mixed_cell(cells, groups, weights, choice, "x")
        keys.add(quantize_key(cell))
        assert cell.method.name == "gptq+rtn" and cell.method.needs == ("hessian",)
        for members, candidate in zip(groups, choice, strict=True):
            for block, linear in members:
                part = cell.method.rounding_for(block, linear)
                assert part == cells[candidate].method.rounding
        assert from_json(Cell, to_json(cell)) == cell
    assert len(keys) == len(groups) - 1
