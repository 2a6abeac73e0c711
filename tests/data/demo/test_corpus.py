"""The demo's world: deterministic, its right answers right, what is held out never said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from harness.core.errors import DataError
from harness.data.demo import corpus

DIGESTS = {  # a change here is another corpus: train the model again
    "train": "d1333371b71b212a955d8c15df75149a92e6298cdb5dcd213e4c7909fbe4d309",
    "calibration": "967b0099f972900261e646569e28ae332801a27abbc782a18a79e0027881d04c",
    "test": "7c6ad2d11e50071700dd780cf7455adc6f68e3301f4179839beb38377d28eef8",
}


def everything() -> Iterator[str]:
    for split in corpus.DOCUMENTS:
        yield from corpus.documents(split)


@pytest.mark.parametrize("split", corpus.DOCUMENTS)
def test_the_corpus_is_pinned(split: str) -> None:
    assert corpus.corpus_digest(split) == DIGESTS[split]
    assert len(corpus.documents(split)) == corpus.DOCUMENTS[split]


def test_another_process_with_another_hash_seed_makes_the_same_text() -> None:
    code = "from harness.data.demo import corpus; print(corpus.corpus_digest('test'))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == DIGESTS["test"]


def test_splits_share_the_world_and_no_document() -> None:
    train, calibration, test = (set(corpus.documents(split)) for split in corpus.DOCUMENTS)
    assert not train & calibration and not train & test and not calibration & test


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_four_hundred_distinct_questions_with_four_distinct_choices(kind: str) -> None:
    asked = corpus.questions(kind)
    assert len({q.prompt for q in asked}) == len(asked) == 400
    assert all(len(set(q.choices)) == 4 and 0 <= q.answer < 4 for q in asked)
    assert corpus.questions(kind, 10) == asked[:10]
    counts = [sum(q.answer == i for q in asked) for i in range(4)]
    assert min(counts) > 70, f"right answers by position: {counts}"


def test_no_choice_is_the_beginning_of_another() -> None:
    """Else the shorter one could never be less probable."""
    for kind in corpus.KINDS:
        for q in corpus.questions(kind):
            assert not any(a != b and a.startswith(b) for a in q.choices for b in q.choices), q


def test_sums_are_right_and_never_said() -> None:
    said = {pair for document in everything() for pair in re.findall(r"(\d+) \+ (\d+) =", document)}
    assert len(said) == 2500 - len(corpus.held_out_sums())
    for q in corpus.questions("add"):
        a, b = re.fullmatch(r"(\d+) \+ (\d+) =", q.prompt).groups()  # type: ignore[union-attr]
        assert int(q.choices[q.answer]) == int(a) + int(b)
        assert (a, b) not in said and (b, a) not in said


def test_counts_are_right_and_never_said() -> None:
    said = {
        pair
        for document in everything()
        for pair in re.findall(r"Count by (\d+): (\d+) ", document)
    }
    for q in corpus.questions("count"):
        step, shown = q.prompt.removeprefix("Count by ").split(":")
        terms = [int(term) for term in shown.split()]
        assert int(q.choices[q.answer]) == terms[-1] + int(step)
        assert (step, str(terms[0])) not in said


def test_copies_are_right_and_never_said() -> None:
    said = {
        words for document in everything() for words in re.findall(r"Say: (\w+ \w+ \w+);", document)
    }
    for q in corpus.questions("copy"):
        heard, again = q.prompt.removeprefix("Say: ").split("; again:")
        assert q.choices[q.answer] == heard.split()[len(again.split())]
        assert heard not in said


def test_facts_are_said_and_no_other_value_is() -> None:
    text = "\n".join(corpus.documents("train"))
    for q in corpus.questions("facts", 100):
        for i, choice in enumerate(q.choices):
            assert (f"{q.prompt} {choice}" in text) == (i == q.answer), q


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match='did you mean "calibration"'):
        corpus.documents("calibrate")
    with pytest.raises(DataError, match='did you mean "facts"'):
        corpus.questions("fact")
