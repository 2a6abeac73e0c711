"""The demo's questions as data sets of lm-eval: the functions that the YAML files in tasks/ name as `custom_dataset`.

lm-eval calls them with the task's metadata and expects a mapping from split to data set; nothing is downloaded or written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from datasets import Dataset

from harness.data.demo import corpus, skills


def facts(**metadata: Any) -> dict[str, Dataset]:
    """The questions of demo_facts, as the split "test"."""
    return _test_split("facts")


def add(**metadata: Any) -> dict[str, Dataset]:
    """The questions of demo_add, as the split "test"."""
    return _test_split("add")


def count(**metadata: Any) -> dict[str, Dataset]:
    """The questions of demo_count, as the split "test"."""
    return _test_split("count")


def copy(**metadata: Any) -> dict[str, Dataset]:
    """The questions of demo_copy, as the split "test"."""
    return _test_split("copy")


def moved(**metadata: Any) -> dict[str, Dataset]:
    """The questions of demo_moved, as the split "test"."""
    return _test_split("moved")


def subtract(**metadata: Any) -> dict[str, Dataset]:
    """The questions of demo_subtract, as the split "test"."""
    return _test_split("subtract")


def reverse(**metadata: Any) -> dict[str, Dataset]:
    """The questions of demo_reverse, as the split "test"."""
    return _test_split("reverse")


def _test_split(kind: str) -> dict[str, Dataset]:
    """Columns kind, prompt, choices, answer; 400 rows in a fixed order."""
    own = kind in skills.SKILLS
    questions = skills.skill_questions(kind) if own else corpus.questions(kind)
    return {"test": Dataset.from_list([dataclasses.asdict(question) for question in questions])}
