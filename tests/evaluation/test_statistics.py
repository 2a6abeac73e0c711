"""Significance: the level holds where nothing differs, and a planted difference is found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.evaluation.statistics import (
    LEVEL,
    compare,
    compare_seeds,
    holm,
    mcnemar,
    mean_error,
    over_seeds,
    paired_bootstrap,
    paired_t,
    pearson,
    sign_flips,
)


def family_wise_errors(
    rng: np.random.Generator, kind: str, items: int, cells: int, grids: int
) -> int:
    """Null grids in which some cell is called different from the baseline."""
    wrong = 0
    for _ in range(grids):
        difficulty = rng.normal(size=items)
        p_values = {}
        for cell in range(cells + 1):
            if kind == "accuracy":
                column = (rng.normal(size=items) + difficulty > 0).astype(float)
            elif kind == "normal":
                column = difficulty + 0.1 * rng.normal(size=items)
            else:
                # heavy tails: a few windows move far
                column = difficulty + 0.1 * rng.standard_t(3, size=items)
            if cell == 0:
                baseline = column
                continue
            comparison = compare(column, baseline)
            assert comparison is not None
            p_values[cell] = comparison.p_value
        wrong += min(holm(p_values).values()) < LEVEL
    return wrong


@pytest.mark.parametrize(
    ("kind", "items", "cells", "grids"),
    [
        ("accuracy", 200, 12, 300),
        ("accuracy", 30, 6, 300),
        ("normal", 20, 5, 120),
        ("heavy", 40, 5, 120),
        ("normal", 1200, 6, 200),
    ],
)
def test_null_grids_stay_below_the_level(kind: str, items: int, cells: int, grids: int) -> None:
    wrong = family_wise_errors(np.random.default_rng(20), kind, items, cells, grids)
    # Monte Carlo error of the simulation itself
    allowed = LEVEL + 2.5 * np.sqrt(LEVEL * (1 - LEVEL) / grids)
    assert wrong / grids <= allowed, wrong


def seeded_cell(
    rng: np.random.Generator, kind: str, baseline: np.ndarray, seeds: int, spread: float
) -> np.ndarray:
    """Results of one cell, [seeds, items], whose expectation over seeds and items is the baseline's."""
    effects = rng.normal(size=(seeds, 1)) * spread
    if kind == "loss":
        return (
            baseline
            + effects
            + rng.normal(size=baseline.shape) * 0.1
            + rng.normal(size=(seeds, len(baseline))) * 0.1
        )
    flips = rng.random((seeds, len(baseline))) < 0.05 + np.abs(effects) / 2
    return np.where(flips, rng.random((seeds, len(baseline))) < 0.5 + effects, baseline).astype(
        float
    )


@pytest.mark.parametrize(
    ("kind", "seeds", "items", "spread"),
    [
        ("loss", 2, 60, 0.0),
        ("loss", 3, 60, 0.05),
        ("loss", 2, 60, 0.3),
        ("accuracy", 3, 100, 0.0),
        ("accuracy", 3, 400, 0.02),
    ],
)
def test_null_grids_with_seeds_stay_below_the_level(
    kind: str, seeds: int, items: int, spread: float
) -> None:
    rng = np.random.default_rng(7)
    grids, wrong = 80, 0
    for _ in range(grids):
        baseline = (
            rng.normal(size=items) if kind == "loss" else (rng.random(items) < 0.5).astype(float)
        )
        found = {
            cell: compare_seeds(seeded_cell(rng, kind, baseline, seeds, spread), baseline)
            for cell in range(4)
        }
        wrong += (
            min(holm({cell: each.p_value for cell, each in found.items() if each}).values()) < LEVEL
        )
    assert wrong / grids <= LEVEL + 2.5 * np.sqrt(LEVEL * (1 - LEVEL) / grids), wrong


def test_the_spread_of_seeds_counts_and_a_difference_beyond_it_is_found() -> None:
    rng = np.random.default_rng(1)
    baseline = rng.normal(size=200)
    items = rng.normal(size=200) * 0.02
    near = np.stack([baseline + items + shift for shift in (0.10, 0.12, 0.11)])
    # one seed alone makes the mean
    far = np.stack([baseline + items + shift for shift in (0.01, 0.30, 0.02)])
    found = [compare_seeds(cells, baseline) for cells in (near, far)]
    assert found[0] is not None and found[0].p_value < 0.02 and found[0].low < 0.11 < found[0].high
    assert (
        found[1] is not None
        and found[1].p_value > LEVEL > compare(far.mean(axis=0), baseline).p_value
    )  # type: ignore[union-attr]
    assert compare_seeds(near[:1], baseline) == compare(near[0], baseline)
    assert compare_seeds(np.stack([baseline] * 3), baseline).p_value == 1.0  # type: ignore[union-attr]


def test_the_mean_over_seeds_has_students_interval() -> None:
    mean, half = over_seeds([2.0, 3.0, 4.0])
    assert mean == 3.0 and half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert over_seeds([2.0]) == (2.0, None) and over_seeds([1.0, float("inf")]) == (
        float("inf"),
        None,
    )


