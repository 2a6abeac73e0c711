"""Does a cell differ from its full-precision baseline? Paired tests over the items that both were scored on. Loads without SciPy.

Cells of a table share their items, so differences are tested pair by pair; the independent standard errors that lm-eval prints
would hide all but the largest. Two tests, by what an item holds:

    right or wrong   exact McNemar: of the items on which the two disagree, how many went to either side? Binomial with p = 1/2,
                     two-sided. The exact form rather than mid-p: it never exceeds its level, at the price of some power.
    a number         (log-likelihood of a window, BLEU of a sentence, …) paired bootstrap of the mean difference, studentized, so
                     that the level holds for few windows too; its seed is fixed. From 1,000 items on Student's t, its limit.

Where items count unequally, as the documents of a perplexity do by their tokens, the mean is the ratio Σ w d / Σ w, its error that
of the ratio estimator (Cochran, Sampling Techniques, 1977, chapter 6), and weights are resampled with their items.

A cell that was made with several seeds is tested as a whole (`compare_seeds`): items and seeds are both drawn from more that might
have been, so a difference must stand out from the spread of both. Three seeds say little about their own spread; in a large table
only differences many times that spread are then shown, and five or more are better.

Tests of one table are corrected together after Holm (Scandinavian Journal of Statistics 6, 1979): the chance of one false
difference in the whole table stays below 5 %, whatever the dependence between cells.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
MINIMUM_ITEMS = 8  # fewer windows carry no test
BOOTSTRAP_DRAWS = 9999  # smallest p 1e-4: enough for Holm over 500 tests
BOOTSTRAP_LIMIT = 1000
BATCH = 1000  # draws at once, which bounds memory

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


def mean_error(
    values: Sequence[float] | Floats, weights: Sequence[float] | Floats | None = None
) -> tuple[float, float]:
    """Weighted mean of values [items] and its standard error; NaN for one item. Equal weights give the plain mean and s / √n."""
    column = np.asarray(values, np.float64)
    heavy = np.ones_like(column) if weights is None else np.asarray(weights, np.float64)
    items, total = len(column), float(heavy.sum())
    if not np.isfinite(column).all():
        return float("nan"), float("nan")
    mean = float((heavy * column).sum() / total)
    if items < 2:
        return mean, float("nan")
    return mean, math.sqrt(
        items / (items - 1) * float(((heavy * (column - mean)) ** 2).sum())
    ) / total


def compare(
    ours: Sequence[float] | Floats,
    baseline: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None = None,
    seed: int = 0,
) -> Comparison | None:
    """Test paired items, all [items]. None where no test is meaningful: too few items, or values that are not finite."""
    cell, reference = np.asarray(ours, np.float64), np.asarray(baseline, np.float64)
    heavy = None if weights is None else np.asarray(weights, np.float64)
    if (
        cell.shape != reference.shape
        or cell.ndim != 1
        or (heavy is not None and heavy.shape != cell.shape)
    ):
        shapes = f"{cell.shape} and {reference.shape}" + (
            "" if heavy is None else f", weights {heavy.shape}"
        )
        raise ValueError(f"paired items need one shape, got {shapes}")
    if len(cell) < MINIMUM_ITEMS or not (np.isfinite(cell).all() and np.isfinite(reference).all()):
        return None
    if heavy is not None and (heavy == heavy[0]).all():
        heavy = None
    if heavy is None and np.isin(cell, (0, 1)).all() and np.isin(reference, (0, 1)).all():
        return mcnemar(cell, reference)
    if len(cell) < BOOTSTRAP_LIMIT:
        return paired_bootstrap(cell, reference, heavy, seed)
    return paired_t(cell, reference, heavy)


def compare_seeds(
    ours: Sequence[Sequence[float]] | Floats,
    baseline: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None = None,
    seed: int = 0,
) -> Comparison | None:
    """Test a cell with several seeds, [seeds, items], against one column [items]; like `compare` for a single seed.

    The interval is Banerjee's (Sankhyā 22, 1960), half of whose width is √(t² e² over items + t² e² over seeds), each t with
    its own degrees of freedom: it holds its level however the two compare, where
    Satterthwaite's fails for two seeds that agree by chance.
    Where few items move, a test of the items' means over seeds must reject too: the larger of the two p-values counts.
    """
    cells, reference = np.asarray(ours, np.float64), np.asarray(baseline, np.float64)
    if cells.ndim != 2 or cells.shape[1:] != reference.shape:
        raise ValueError(f"seeds × items against items, got {cells.shape} and {reference.shape}")
    if len(cells) == 1:
        return compare(cells[0], reference, weights, seed)
    if cells.shape[1] < MINIMUM_ITEMS or not (
        np.isfinite(cells).all() and np.isfinite(reference).all()
    ):
        return None
    from scipy.special import stdtrit

    heavy = np.ones_like(reference) if weights is None else np.asarray(weights, np.float64)
    differences = cells - reference  # [seeds, items]
    seeds, items = differences.shape
    per_item = differences.mean(axis=0)
    mean, item_error = mean_error(per_item, heavy)
    seed_error = mean_error((differences * heavy).sum(axis=1) / heavy.sum())[1]
    name = f"{seeds} seeds, {items} items"

    def half_width(level: float) -> float:
        return math.hypot(
            float(stdtrit(items - 1, level / 2)) * item_error,
            float(stdtrit(seeds - 1, level / 2)) * seed_error,
        )

    low, high = 0.0, 1.0  # of the level at which the interval just reaches 0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if half_width(middle) < abs(mean) else (middle, high)
    p_value, width = high, half_width(LEVEL)
    if p_value < LEVEL:
        if np.isin(cells, (0, 1)).all() and np.isin(reference, (0, 1)).all():
            p_value = max(p_value, sign_flips(per_item, seed))
        else:
            over_items = compare(per_item, np.zeros(items), weights, seed)
            p_value = p_value if over_items is None else max(p_value, over_items.p_value)
    return Comparison(name, items, mean, mean - width, mean + width, p_value, p_value)


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds, and half the width of its 95 % interval after Student; None for one seed or values that are not finite."""
    from scipy.stats import t

    mean, error = mean_error(values)
    if len(values) < 2 or not math.isfinite(mean):
        return (mean if math.isfinite(mean) else float(np.asarray(values, np.float64).sum())), None
    return mean, float(t.ppf(1 - LEVEL / 2, len(values) - 1)) * error


