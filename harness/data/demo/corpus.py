"""The demo's world: seeded text that a tiny model can learn, and four kinds of questions about it.

    facts   128 invented people × city, job, pet, colour, food, in three phrasings and in three-fact profiles
    add     sums of two numbers below 50; a sixth of the pairs never occurs in the text, and the questions ask those
    count   sequences in steps of 1, 2, 3, 5 or 10; an eighth of the (start, step) pairs is held out for the questions
    copy    three words said twice; a sixteenth of the triples is held out for the questions

Facts are knowledge, so their questions ask what the text says; the other three are skills, so theirs ask what it does not.
Everything is a function of the constants below. Only `random.Random(int).random()` is drawn from, whose values Python guarantees
across versions; `corpus_digest` pins the result. Standard library alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from harness.core.errors import DataError, unknown_name

SEED = 2210_17323
SENTENCES_PER_DOCUMENT = 40
# by split; each split is its own draw from one world
DOCUMENTS = {"train": 5000, "calibration": 256, "test": 128}
KINDS = ("facts", "add", "count", "copy")

ONSETS = (
    "Bren",
    "Dor",
    "Fal",
    "Gim",
    "Hest",
    "Jul",
    "Kav",
    "Lorm",
    "Mir",
    "Nost",
    "Pell",
    "Quar",
    "Rud",
    "Sil",
    "Tov",
    "Wex",
)
CODAS = ("dil", "ga", "ho", "mek", "nu", "ri", "sta", "vo")
NAMES = tuple(onset + coda for onset in ONSETS for coda in CODAS)
VALUES = {
    "city": (
        "Arbolt",
        "Cindle",
        "Drumna",
        "Eskor",
        "Fennick",
        "Garrowby",
        "Hollin",
        "Ivrin",
        "Jasp",
        "Kelder",
        "Lunfor",
        "Morrow",
        "Nettle",
        "Orvane",
        "Quillet",
        "Velm",
    ),
    "job": (
        "baker",
        "carter",
        "dyer",
        "farmer",
        "gardener",
        "hunter",
        "judge",
        "mason",
        "nurse",
        "painter",
        "roofer",
        "sailor",
        "tailor",
        "usher",
        "weaver",
        "writer",
    ),
    "pet": (
        "badger",
        "cat",
        "crow",
        "dog",
        "ferret",
        "goat",
        "hen",
        "lizard",
        "mouse",
        "newt",
        "owl",
        "pony",
        "rabbit",
        "snail",
        "toad",
        "wolf",
    ),
    "colour": (
        "amber",
        "black",
        "blue",
        "brown",
        "gold",
        "green",
        "grey",
        "indigo",
        "orange",
        "pink",
        "purple",
        "red",
        "silver",
        "teal",
        "white",
        "yellow",
    ),
    "food": (
        "apples",
        "beans",
        "bread",
        "cheese",
        "eggs",
        "figs",
        "honey",
        "leeks",
        "noodles",
        "olives",
        "peas",
        "plums",
        "rice",
        "soup",
        "tarts",
        "walnuts",
    ),
}
PHRASINGS = {  # each ends where the value begins
    "city": ("{name} lives in", "The home of {name} is", "Visit {name} in"),
    "job": ("{name} works as a", "The job of {name} is", "Hire {name} as a"),
    "pet": ("{name} keeps a", "The pet of {name} is a", "Give {name} a"),
    "colour": ("{name} wears", "The colour of {name} is", "Paint {name} in"),
    "food": ("{name} eats", "The food of {name} is", "Feed {name} with"),
}
WORDS = (
    "arch",
    "bell",
    "coin",
    "door",
    "east",
    "fire",
    "gate",
    "hill",
    "iron",
    "jar",
    "kite",
    "lamp",
    "moon",
    "nail",
    "oar",
    "pipe",
    "quilt",
    "rope",
    "salt",
    "tent",
    "urn",
    "vine",
    "wall",
    "yarn",
    "bow",
    "cup",
    "desk",
    "ear",
    "fan",
    "glue",
    "hat",
    "ink",
)
STEPS = (1, 2, 3, 5, 10)
ADDENDS, HELD_OUT_SUMS = 50, 400  # numbers below 50; ordered pairs, (a, b) with (b, a)
# first terms below 100; (start, step) pairs; terms per sequence
STARTS, HELD_OUT_COUNTS, COUNT_TERMS = (100, 63, 9)
COPY_MODULUS = 16  # a triple whose indices sum to a multiple is held out

Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """prompt, then a space, then one of four choices; answer is the index of the right one."""

    kind: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


class Draw:
    """Seeded choices from `random()` alone: the other methods of random.Random may change between Python versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return int(self._random.random() * bound)

    def one(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """count distinct positions of items, in random order."""
        pool = list(items)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


@functools.cache
def world() -> dict[tuple[str, str], str]:
    """(name, attribute) -> value: 640 facts."""
    draw = Draw(SEED)
    return {
        (name, attribute): draw.one(values)
        for name in NAMES
        for attribute, values in VALUES.items()
    }


@functools.cache
def held_out_sums() -> tuple[tuple[int, int], ...]:
    """Ordered pairs of addends that the text never adds; (b, a) is included with (a, b)."""
    pairs = [(a, b) for a in range(ADDENDS) for b in range(a, ADDENDS)]
    chosen: list[tuple[int, int]] = []
    for a, b in Draw(SEED + 1).some(pairs, len(pairs)):
        if len(chosen) >= HELD_OUT_SUMS:
            break
        chosen += [(a, b), (b, a)] if a != b else [(a, b)]
    return tuple(chosen)


@functools.cache
def held_out_counts() -> tuple[tuple[int, int], ...]:
    """(start, step) pairs of counting sequences that the text never shows."""
    pairs = [(start, step) for start in range(STARTS) for step in STEPS]
    return tuple(Draw(SEED + 2).some(pairs, HELD_OUT_COUNTS))


def is_held_out_copy(words: Sequence[str]) -> bool:
    """Whether the text never says these three words in this order."""
    return sum(WORDS.index(word) for word in words) % COPY_MODULUS == 0


@functools.cache
def _documents(split: str) -> tuple[str, ...]:
    if split not in DOCUMENTS:
        raise DataError(unknown_name("split", split, DOCUMENTS, where="demo corpus"))
    draw = Draw(SEED + 10 + list(DOCUMENTS).index(split))
    return tuple(
        " ".join(_sentence(draw) for _ in range(SENTENCES_PER_DOCUMENT))
        for _ in range(DOCUMENTS[split])
    )


def documents(split: str) -> list[str]:
    """The documents of "train", "calibration" or "test", 40 sentences each. Raises DataError on another split."""
    return list(_documents(split))


@functools.cache
def corpus_digest(split: str) -> str:
    """SHA-256 of a split's documents, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(_documents(split), ensure_ascii=True).encode()).hexdigest()


_MIX = ("fact",) * 6 + ("profile",) * 3 + ("add",) * 6 + ("count",) + ("copy",) * 2


def _sentence(draw: Draw) -> str:
    kind = draw.one(_MIX)
    if kind == "fact":
        name, attribute = draw.one(NAMES), draw.one(tuple(VALUES))
        return f"{draw.one(PHRASINGS[attribute]).format(name=name)} {world()[name, attribute]}."
    if kind == "profile":
        name = draw.one(NAMES)
        chosen = draw.some(tuple(VALUES), 3)
        first, second, third = (
            f"{PHRASINGS[each][0].format(name='').strip()} {world()[name, each]}" for each in chosen
        )
        return f"{name} {first}, {second} and {third}."
    if kind == "add":
        while True:
            a, b = draw.below(ADDENDS), draw.below(ADDENDS)
            if (a, b) not in _HELD_OUT_SUMS:
                return f"{a} + {b} = {a + b}."
    if kind == "count":
        while True:
            start, step = draw.below(STARTS), draw.one(STEPS)
            if (start, step) not in held_out_counts():
                return f"{_counting(start, step, COUNT_TERMS)}."
    while True:
        words = draw.some(WORDS, 3)
        if not is_held_out_copy(words):
            return f"Say: {' '.join(words)}; again: {' '.join(words)}."


_HELD_OUT_SUMS = frozenset(held_out_sums())


def _counting(start: int, step: int, terms: int) -> str:
    return f"Count by {step}: " + " ".join(str(start + i * step) for i in range(terms))


def questions(kind: str, count: int = 400) -> list[Question]:
    """The first `count` of the 400 questions of a kind: distinct prompts, four choices, one right.

    Numbers among the choices have as many digits as the answer, so that no choice is the beginning of another.
    Raises DataError on an unknown kind.
    """
    if kind not in KINDS:
        raise DataError(unknown_name("kind of question", kind, KINDS, where="demo corpus"))
    return list(_questions(kind)[:count])


@functools.cache
def _questions(kind: str) -> tuple[Question, ...]:
    draw = Draw(SEED + 20 + KINDS.index(kind))
    made = {"facts": _ask_facts, "add": _ask_sums, "count": _ask_counts, "copy": _ask_copies}[kind](
        draw
    )
    return tuple(shuffled(draw, kind, prompt, right, wrong) for prompt, right, wrong in made)


def shuffled(draw: Draw, kind: str, prompt: str, right: str, wrong: Sequence[str]) -> Question:
    """A question whose right answer and three wrong ones stand in a drawn order."""
    choices = draw.some((right, *wrong), 4)
    return Question(kind, prompt, tuple(choices), choices.index(right))


Asked = list[tuple[str, str, list[str]]]  # (prompt, right answer, three wrong ones)


def _ask_facts(draw: Draw) -> Asked:
    asked: Asked = []
    for name, attribute in draw.some(tuple(world()), 400):
        right = world()[name, attribute]
        wrong = draw.some([value for value in VALUES[attribute] if value != right], 3)
        asked.append((draw.one(PHRASINGS[attribute]).format(name=name), right, wrong))
    return asked


def _ask_sums(draw: Draw) -> Asked:
    return [
        (f"{a} + {b} =", str(a + b), near(draw, a + b)) for a, b in draw.some(held_out_sums(), 400)
    ]


def _ask_counts(draw: Draw) -> Asked:
    cases = [
        (start, step, shown) for start, step in held_out_counts() for shown in range(2, COUNT_TERMS)
    ]
    return [
        (_counting(start, step, shown), str(start + shown * step), near(draw, start + shown * step))
        for start, step, shown in draw.some(cases, 400)
    ]


def _ask_copies(draw: Draw) -> Asked:
    asked: dict[str, tuple[str, str, list[str]]] = {}
    while len(asked) < 400:
        words = draw.some(WORDS, 3)
        said = draw.below(3)
        if not is_held_out_copy(words):
            continue
        prompt = " ".join(("Say:", " ".join(words) + ";", "again:", *words[:said]))
        other = draw.one([word for word in words if word != words[said]])
        asked.setdefault(
            prompt,
            (
                prompt,
                words[said],
                [other, *draw.some([word for word in WORDS if word not in words], 2)],
            ),
        )
    return list(asked.values())


def near(draw: Draw, right: int) -> list[str]:
    """Three other numbers, at most 10 away, of as many digits."""
    close = [right + offset for offset in (-10, -5, -3, -2, -1, 1, 2, 3, 5, 10)]
    return draw.some([str(n) for n in close if n >= 0 and len(str(n)) == len(str(right))], 3)
