"""What the demo's fine-tunes learn: three skills that the demo model lacks, each with its text and 400 questions.

    moved      the 128 people have moved and changed jobs: 256 other facts, in the phrasings of `corpus`
    subtract   differences of two numbers below 50; 400 pairs never occur in the text, and the questions ask those
    reverse    three words said backwards; a sixteenth of the triples is held out for the questions

Half of the sentences of a fine-tune's text are those of the demo's own world, so that it keeps its other skills. Questions have
four choices, as in `corpus`; of a moved person's, the old answer is one. Drawn from `corpus.Draw` alone. Standard library alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable

from harness.core.errors import DataError, unknown_name
from harness.data.demo.corpus import (
    ADDENDS,
    NAMES,
    PHRASINGS,
    SENTENCES_PER_DOCUMENT,
    VALUES,
    WORDS,
    Draw,
    Question,
    documents,
    is_held_out_copy,
    near,
    shuffled,
    world,
)

SEED = 2402_10193
SKILLS = ("moved", "subtract", "reverse")
DOCUMENTS = 400  # of a fine-tune's text
MOVED = ("city", "job")  # attributes that differ in the second world
HELD_OUT = 400  # differences that the text never shows


@functools.cache
def second_world() -> dict[tuple[str, str], str]:
    """(name, attribute) -> the new value: 256 facts, each other than in the first world."""
    draw = Draw(SEED)
    return {
        (name, attribute): draw.one([v for v in VALUES[attribute] if v != world()[name, attribute]])
        for name in NAMES
        for attribute in MOVED
    }


@functools.cache
def held_out_differences() -> frozenset[tuple[int, int]]:
    """(a, b) with b <= a that the text never subtracts."""
    pairs = [(a, b) for a in range(ADDENDS) for b in range(a + 1)]
    return frozenset(Draw(SEED + 1).some(pairs, HELD_OUT))


def text(skill: str) -> list[str]:
    """The documents that a fine-tune learns from. Raises DataError on an unknown skill."""
    _known(skill)
    draw = Draw(SEED + 10 + SKILLS.index(skill))
    own = {"moved": _moved, "subtract": _difference, "reverse": _backwards}[skill]
    old = [s for document in documents("train")[:DOCUMENTS] for s in _sentences(document)]
    if skill == "moved":  # what the first world says of the moved attributes is no longer so
        old = [s for s in old if not _says_old_fact(s)]
    return [
        " ".join(
            own(draw) if draw.below(2) else draw.one(old) for _ in range(SENTENCES_PER_DOCUMENT)
        )
        for _ in range(DOCUMENTS)
    ]


def text_digest(skill: str) -> str:
    """SHA-256 of a skill's documents, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(text(skill), ensure_ascii=True).encode()).hexdigest()


@functools.cache
def skill_questions(skill: str) -> tuple[Question, ...]:
    """The 400 questions of a skill. Raises DataError on an unknown one."""
    _known(skill)
    draw = Draw(SEED + 20 + SKILLS.index(skill))
    ask: Callable[[Draw], list[tuple[str, str, list[str]]]]
    ask = {"moved": _ask_moved, "subtract": _ask_differences, "reverse": _ask_backwards}[skill]
    return tuple(shuffled(draw, skill, prompt, right, wrong) for prompt, right, wrong in ask(draw))


def _known(skill: str) -> None:
    if skill not in SKILLS:
        raise DataError(unknown_name("skill", skill, SKILLS, where="demo fine-tunes"))


def _sentences(document: str) -> list[str]:
    return [f"{sentence}." for sentence in document.rstrip(".").split(". ")]


def _says_old_fact(sentence: str) -> bool:
    """Whether a sentence of the first world speaks of an attribute that has changed."""
    marks = [
        part.strip()
        for each in MOVED
        for p in PHRASINGS[each]
        for part in p.split("{name}")
        if part
    ]
    return any(mark in sentence for mark in marks)


def _moved(draw: Draw) -> str:
    name, attribute = draw.one(NAMES), draw.one(MOVED)
    phrasing = draw.one(PHRASINGS[attribute]).format(name=name)
    return f"{phrasing} {second_world()[name, attribute]}."


def _difference(draw: Draw) -> str:
    while True:
        a, b = draw.below(ADDENDS), draw.below(ADDENDS)
        if b <= a and (a, b) not in held_out_differences():
            return f"{a} - {b} = {a - b}."


def _backwards(draw: Draw) -> str:
    while True:
        words = draw.some(WORDS, 3)
        if not is_held_out_copy(words):
            return f"Say: {' '.join(words)}; backwards: {' '.join(reversed(words))}."


def _ask_moved(draw: Draw) -> list[tuple[str, str, list[str]]]:
    cases = [
        (name, attribute, phrasing)
        for name, attribute in second_world()
        for phrasing in PHRASINGS[attribute]
    ]
    asked = []
    for name, attribute, phrasing in draw.some(cases, 400):
        right, old = second_world()[name, attribute], world()[name, attribute]
        others = [value for value in VALUES[attribute] if value not in (right, old)]
        asked.append((phrasing.format(name=name), right, [old, *draw.some(others, 2)]))
    return asked


def _ask_differences(draw: Draw) -> list[tuple[str, str, list[str]]]:
    return [
        (f"{a} - {b} =", str(a - b), near(draw, a - b))
        for a, b in draw.some(sorted(held_out_differences()), 400)
    ]


def _ask_backwards(draw: Draw) -> list[tuple[str, str, list[str]]]:
    asked: dict[str, tuple[str, str, list[str]]] = {}
    while len(asked) < 400:
        words = draw.some(WORDS, 3)
        said = draw.below(3)
        if not is_held_out_copy(words):
            continue
        back = words[::-1]
        prompt = " ".join(("Say:", " ".join(words) + ";", "backwards:", *back[:said]))
        others = draw.some([word for word in WORDS if word not in words], 1)
        wrong = [*(word for word in words if word != back[said]), *others]
        asked.setdefault(prompt, (prompt, back[said], wrong))
    return list(asked.values())
