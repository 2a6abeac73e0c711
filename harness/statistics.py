"""Does a cell differ from its full-precision baseline? Paired tests over the items that both were scored on. Loads without SciPy.

Cells of a table share their items, so differences are tested pair by pair; the independent standard errors that lm-eval prints
would hide all but the largest. Two tests, by what an item holds:

    right or wrong   exact McNemar: of the items on which the two disagree, how many went to either side? Binomial with p = 1/2,
                     two-sided. The exact form rather than mid-p: it never exceeds its level, at the price of some power.
    a number         (log-likelihood of a window, BLEU of a sentence, …) paired bootstrap of the mean difference, studentized, so
                     that the level holds for few windows too; its seed is fixed. From 1,000 items on Student's t, its limit.

Tests of one table are corrected together after Holm (Scandinavian Journal of Statistics 6, 1979): the chance of one false
difference in the whole table stays below 5 %, whatever the dependence between cells.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
MINIMUM_ITEMS = 8                               # fewer windows carry no test
BOOTSTRAP_DRAWS = 9999                          # smallest p 1e-4: enough for Holm over 500 tests
BOOTSTRAP_LIMIT = 1000

Floats = NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Comparison:
    """One cell against its baseline on one metric.

    difference   mean over items of cell minus baseline (for perplexity: of the windows' mean negative log-likelihoods)
    low, high    95 % confidence interval of it, not corrected for several tests
    p_value      two-sided, not corrected
    adjusted     p_value after Holm over its table; equal to p_value until `holm` has seen the table
    """

    test: str
    items: int
    difference: float
    low: float
    high: float
    p_value: float
    adjusted: float

    @property
    def differs(self) -> bool:
        return self.adjusted < LEVEL


def compare(ours: Sequence[float] | Floats, baseline: Sequence[float] | Floats, seed: int = 0) -> Comparison | None:
    """Test paired items, both [items]. None where no test is meaningful: too few items, or values that are not finite."""
    cell, reference = np.asarray(ours, np.float64), np.asarray(baseline, np.float64)
    if cell.shape != reference.shape or cell.ndim != 1:
        raise ValueError(f"paired items need one shape, got {cell.shape} and {reference.shape}")
    if len(cell) < MINIMUM_ITEMS or not (np.isfinite(cell).all() and np.isfinite(reference).all()):
        return None
    if np.isin(cell, (0, 1)).all() and np.isin(reference, (0, 1)).all():
        return mcnemar(cell, reference)
    return paired_bootstrap(cell, reference, seed) if len(cell) < BOOTSTRAP_LIMIT else paired_t(cell, reference)


def mcnemar(ours: Floats, baseline: Floats) -> Comparison:
    """Exact McNemar test of two columns of 0 and 1, [items]. The interval is Wald's for paired shares."""
    from scipy.stats import binomtest

    won = int(np.sum((ours == 1) & (baseline == 0)))
    lost = int(np.sum((ours == 0) & (baseline == 1)))
    items = len(ours)
    p_value = float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0
    difference = (won - lost) / items
    error = math.sqrt(max(won + lost - (won - lost) ** 2 / items, 0.0)) / items
    return Comparison("McNemar", items, difference, difference - 1.96 * error, difference + 1.96 * error, p_value, p_value)


def paired_bootstrap(ours: Floats, baseline: Floats, seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> Comparison:
    """Studentized paired bootstrap of the mean difference of two columns, [items]. Memory: draws × items doubles."""
    differences = ours - baseline
    items, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(items)
    if error <= 1e-12 * max(abs(mean), 1e-300):                     # every item moved by the same amount
        p_value = 1.0 if mean == 0 else 1 / (draws + 1)
        return Comparison("paired bootstrap", items, mean, mean, mean, p_value, p_value)
    rng = np.random.default_rng(seed)
    sample = (differences - mean)[rng.integers(items, size=(draws, items))]         # [draws, items]
    spread = sample.std(axis=1, ddof=1) / math.sqrt(items)
    with np.errstate(divide="ignore", invalid="ignore"):
        t_values = np.nan_to_num(sample.mean(axis=1) / spread, nan=0.0, posinf=math.inf, neginf=-math.inf)
    p_value = (1 + int(np.sum(np.abs(t_values) >= abs(mean) / error))) / (draws + 1)
    width = float(np.quantile(np.abs(t_values), 1 - LEVEL, method="higher")) * error
    return Comparison("paired bootstrap", items, mean, mean - width, mean + width, p_value, p_value)


def paired_t(ours: Floats, baseline: Floats) -> Comparison:
    """Student's paired t test of two columns, [items]: the limit of the bootstrap for many items."""
    from scipy.stats import t

    differences = ours - baseline
    items, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(items)
    if error == 0:
        p_value = 1.0 if mean == 0 else 0.0
        return Comparison("paired t", items, mean, mean, mean, p_value, p_value)
    p_value = float(2 * t.sf(abs(mean) / error, items - 1))
    width = float(t.ppf(1 - LEVEL / 2, items - 1)) * error
    return Comparison("paired t", items, mean, mean - width, mean + width, p_value, p_value)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Adjusted p-values of one family of tests: reject where they are below the level.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted: dict[Name, float] = {}
    running = 0.0
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    for rank, (name, p_value) in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - rank) * p_value))
        adjusted[name] = running
    return adjusted