def test_weights_are_those_of_a_ratio() -> None:
    rng = np.random.default_rng(5)
    values, weights = rng.normal(3, 1, 50), rng.integers(1, 400, 50)
    mean, error = mean_error(values, weights)
    assert mean == pytest.approx(np.average(values, weights=weights))
    residuals = weights * (values - mean)
    assert error == pytest.approx(np.sqrt(50 / 49 * (residuals**2).sum()) / weights.sum())
    assert mean_error(values, np.full(50, 7)) == pytest.approx(
        (values.mean(), values.std(ddof=1) / np.sqrt(50))
    )
    ours = values + np.where(weights > 200, 0.2, -0.02) + rng.normal(0, 0.05, 50)
    weighted, plain = compare(ours, values, weights), compare(ours, values)
    assert weighted is not None and plain is not None and weighted.difference > plain.difference
    assert weighted.difference == pytest.approx(
        np.average(ours, weights=weights) - np.average(values, weights=weights)
    )
    assert compare(ours, values, np.full(50, 3)) == plain  # equal weights are none
    with pytest.raises(ValueError, match="one shape"):
        compare(ours, values, weights[:-1])


def test_weighted_null_grids_stay_below_the_level() -> None:
    rng = np.random.default_rng(11)
    wrong = 0
    for _ in range(60):
        weights = rng.lognormal(4, 1, 40)  # documents of very unequal length
        p_values = {}
        for cell in range(4):
            found = compare(rng.normal(size=40) / np.sqrt(weights), np.zeros(40), weights)
            assert found is not None
            p_values[cell] = found.p_value
        wrong += min(holm(p_values).values()) < LEVEL
    assert wrong / 60 <= LEVEL + 2.5 * np.sqrt(LEVEL * (1 - LEVEL) / 60), wrong


def test_sign_flips_of_right_and_wrong_are_mcnemar() -> None:
    for won, lost in ((3, 0), (6, 1), (5, 5), (0, 0)):
        differences = np.array([1.0] * won + [-1.0] * lost + [0.0] * 30)
        ours, baseline = (differences > 0).astype(float), (differences < 0).astype(float)
        assert sign_flips(differences) == pytest.approx(mcnemar(ours, baseline).p_value)
    many = np.array([1.0] * 30 + [-1.0] * 14)
    assert sign_flips(many) == pytest.approx(
        mcnemar((many > 0).astype(float), (many < 0).astype(float)).p_value, abs=0.01
    )


def test_a_planted_difference_is_found_and_only_that() -> None:
    rng = np.random.default_rng(3)
    found = clean = 0
    for _ in range(40):
        baseline = rng.normal(3.0, 0.5, size=40)
        p_values = {}
        for cell in range(8):
            shift = 0.05 if cell == 5 else 0.0
            comparison = compare(baseline + shift + rng.normal(0, 0.05, size=40), baseline)
            assert comparison is not None
            p_values[cell] = comparison.p_value
        called = {cell for cell, p_value in holm(p_values).items() if p_value < LEVEL}
        found += 5 in called
        clean += called <= {5}
    assert found >= 38 and clean >= 36


def test_mcnemar_is_the_binomial_of_the_discordant_pairs() -> None:
    ours = np.array([1] * 9 + [0] * 1 + [1] * 50 + [0] * 40, float)
    baseline = np.array([0] * 9 + [1] * 1 + [1] * 50 + [0] * 40, float)
    result = mcnemar(ours, baseline)
    assert result.p_value == pytest.approx(2 * 11 / 1024)  # 2 (C(10,0) + C(10,1)) / 2**10
    assert result.difference == pytest.approx(0.08) and result.low < 0.08 < result.high
    assert mcnemar(baseline, ours).p_value == result.p_value
    assert mcnemar(ours, ours).p_value == 1.0


def test_bootstrap_is_seeded_symmetric_and_near_t() -> None:
    rng = np.random.default_rng(0)
    ours, baseline = rng.normal(0.02, 0.1, 200), rng.normal(0.0, 0.1, 200)
    result = paired_bootstrap(ours, baseline)
    assert result == paired_bootstrap(ours, baseline)
    assert paired_bootstrap(baseline, ours).p_value == pytest.approx(result.p_value, abs=0.02)
    assert paired_t(ours, baseline).p_value == pytest.approx(result.p_value, abs=0.02)
    assert paired_bootstrap(ours, ours).p_value == 1.0
    assert paired_bootstrap(ours + 0.5, ours).p_value == pytest.approx(1e-4)


def test_what_carries_no_test() -> None:
    assert compare([1.0] * 7, [0.0] * 7) is None
    assert compare([1.0] * 20, [float("inf")] * 20) is None
    with pytest.raises(ValueError, match="one shape"):
        compare([1.0] * 8, [1.0] * 9)


def test_holm_is_monotone_and_bounded() -> None:
    p_values = dict(enumerate(np.random.default_rng(1).uniform(size=50)))
    adjusted = holm(p_values)
    ordered = [adjusted[name] for name in sorted(p_values, key=p_values.__getitem__)]
    assert ordered == sorted(ordered) and ordered[-1] <= 1
    assert all(adjusted[name] >= p_values[name] for name in p_values)
    assert holm({}) == {}


def test_the_interval_of_a_correlation_holds_its_level() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        x = rng.normal(size=12)
        y = -0.8 * x + 0.6 * rng.normal(size=12)
        found = pearson(list(zip(x, y, strict=True)))
        assert found is not None and found.r == pytest.approx(np.corrcoef(x, y)[0, 1])
        held += found.low <= -0.8 <= found.high
    assert 0.93 <= held / 2000 <= 0.97
    line = pearson([(x, 2.0 * x) for x in range(5)])
    assert line is not None and line.high == pytest.approx(1)
    assert pearson([(1, math.nan), (2, 1), (3, 2)]) is None and pearson([(1, 2), (2, 3)]) is None
