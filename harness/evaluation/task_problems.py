"""What is wrong with the items and answers of a benchmark, and what follows for its numbers. No evaluator by itself.

lm-eval takes the largest of NaN log-likelihoods to be the first choice, raises where a perplexity is too large for a float, counts
an item whose right answer is "7 of 4 choices" as wrong, and leaves items without a score out of its means. Here

    unanswered    an item whose log-likelihoods are not numbers, or all minus infinity, or whose text was written from logits that
                  are not numbers, has no answer; each metric of its task is NaN then, because any number would be of other items
    infinite      a metric whose exponential overflows is infinite, and the task's other metrics are kept
    out of range  counts as wrong, as in lm-eval, and is reported
    unscored      items that a metric leaves out are counted and reported, and so are the warnings that lm-eval gives
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.core.errors import EvaluationError
from harness.core.text import first_line, short_list

# this object, told by identity: the value of every metric of an item without an answer
UNANSWERED = float("nan")
REPORTED = (  # warnings of lm-eval that are reported here in other words, or that are about its own defaults
    re.compile(
        r"Label index was not in within range|Metrics were not scored on the same number|Combined length of context"
        r"|Left truncation applied|Custom kwargs can be passed|is defined, but|No aggregation function defined"
        r"|num_fewshot > 0 but fewshot_split is None|using test_docs as fewshot_docs|Overwriting default"
        r"|pretrained. model kwarg|Passed an already-initialized model|Both target_delimiter"
    )
)
ITEM_SHOWN = 300  # characters of an item in an error
NAMED = 3  # items that a sentence names


@dataclass(frozen=True)
class Outcome:
    """unanswered: (task, doc_id) of the items without an answer; problems: as in `protocols.Score`."""

    unanswered: frozenset[tuple[str, int]]
    problems: dict[str, Any] = field(default_factory=dict)

    def settled(self, task: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """lm-eval's result of a task, its metrics NaN and without standard errors where an item has no answer."""
        if not any(name == task for name, _ in self.unanswered):
            return dict(result)
        return {
            key: math.nan if "," in key else value
            for key, value in result.items()
            if not key.split(",")[0].endswith("_stderr")
        }


