"""The choice of a candidate for each group of matrices under a limit of bits: exact, then improved by measured swaps.

A table of values says what each candidate costs in quality for each group, as if groups did not interact. Its best choice is a
multiple-choice knapsack, solved exactly by dynamic programming over the bits spent, with dominated states dropped (Kellerer,
Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11). Groups do interact at low widths, so that a table only proposes: `improve`
moves from one measured assembly to the next, and ends no worse than it began.

Nothing here reads a weight or runs a model: costs and values are tables of numbers, and `measure` is given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from harness.core.cell import Cell, Override, Part, RoundingOverride, WeightScheme, freeze, to_json
from harness.core.errors import PlanError
from harness.core.shapes import LinearShape

MAX_STATES = 200_000
LEAST_GAIN = 1e-4  # by which a swap must lower the divergence, relative
PATIENCE = 16  # swaps in a row that are not kept, after which no other is tried

Costs = Sequence[Sequence[int]]  # [groups][candidates] stored bits
Values = Sequence[Sequence[float]]  # [groups][candidates], lower is better
Choice = tuple[int, ...]  # of each group the candidate
Matrix = tuple[int, str]  # block, linear


@dataclass(frozen=True)
class Solution:
    """A choice with its cost and value. lost_bits: at most so many bits stayed unused because costs were rounded up."""

    choice: Choice
    bits: int
    value: float
    lost_bits: int = 0


@dataclass(frozen=True)
class Trial:
    """A measured assembly after the proposals, and whether it replaced the one before it."""

    choice: Choice
    divergence: float
    accepted: bool


# --- groups ---------------------------------------------------------------------------------------------------------------------


def groups_of(
    matrices: Sequence[Matrix], linears: Sequence[LinearShape], together: str
) -> tuple[tuple[Matrix, ...], ...]:
    """Matrices that get one candidate, in the order of their first ones.

    matrices: all quantized ones; linears: their shapes by name. An override names a linear by its short name, and matrices of one
    parameter stand in one tensor: those of a block that share either are one group always, the experts of a block among them.
    """
    shapes = {linear.name: linear for linear in linears}
    parent = list(range(len(matrices)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    first: dict[tuple[int, str, str], int] = {}
    for index, (block, name) in enumerate(matrices):
        shape = shapes.get(name)
        marks = [("name", name.rpartition(".")[2])]
        if together == "block":
            marks.append(("block", ""))
        if shape is not None and (shape.fused or together == "serving"):
            marks.append(("input", shape.group))
        if shape is not None and shape.expert and together == "serving":
            marks.append(("experts", ""))
        for kind, mark in marks:
            other = root(first.setdefault((block, kind, mark), index))
            parent[max(root(index), other)] = min(root(index), other)
    found: dict[int, list[Matrix]] = {}
    for index, matrix in enumerate(matrices):
        found.setdefault(root(index), []).append(matrix)
    return tuple(tuple(members) for _, members in sorted(found.items()))


def matrices_of(linears: Sequence[LinearShape], blocks: int) -> tuple[Matrix, ...]:
    """Every matrix of a model whose blocks are alike."""
    return tuple((block, linear.name) for block in range(blocks) for linear in linears)


def costs_of(
    groups: Sequence[Sequence[Matrix]], manifests: Sequence[Mapping[str, Any]]
) -> tuple[list[list[int]], list[int]]:
    """Stored bits [groups][candidates] and numbers [groups], as the manifests of the candidates' checkpoints have them.

    Raises PlanError where the checkpoints do not hold the same matrices.
    """
    tables = [
        {(entry["block"], entry["linear"]): entry for entry in manifest["linears"]}
        for manifest in manifests
    ]
    wanted = {matrix for members in groups for matrix in members}
    if any(table.keys() != wanted for table in tables):
        raise PlanError("the candidates' checkpoints do not hold the same matrices")
    costs = [
        [sum(8 * table[matrix]["bytes"] for matrix in members) for table in tables]
        for members in groups
    ]
    weights = [
        sum(math.prod(tables[0][matrix]["shape"]) for matrix in members) for members in groups
    ]
    return costs, weights


def matrices_in(manifest: Mapping[str, Any]) -> tuple[Matrix, ...]:
    """The quantized matrices of a checkpoint."""
    return tuple((entry["block"], entry["linear"]) for entry in manifest["linears"])


# --- the exact choice -----------------------------------------------------------------------------------------------------------


def bits_of(costs: Costs, choice: Choice) -> int:
    """Stored bits of an assembly."""
    return sum(row[candidate] for row, candidate in zip(costs, choice, strict=True))


def value_of(values: Values, choice: Choice) -> float:
    """The sum of a table over an assembly, in the order of the groups."""
    total = 0.0
    for row, candidate in zip(values, choice, strict=True):
        total += row[candidate]
    return total


def interval(costs: Costs) -> tuple[int, int]:
    """Bits of the cheapest and of the dearest assembly."""
    return sum(map(min, costs)), sum(map(max, costs))


def misfit(limit: int, costs: Costs, weights: int) -> str:
    """Why no assembly uses a limit of bits, with the sizes that are possible; "" where one does.

    A thousandth of a bit above the dearest is a size that was rounded, as 3.594 for 3.59375.
    """
    low, high = interval(costs)
    if low <= limit <= high + weights // 1000:
        return ""
    side = "below the cheapest" if limit < low else "above the dearest"
    return (
        f"{side} assembly; the candidates allow {low / weights:.4g} to {high / weights:.4g} bits per weight, {-(-low // 8)} to "
        f"{-(-high // 8)} bytes"
    )


def choose(costs: Costs, values: Values, limit: int, max_states: int = MAX_STATES) -> Solution:
    """The choice of least value within `limit` bits; of equal values the cheaper, then the candidate listed first.

    Where more than max_states partial sums remain, costs are counted in units and rounded up: the result is then still within the
    limit, and Solution.lost_bits bounds what rounding may have left unused. Spare bits are spent where that costs no value.
    Raises PlanError where even the cheapest assembly is above the limit.
    """
    cheapest, _ = interval(costs)
    if cheapest > limit:
        raise PlanError(
            f"the cheapest assembly takes {cheapest} bits, which is above the limit of {limit}"
        )
    extra = [[cost - min(row) for cost in row] for row in costs]
    found, lost = _pareto(extra, values, limit - cheapest, max_states), 0
    if found is None:
        unit = -(-(limit - cheapest) // max_states)
        coarse = [[-(-cost // unit) for cost in row] for row in extra]
        found = _pareto(coarse, values, (limit - cheapest) // unit, None)
        lost = len(costs) * unit
        assert found is not None, "without a limit of states there is always a result"
    choice = _spend(costs, values, found, limit)
    return Solution(choice, bits_of(costs, choice), value_of(values, choice), lost)


def _pareto(extra: Costs, values: Values, limit: int, max_states: int | None) -> Choice | None:
    """The best choice by dynamic programming; None where more than max_states states remain after a group."""
    spent = np.zeros(1, np.int64)
    worth = np.zeros(1, np.float64)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # (state before, candidate)
    for costs, of_group in zip(extra, values, strict=True):
        cost, value = np.asarray(costs, np.int64), np.asarray(of_group, np.float64)
        bits = (spent[:, None] + cost).ravel()
        sums = (worth[:, None] + value).ravel()
        before, candidate = np.divmod(np.arange(len(bits)), len(cost))
        order = np.lexsort((before, candidate, bits, sums))
        order = order[bits[order] <= limit]
        # by value: a state stays where it is cheaper than all of lower or equal value
        lowest = np.minimum.accumulate(np.concatenate(([limit + 1], bits[order])))[:-1]
        order = order[bits[order] < lowest]
        spent, worth = bits[order], sums[order]
        steps.append((before[order], candidate[order]))
        if max_states is not None and len(order) > max_states:
            return None
    state, choice = 0, []  # states stand in the order of their values
    for before, candidate in reversed(steps):
        choice.append(int(candidate[state]))
        state = int(before[state])
    return tuple(reversed(choice))


def _spend(costs: Costs, values: Values, choice: Choice, limit: int) -> Choice:
    """Spare bits to groups that can have a dearer candidate whose value is not larger, the first group first."""
    made, spent = list(choice), bits_of(costs, choice)
    moved = True
    while moved:
        moved = False
        for group, (cost, value) in enumerate(zip(costs, values, strict=True)):
            now = made[group]
            for other in sorted(range(len(cost)), key=lambda k: -cost[k]):
                if (
                    cost[other] > cost[now]
                    and value[other] <= value[now]
                    and spent + cost[other] - cost[now] <= limit
                ):
                    spent, made[group], moved = spent + cost[other] - cost[now], other, True
                    break
    return tuple(made)


# --- measured swaps -------------------------------------------------------------------------------------------------------------


def improve(
    start: Choice,
    divergence: float,
    costs: Costs,
    tables: Sequence[Values],
    limit: int,
    measure: Callable[[Choice], float],
    trials: int,
    accept: Callable[[Choice], None] = lambda choice: None,
) -> tuple[Choice, float, list[Trial]]:
    """Swaps from a measured assembly, each kept where the measured divergence falls by more than LEAST_GAIN.

    A move takes one group to its next dearer candidate and, where the limit needs it, another group to its next cheaper one. Moves
    are tried in the order of the gain that the last table predicts, and only those from which some table predicts one: the choice
    that is best by a table has none left by that table, and may still have some by another. After PATIENCE moves in a row that
    were not kept, no other is tried.
    measure: the divergence of an assembly; called at most `trials` times. accept: called with every assembly that is kept.
    """
    now, best, done, idle = start, divergence, {start}, 0
    tried: list[Trial] = []
    while len(tried) < trials:
        accepted = False
        for move in _moves(now, costs, tables, limit):
            if move in done:
                continue
            if len(tried) >= trials or idle >= PATIENCE:
                break
            done.add(move)
            found = measure(move)
            accepted = found < best * (1 - LEAST_GAIN)
            tried.append(Trial(move, found, accepted))
            idle = 0 if accepted else idle + 1
            if accepted:
                now, best = move, found
                accept(now)
                break
        if not accepted:
            break
    return now, best, tried


def _moves(now: Choice, costs: Costs, tables: Sequence[Values], limit: int) -> list[Choice]:
    """Assemblies one step away within the limit from which a table predicts a gain, the largest gain by the last table first."""
    steps = [_neighbours(row, candidate) for row, candidate in zip(costs, now, strict=True)]
    spare = limit - bits_of(costs, now)

    def change(group: int, candidate: int) -> tuple[int, tuple[float, ...]]:
        """Bits that a step takes, and what it gains by each table."""
        old = now[group]
        gains = tuple(values[group][old] - values[group][candidate] for values in tables)
        return costs[group][candidate] - costs[group][old], gains

    ups = [(g, up, *change(g, up)) for g, (_, up) in enumerate(steps) if up is not None]
    downs = [(g, down, *change(g, down)) for g, (down, _) in enumerate(steps) if down is not None]
    found: list[tuple[float, tuple[tuple[int, int], ...]]] = []
    for group, up, bits, gains in ups:
        if bits <= spare and max(gains) > 0:
            found.append((gains[-1], ((group, up),)))
        for other, down, freed, losses in downs:
            both = [gain + loss for gain, loss in zip(gains, losses, strict=True)]
            if other != group and bits + freed <= spare and max(both) > 0:
                found.append((both[-1], ((group, up), (other, down))))
    found.sort(key=lambda each: (-each[0], each[1]))
    moves = []
    for _, changes in found:
        made = list(now)
        for group, candidate in changes:
            made[group] = candidate
        moves.append(tuple(made))
    return moves


def _neighbours(costs: Sequence[int], now: int) -> tuple[int | None, int | None]:
    """The next cheaper and the next dearer candidate of a group; None where there is none."""
    cheaper = [k for k, cost in enumerate(costs) if cost < costs[now]]
    dearer = [k for k, cost in enumerate(costs) if cost > costs[now]]
    return (
        max(cheaper, key=lambda k: (costs[k], -k)) if cheaper else None,
        min(dearer, key=lambda k: (costs[k], k)) if dearer else None,
    )


# --- from a choice to a cell ----------------------------------------------------------------------------------------------------


def mixed_cell(
    candidates: Sequence[Cell],
    groups: Sequence[Sequence[Matrix]],
    weights: Sequence[int],
    choice: Choice,
    name: str,
) -> tuple[int, Cell]:
    """The candidate that covers most weights, and the cell of an assembly: that candidate itself where all groups have it, else one
    with its scheme and rounding, and overrides for all other matrices.

    weights: numbers in each group. There is an override for each set of linears, with the blocks in which exactly these linears
    have the same scheme (or rounding). Equal assemblies give equal cells.
    """
    covered = [0] * len(candidates)
    for candidate, size in zip(choice, weights, strict=True):
        covered[candidate] += size
    base = max(range(len(candidates)), key=lambda k: (covered[k], -k))
    own = candidates[base]
    if len(set(choice)) == 1:
        return base, own
    schemes: dict[Matrix, WeightScheme] = {}
    roundings: dict[Matrix, Part] = {}
    for members, candidate in zip(groups, choice, strict=True):
        for block, linear in members:
            cell, short = candidates[candidate], linear.rpartition(".")[2]
            scheme, rounding = cell.scheme.weight_for(block, linear), cell.method.rounding
            if scheme != own.scheme.weight:
                schemes[block, short] = scheme
            if rounding is not None and rounding != own.method.rounding:
                roundings[block, short] = rounding
    overrides = [
        Override(names, blocks, freeze(_differences(own.scheme.weight, scheme)))
        for scheme, names, blocks in _by_linears(schemes)
    ]
    execution = tuple(
        dataclasses.replace(o, weight=()) for o in own.scheme.overrides if o.activation
    )
    mixed = dataclasses.replace(own.scheme, name=name, overrides=(*execution, *overrides))
    method = own.method
    if roundings:
        used = dict.fromkeys(candidates[k].method.name for k in sorted(set(choice)))
        others = tuple(
            RoundingOverride(part, linears, blocks)
            for part, linears, blocks in _by_linears(roundings)
        )
        method = dataclasses.replace(method, name="+".join(used), overrides=others)
    windows = own.calibration or next(
        (c.calibration for k in sorted(set(choice)) if (c := candidates[k]).calibration), None
    )
    return base, dataclasses.replace(own, method=method, scheme=mixed, calibration=windows)


T = TypeVar("T", bound=Hashable)


def _by_linears(values: Mapping[Matrix, T]) -> list[tuple[T, tuple[str, ...], tuple[int, ...]]]:
    """(value, linears, blocks): in each of the blocks exactly these linears have the value; in one order for equal mappings."""
    named: dict[tuple[int, T], list[str]] = {}
    for block, linear in sorted(values):
        named.setdefault((block, values[block, linear]), []).append(linear)
    blocks: dict[tuple[T, tuple[str, ...]], list[int]] = {}
    for (block, value), linears in named.items():
        blocks.setdefault((value, tuple(linears)), []).append(block)
    found = [(value, linears, tuple(of)) for (value, linears), of in blocks.items()]
    return sorted(found, key=lambda each: (repr(each[0]), each[1], each[2]))


def _differences(base: WeightScheme, wanted: WeightScheme) -> dict[str, object]:
    given = to_json(base)
    return {name: value for name, value in to_json(wanted).items() if value != given[name]}
