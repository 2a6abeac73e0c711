"""Answers that changed against full precision, benchmark by benchmark: where errors cancel, accuracy hides them.

    flips       share of items whose answer is another than the full-precision model's: another choice; where nothing is chosen,
                right instead of wrong or wrong instead of right
    flips_lost  share of items that were right and are wrong;   flips_won: the other way round
    choice_kl   mean over items of sum_c p(c) log(p(c) / q(c)) in nats, c the choices of an item, p the full-precision model's
                likelihoods of them and q the cell's, each normalised over the item

They follow from the item results of two cells, so they cost no evaluation and no key holds them: tables whose columns name them
("arc_easy/flips"), `harness show` and MLflow have them computed from the store. Items are matched by identity and prompt. Loads
without torch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from harness.core import plugins
from harness.core.cell import Evaluation, baseline_of, cell_key, score_key

if TYPE_CHECKING:
    import pandas

    from harness.storage.record import Record
    from harness.storage.store import Store


ANSWERS = ("chosen", "chosen_before", "correct", "correct_before")
METRICS = ("flips", "flips_lost", "flips_won", "choice_kl")


def with_flips(record: Record, store: Store) -> Record:
    """The record with these metrics beside the others, where the items of the cell and of its baseline are known."""
    baseline = baseline_of(record.cell)
    if cell_key(baseline) == record.cell_key:
        return record
    scores = dict(record.scores)
    for evaluation in record.cell.evaluations:
        score = scores.get(evaluation.name)
        evaluator = plugins.find("evaluator").get(evaluation.evaluator)
        if score is None or evaluator is None or not evaluator.get("compares_items", False):
            continue
        ours = store.evaluation_items(record, evaluation)
        theirs = store.items(cell_key(baseline), score_key(baseline, evaluation))
        if ours is None or theirs is None:
            continue
        found = _of_evaluation(evaluation, ours, theirs)
        scores[evaluation.name] = {**score, "metrics": {**score["metrics"], **found}}
    return dataclasses.replace(record, scores=scores)


def _of_evaluation(
    evaluation: Evaluation, ours: pandas.DataFrame, theirs: pandas.DataFrame
) -> dict[str, float]:
    """Metrics by full name, for the evaluation and for each of its tasks where it has several."""
    known = [name for name in ("id", "prompt_hash") if name in ours and name in theirs]
    if "id" not in known or ours["id"].duplicated().any():
        return {}
    pairs = ours.merge(theirs, on=known, suffixes=("", "_before"))
    if not len(pairs) == len(ours) == len(theirs):
        return {}
    groups = [(evaluation.name, pairs)]
    if "task" in pairs and pairs["task"].nunique() > 1:
        groups += [(str(task), items) for task, items in pairs.groupby("task", sort=False)]
    return {
        f"{name}/{metric}": value
        for name, items in groups
        for metric, value in of_items(items).items()
    }


def of_items(items: pandas.DataFrame) -> dict[str, float]:
    """Metrics of matched items: columns of the cell, and those of full precision with `_before` behind their names.

    An item without an answer, in either, has no choice (None): then there is no number for all of them, and the metrics are NaN.
    """
    found: dict[str, float] = {}
    has_choices, has_marks = (
        ("chosen" in items and "chosen_before" in items),
        ("correct" in items and "correct_before" in items),
    )
    if has_choices or has_marks:
        answer = "chosen" if has_choices else "correct"
        found["flips"] = float((items[answer] != items[f"{answer}_before"]).mean())
    if has_marks:
        now, before = items["correct"].astype(bool), items["correct_before"].astype(bool)
        found["flips_lost"], found["flips_won"] = (
            float((before & ~now).mean()),
            float((~before & now).mean()),
        )
    if not _are_answered(items):
        found = dict.fromkeys(found, math.nan)
    if has_choices:
        found["choice_kl"] = float(
            _divergences(items["log_likelihoods_before"], items["log_likelihoods"]).mean()
        )
    answers = [name for name in ANSWERS if name in items]
    return dict.fromkeys(found, math.nan) if items[answers].isna().any(axis=None) else found


def _are_answered(items: pandas.DataFrame) -> bool:
    """Whether every item has an answer in both cells: the largest of likelihoods that are NaN is none."""
    names = [f"{name}{side}" for name in ("chosen", "correct") for side in ("", "_before")]
    likelihoods = [
        items[name] for name in ("log_likelihoods", "log_likelihoods_before") if name in items
    ]
    return not any(items[name].isna().any() for name in names if name in items) and not any(
        np.isnan(np.asarray(each, np.float64)).any() for column in likelihoods for each in column
    )


def _divergences(before: pandas.Series, now: pandas.Series) -> np.ndarray:
    """KL between the two sets of log-likelihoods of each item, each normalised over its choices, [items]."""
    counts = np.array([len(each) for each in before])
    found = np.empty(len(counts))
    for count in np.unique(counts):  # items with equally many choices at once
        (chosen,) = np.nonzero(counts == count)
        p, q = (
            _normalised(np.array([*column.iloc[chosen]], np.float64)) for column in (before, now)
        )
        share = np.exp(p)
        with np.errstate(invalid="ignore"):
            found[chosen] = np.where(share == 0, 0.0, share * (p - q)).sum(1)  # NaN stays NaN
    return found


def _normalised(log_likelihoods: np.ndarray) -> np.ndarray:
    """[items, choices]"""
    shifted = log_likelihoods - log_likelihoods.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