class _Aggregation:
    """A metric's aggregation: NaN where an item has no answer, infinite where an exponential overflows."""

    def __init__(self, function: Callable[[Sequence[Any]], Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", "aggregation")

    def __call__(self, values: Sequence[Any]) -> Any:
        if any(value is UNANSWERED for value in values):
            return math.nan
        try:
            return self.function(values)
        except OverflowError:
            return math.inf


def guard(task: Any) -> None:
    """Make a task of lm-eval give NaN for items without an answer, and infinity where an exponential overflows."""
    own = task.process_results

    def process_results(document: Any, results: Sequence[Any]) -> dict[str, Any]:
        if task.OUTPUT_TYPE != "generate_until" and not is_answered(results):
            return dict.fromkeys(task.aggregation(), UNANSWERED)
        try:
            return dict(own(document, results))
        except Exception as error:
            # of the task's function, or of lm-eval over data that it does not expect
            item = json.dumps(document, ensure_ascii=False, default=str)
            raise EvaluationError(
                f"{task.config.task}: an item cannot be scored ({type(error).__name__}: {first_line(error)}); "
                f"correct the item or leave it out: {item[:ITEM_SHOWN]}{'…' if len(item) > ITEM_SHOWN else ''}"
            ) from error

    task.process_results = process_results
    aggregations = task.aggregation()
    for name, function in list(aggregations.items()):
        aggregations[name] = _Aggregation(function)


def unguarded(aggregation: Any) -> Any:
    """lm-eval's own function of an aggregation."""
    return aggregation.function if isinstance(aggregation, _Aggregation) else aggregation


def is_answered(results: Iterable[Any]) -> bool:
    """Whether log-likelihoods (with or without "is greedy") tell an answer: all are numbers, and of several one is above -inf."""
    values = [float(each[0] if isinstance(each, list | tuple) else each) for each in results]
    if any(math.isnan(value) or value == math.inf for value in values):
        return False
    return len(values) < 2 or max(values) > -math.inf


def examine(
    tasks: Mapping[str, Any],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    lost_prompts: set[str],
    warnings: Iterable[str],
) -> Outcome:
    """Which items have no answer, and what to report of a score. lost_prompts: those after which logits were not numbers."""
    unanswered: set[tuple[str, int]] = set()
    sentences: list[str] = []
    unscored = 0
    for name, task in tasks.items():
        own = {sample["doc_id"]: sample for sample in samples[name]}
        lost = {item for item, sample in own.items() if not _has_answer(task, sample, lost_prompts)}
        unanswered |= {(name, item) for item in lost}
        if lost:
            sentences.append(
                f"{name}: {_items(len(lost), len(own))} no answer, because the model's logits are not numbers "
                f"({_named(lost)}); its metrics have no value"
            )
        impossible = _out_of_range(task, own)
        if impossible:
            which = "; ".join(
                f"item {item}: {said}" for item, said in list(impossible.items())[:NAMED]
            )
            sentences.append(
                f"{name}: {_items(len(impossible), len(own))} an answer out of range, which counts as wrong "
                f"({which}); correct the data"
            )
        left_out = _left_out(samples[name], own, lost)
        for metric, items in left_out.items():
            sentences.append(
                f"{name}: {_items(len(items), len(own))} no {metric} and {'is' if len(items) == 1 else 'are'} left out of its "
                f"mean ({_named(items)}); see the task's process_results"
            )
        unscored += len(lost.union(*left_out.values()))
    sentences += [
        f"lm-eval: {text}" for text in dict.fromkeys(warnings) if not REPORTED.search(text)
    ]
    problems = {"unscored": unscored, "sentences": sentences} if sentences else {}
    return Outcome(frozenset(unanswered), problems)


def _has_answer(task: Any, sample: Mapping[str, Any], lost_prompts: set[str]) -> bool:
    if task.OUTPUT_TYPE == "generate_until":
        return sample["arguments"][0][0] not in lost_prompts
    return is_answered(response[0] for response in sample["resps"])


def _out_of_range(task: Any, own: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Item -> its impossible answer in words, for multiple choice by lm-eval's own rule."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return {}
    found = {}
    for item, sample in own.items():
        choices = task.doc_to_choice(sample["doc"])
        target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        targets = target if isinstance(target, list | tuple) else [target]
        wrong = [each for each in targets if not _is_choice(each, choices)]
        if wrong or not targets:
            answer = ", ".join(
                str(each) if isinstance(each, int | float) else repr(each) for each in wrong
            )
            found[item] = f"answer {answer or 'missing'} of {len(choices)} choices"
    return found


def _is_choice(target: Any, choices: Sequence[Any]) -> bool:
    if isinstance(target, str):
        return target in choices
    return isinstance(target, int | float) and target in range(len(choices))


def _left_out(
    samples: Sequence[Mapping[str, Any]], own: Mapping[int, Any], lost: set[int]
) -> dict[str, set[int]]:
    """Metric -> items that have no value of it, or NaN, though others have one."""
    having: dict[str, set[int]] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f"/{sample['filter']}"
        for metric in sample["metrics"]:
            value = sample[metric]
            items = having.setdefault(metric + suffix, set())
            if not (isinstance(value, float) and math.isnan(value)):
                items.add(sample["doc_id"])
    found = {metric: set(own) - items - lost for metric, items in having.items()}
    return {metric: items for metric, items in found.items() if items}


def _items(count: int, total: int) -> str:
    return f"{count} of {total} items {'has' if count == 1 else 'have'}"


def _named(items: Iterable[int]) -> str:
    listed = sorted(items)
    numbers = short_list([str(item) for item in listed], NAMED)
    return f"item{'' if len(listed) == 1 else 's'} {numbers}"
