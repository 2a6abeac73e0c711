"""BLEU and chrF of translations by sacreBLEU, 0 to 100 over a whole test set. Functions of lm-eval task files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Pair = tuple[str, str]  # reference, translation


def to_chinese(document: dict[str, Any], results: list[str]) -> dict[str, Pair]:
    """The Chinese reference and the answer, for both metrics."""
    return _both(document["zho_Hans"], results[0])


def to_english(document: dict[str, Any], results: list[str]) -> dict[str, Pair]:
    """The English reference and the answer, for both metrics."""
    return _both(document["eng_Latn"], results[0])


def _both(reference: str, answer: str) -> dict[str, Pair]:
    # line breaks of an answer become blanks, as in the study
    pair = (reference, " ".join(answer.split()))
    return {"bleu": pair, "chrf": pair}


def bleu(pairs: Sequence[Pair]) -> float:
    """Corpus BLEU of English, tokenized as 13a."""
    return _corpus("corpus_bleu", pairs, tokenize="13a")


def bleu_chinese(pairs: Sequence[Pair]) -> float:
    """Corpus BLEU over Chinese characters; 13a would take a sentence for one word."""
    return _corpus("corpus_bleu", pairs, tokenize="zh")


def chrf(pairs: Sequence[Pair]) -> float:
    """Corpus chrF2, which needs no tokenizer."""
    return _corpus("corpus_chrf", pairs)


def _corpus(metric: str, pairs: Sequence[Pair], **options: Any) -> float:
    import sacrebleu

    references, answers = zip(*pairs, strict=True)
    return float(getattr(sacrebleu, metric)(list(answers), [list(references)], **options).score)
