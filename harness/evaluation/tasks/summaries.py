"""ROUGE of a summary. A function of lm-eval task files; without the rouge_score package it raises, and never scores 0."""

from __future__ import annotations

import functools
from typing import Any

NAMES = ("rouge1", "rouge2", "rougeL")


def rouge(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, -2 and -L, lower case, without stemming, against the highlights or the summary."""
    reference = document.get("highlights") or document["summary"]
    found = _scorer().score(reference, results[0])
    return {name: float(found[name].fmeasure) for name in NAMES}


@functools.cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer  # type: ignore[import-untyped]

    return rouge_scorer.RougeScorer(list(NAMES), use_stemmer=False)