def sign_flips(differences: Floats, seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> float:
    """p-value of a mean of 0, for differences [items] that are as likely of either sign; McNemar's test where they are 0 and ±1."""
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    observed = abs(float(moved.sum())) * (1 - 1e-12)
    if len(moved) <= 13:  # all of them: exact
        signs = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float(np.mean(np.abs(signs @ moved) >= observed))
    rng = np.random.default_rng(seed)
    reached = 0
    for start in range(0, draws, BATCH):
        signs = rng.integers(2, size=(min(BATCH, draws - start), len(moved)), dtype=np.int8) * 2 - 1
        reached += int(np.sum(np.abs(signs @ moved) >= observed))
    return (1 + reached) / (draws + 1)


def mcnemar(ours: Floats, baseline: Floats) -> Comparison:
    """Exact McNemar test of two columns of 0 and 1, [items]. The interval is Wald's for paired shares."""
    from scipy.stats import binomtest

    won = int(np.sum((ours == 1) & (baseline == 0)))
    lost = int(np.sum((ours == 0) & (baseline == 1)))
    items = len(ours)
    p_value = float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0
    difference = (won - lost) / items
    error = math.sqrt(max(won + lost - (won - lost) ** 2 / items, 0.0)) / items
    return Comparison(
        "McNemar",
        items,
        difference,
        difference - 1.96 * error,
        difference + 1.96 * error,
        p_value,
        p_value,
    )


def paired_bootstrap(
    ours: Floats,
    baseline: Floats,
    weights: Floats | None = None,
    seed: int = 0,
    draws: int = BOOTSTRAP_DRAWS,
) -> Comparison:
    """Studentized paired bootstrap of the mean difference of two columns, [items]. Memory: a batch of draws × items doubles."""
    differences = ours - baseline
    heavy = np.ones_like(differences) if weights is None else weights
    items = len(differences)
    mean, error = mean_error(differences, heavy)
    if error <= 1e-12 * max(abs(mean), 1e-300):  # every item moved by the same amount
        p_value = 1.0 if mean == 0 else 1 / (draws + 1)
        return Comparison("paired bootstrap", items, mean, mean, mean, p_value, p_value)
    rng = np.random.default_rng(seed)
    centred, t_values = differences - mean, []
    for start in range(0, draws, BATCH):
        chosen = rng.integers(items, size=(min(BATCH, draws - start), items))  # [draws, items]
        sample, weight = centred[chosen], heavy[chosen]
        total = weight.sum(axis=1)
        means = (weight * sample).sum(axis=1) / total
        squares = ((weight * (sample - means[:, None])) ** 2).sum(axis=1)
        spread = np.sqrt(items / (items - 1) * squares) / total
        with np.errstate(divide="ignore", invalid="ignore"):
            t_values.append(
                np.nan_to_num(means / spread, nan=0.0, posinf=math.inf, neginf=-math.inf)
            )
    drawn = np.abs(np.concatenate(t_values))
    p_value = (1 + int(np.sum(drawn >= abs(mean) / error))) / (draws + 1)
    width = float(np.quantile(drawn, 1 - LEVEL, method="higher")) * error
    return Comparison("paired bootstrap", items, mean, mean - width, mean + width, p_value, p_value)


def paired_t(ours: Floats, baseline: Floats, weights: Floats | None = None) -> Comparison:
    """Student's paired t test of two columns, [items]: the limit of the bootstrap for many items."""
    from scipy.stats import t

    differences = ours - baseline
    items = len(differences)
    mean, error = mean_error(differences, weights)
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


class Correlation(NamedTuple):
    """Pearson's r and its 95 % interval by Fisher's z (Metron 1, 1921); the interval of three pairs is -1 to 1."""

    r: float
    low: float
    high: float


def pearson(pairs: Sequence[tuple[float, float]]) -> Correlation | None:
    """Correlation of finite pairs; None for fewer than three, or where one side is constant or not finite."""
    columns = np.asarray(pairs, np.float64).reshape(-1, 2).T  # [2, pairs]
    if (
        columns.shape[1] < 3
        or not np.isfinite(columns).all()
        or (np.ptp(columns, axis=1) == 0).any()
    ):
        return None
    from scipy.stats import pearsonr

    found = pearsonr(*columns)
    return Correlation(float(found.statistic), *map(float, found.confidence_interval(1 - LEVEL)))
