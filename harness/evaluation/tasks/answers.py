"""How the answers of two benchmarks are read, by the rules of arXiv 2402.16775. Functions of lm-eval task files."""

from __future__ import annotations

import re
from typing import Any


def keep_labelled(documents: Any) -> Any:
    """Rows of SNLI on which its annotators agreed; the others have the label -1."""
    return documents.filter(lambda row: int(row["label"]) >= 0)


def number_occurs(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """GSM8K: right if the reference number occurs in the answer, delimited by blanks or punctuation (18.5 counts for 18)."""
    reference = document["answer"].rpartition("####")[2].replace(",", "").replace("$", "").strip()
    answer = results[0].replace(",", "").replace("$", "")
    return {
        "exact_match": float(
            re.search(rf"(?<![\w.]){re.escape(reference)}(?!\w)", answer) is not None
        )
    }
