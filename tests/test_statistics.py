"""Significance: the level holds where nothing differs, and a planted difference is found."""

from __future__ import annotations

import numpy as np
import pytest

from harness.statistics import LEVEL, compare, holm, mcnemar, paired_bootstrap, paired_t


def family_wise_errors(rng: np.random.Generator, kind: str, items: int, cells: int, grids: int) -> int:
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
                column = difficulty + 0.1 * rng.standard_t(3, size=items)       # heavy tails: a few windows move far
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
    [("accuracy", 200, 12, 300), ("accuracy", 30, 6, 300), ("normal", 20, 5, 120), ("heavy", 40, 5, 120), ("normal", 1200, 6, 200)],
)
def test_null_grids_stay_below_the_level(kind: str, items: int, cells: int, grids: int) -> None:
    wrong = family_wise_errors(np.random.default_rng(20), kind, items, cells, grids)
    allowed = LEVEL + 2.5 * np.sqrt(LEVEL * (1 - LEVEL) / grids)                # Monte Carlo error of the simulation itself
    assert wrong / grids <= allowed, wrong


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
    assert result.p_value == pytest.approx(2 * 11 / 1024)                       # 2 (C(10,0) + C(10,1)) / 2**10
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
