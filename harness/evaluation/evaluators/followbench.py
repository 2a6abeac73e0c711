"""FollowBench (Jiang et al. 2024, arXiv 2310.20410): does a model keep to instructions with 1 to 5 added constraints?

Every series starts from an instruction (level 0); each level adds one constraint to the one before. For an answer at level n, which
of the n constraints are met is decided by rule where the item has a reference answer, and by a judge otherwise: a language model
behind an OpenAI-compatible endpoint, which is shown the series and says YES or NO for each step.

    hsr   hard satisfaction rate: share of answers that meet all their constraints, mean over levels
    ssr   soft satisfaction rate: mean share of constraints met, mean over levels
    csl   consistent satisfaction levels: how many levels from 1 on are met without a gap, mean over series
    rules share of the items with a reference answer that meet it: needs no judge

Without a judge only `rules` is there and the details count what was not run; a mean over part of the constraint types would be
taken for the benchmark. By rule: a reference occurs in the answer as whole words, whatever its case and punctuation; one that is a
template ("{answer}" inside) is the form of the whole answer. Where we differ from the authors' code: these two rules serve all
sources, and the judge's prompt is worded anew. Judges differ: name yours with a score.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.core.cell import Evaluation, Model
from harness.core.errors import DataError, EvaluationError, HarnessError
from harness.core.events import Progress
from harness.data import task_files
from harness.evaluation.generation import Completion, complete
from harness.evaluation.protocols import Score, Subject, no_answers

TASK = "followbench"
LEVELS = range(1, 6)
RATES = ("hsr", "ssr", "csl")
FIELDS = ("group", "example_id", "level", "instruction")
ATTEMPTS = 3  # per question to the judge; an endpoint under load answers 429 or 503
REQUEST_SECONDS = 120
Row = Mapping[str, Any]


class Evaluator:
    """Answers to every instruction, checked by rule or by the judge."""

    version = 1
    generates = True
    metrics: ClassVar[dict[str, dict[str, Any]]] = {
        "hsr": {"higher_is_better": True, "unit": "share of answers"},
        "ssr": {"higher_is_better": True, "unit": "share of constraints"},
        "csl": {"higher_is_better": True, "unit": "levels, 0 to 5"},
        "rules": {"higher_is_better": True, "unit": "share of answers with a reference"},
    }

    @dataclass(frozen=True)
    class Settings:
        """
        task             names the file that says where the items lie; data_root: folder with tasks/followbench/test.jsonl
        judge_url        base address of an OpenAI-compatible endpoint, "http://host:8000/v1"; empty: no judge
        judge_model      the judge's name there
        judge_key_name   environment variable that holds the endpoint's key; the key itself never stands in a config
        new_tokens       at most, per answer
        chat             put the instruction into the tokenizer's chat template
        """

        task: str = "followbench"
        data_root: str | None = None
        judge_url: str = ""
        judge_model: str = ""
        judge_key_name: str = "OPENAI_API_KEY"
        new_tokens: int = 512
        chat: bool = False

        def __post_init__(self) -> None:
            if self.task != TASK:
                raise ValueError(f"task={self.task}: the task of this evaluator is {TASK}")
            if bool(self.judge_url) != bool(self.judge_model):
                raise ValueError("judge_url and judge_model belong together: give both or neither")
            if self.judge_url and not self.judge_url.startswith(("http://", "https://")):
                raise ValueError(
                    f"judge_url={self.judge_url}: an address http://… or https://… is expected"
                )
            if self.new_tokens < 1:
                raise ValueError(f"new_tokens={self.new_tokens}: at least 1")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, evaluation: Evaluation, model: Model) -> list[str]:
        try:
            self._rows()
        except HarnessError as error:
            return [str(error)]
        return []

    def score(self, subject: Subject, evaluation: Evaluation) -> Iterator[Progress | Score]:
        rows = self._rows()
        series = _series(rows)
        asked = [row for row in rows if int(row["level"]) in LEVELS]
        asked = asked[: evaluation.limit] if evaluation.limit is not None else asked
        judged = [row for row in asked if self.settings.judge_url or row.get("target")]
        if not judged:
            raise EvaluationError(
                "followbench: no judge is configured and none of the items has a reference answer"
            )
        yield subject.progress(evaluation, 0, len(judged))
        answers: list[Completion] = []
        met: list[list[bool] | None] = []
        for row in judged:
            answer = complete(
                subject, str(row["instruction"]), self.settings.new_tokens, self.settings.chat
            )
            answers.append(answer)
            met.append(
                None
                if answer.text is None
                else self._verdicts(row, series[_series_of(row)], answer.text)
            )
            yield subject.progress(evaluation, len(answers), len(judged))
        yield self._score(evaluation, judged, answers, met, len(asked) - len(judged))

    def _score(
        self,
        evaluation: Evaluation,
        rows: Sequence[Row],
        answers: list[Completion],
        met: list[list[bool] | None],
        not_run: int,
    ) -> Score:
        """met: None for an item without an answer, which leaves every metric without a value."""
        lost = met.count(None)
        known = [own or [] for own in met]
        by_rule = [all(own) for row, own in zip(rows, known, strict=True) if row.get("target")]
        metrics = {"rules": sum(by_rule) / len(by_rule)} if by_rule else {}
        if self.settings.judge_url:
            metrics |= dict.fromkeys(RATES, math.nan) if lost else rates(rows, known)
        if lost:
            metrics = dict.fromkeys(metrics, math.nan)
        items: dict[str, list[Any]] = {
            "id": [f"{row['group']}/{row['example_id']}/{row['level']}" for row in rows],
            "hsr": [math.nan if own is None else float(all(own)) for own in met],
            "ssr": [math.nan if own is None else sum(own) / len(own) for own in met],
            "by_rule": [bool(row.get("target")) for row in rows],
            "response": [answer.text for answer in answers],
        }
        details: dict[str, Any] = {
            "judge": self.settings.judge_model or "none",
            "not_run": not_run,
            "rule_checked": len(by_rule),
            "new_tokens": self.settings.new_tokens,
            "truncated_prompts": sum(answer.truncated for answer in answers),
            "chat": self.settings.chat,
        }
        if evaluation.limit is not None:
            details["smoke"] = True
        return Score(
            {f"{evaluation.name}/{name}": value for name, value in metrics.items()},
            {},
            items,
            details,
            no_answers(TASK, lost, len(rows)),
        )

    def _rows(self) -> list[dict[str, Any]]:
        (task,) = task_files.members(TASK)
        local = task_files.local_data(task, self.settings.data_root)
        if local is None or "test" not in local.splits:
            raise EvaluationError(
                f"{TASK} has no public data set; give data.root=DIR with DIR/tasks/{TASK}/test.jsonl"
            )
        rows = local.rows("test", FIELDS)
        wrong = [str(row["level"]) for row in rows if not isinstance(row["level"], int)]
        if wrong:
            raise DataError(
                f"{local.splits['test']}: levels are whole numbers from 0 to 5, not {', '.join(dict.fromkeys(wrong))}"
            )
        return rows

    def _verdicts(self, row: Row, series: Mapping[int, str], answer: str) -> list[bool]:
        """Which constraints an answer meets, one for each level up to its own."""
        level = int(row["level"])
        if row.get("target"):
            return [meets(str(row["target"]), answer)] * level
        absent = [step for step in range(level + 1) if step not in series]
        if absent:
            raise EvaluationError(
                f"followbench {row['group']}/{row['example_id']}: the data lack its level {absent[0]}"
            )
        question = judge_question([series[step] for step in range(level + 1)], answer)
        return read_verdicts(
            self._ask(question), level, f"{row['group']}/{row['example_id']}/{level}"
        )

    def _ask(self, question: str) -> str:
        settings = self.settings
        body = {
            "model": settings.judge_model,
            "temperature": 0,
            "messages": [{"role": "user", "content": question}],
        }
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(settings.judge_key_name)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        address = f"{settings.judge_url.rstrip('/')}/chat/completions"
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                request = urllib.request.Request(address, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code not in (408, 429, 500, 502, 503, 504):
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
            time.sleep(attempt)
        raise EvaluationError(
            f"the judge at {address} did not answer ({reason}); the evaluation can be run again"
        )


def rates(rows: Sequence[Row], met: Sequence[Sequence[bool]]) -> dict[str, float]:
    """hsr, ssr and csl from the constraints that every answer meets."""
    hard: dict[int, list[float]] = {}
    soft: dict[int, list[float]] = {}
    passed: dict[tuple[str, str], set[int]] = {}
    for row, own in zip(rows, met, strict=True):
        level = int(row["level"])
        hard.setdefault(level, []).append(float(all(own)))
        soft.setdefault(level, []).append(sum(own) / len(own))
        levels = passed.setdefault(_series_of(row), set())
        if all(own):
            levels.add(level)
    consistent = [
        next(level for level in (*LEVELS, LEVELS.stop) if level not in levels) - 1
        for levels in passed.values()
    ]
    return {
        "hsr": sum(sum(own) / len(own) for own in hard.values()) / len(hard),
        "ssr": sum(sum(own) / len(own) for own in soft.values()) / len(soft),
        "csl": sum(consistent) / len(consistent),
    }


def meets(reference: str, answer: str) -> bool:
    """Whether an answer holds the reference's words next to each other, or has the form of a template."""
    if "{answer}" not in reference:
        return f" {_words(reference)} " in f" {_words(answer)} "
    form = reference.rpartition("{instruction}")[2].strip()
    parts = [part.replace("{{", "{").replace("}}", "}") for part in form.split("{answer}")]
    return re.fullmatch(".+?".join(map(re.escape, parts)), answer.strip(), re.DOTALL) is not None


def judge_question(series: Sequence[str], answer: str) -> str:
    """What the judge is asked about an answer to the last instruction of a series."""
    steps = "\n\n".join(f"[Instruction {level}]\n{text}" for level, text in enumerate(series))
    count = len(series) - 1
    return (
        f"Below is a series of {len(series)} instructions. Instruction 0 is the starting point, and each later one adds exactly "
        f"one requirement to the one before it.\n\n{steps}\n\n[Response to instruction {count}]\n{answer}\n\n"
        f"For each of the {count} added requirements, in order, decide whether the response meets it. Reply with {count} "
        f'{"line" if count == 1 else "lines"}, each "<number>: YES" or "<number>: NO", and nothing else.'
    )


def read_verdicts(reply: str, count: int, item: str) -> list[bool]:
    """The judge's YES and NO. Raises EvaluationError where they are not as many as there are constraints."""
    found = [match.upper() == "YES" for match in re.findall(r"\b(YES|NO)\b", reply, re.IGNORECASE)]
    if len(found) != count:
        said = f"{len(found)} verdicts for {count} constraints: {reply[:200]!r}"
        raise EvaluationError(f"followbench item {item}: the judge gave {said}")
    return found


def _series(rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, str]]:
    """Series -> level -> instruction."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        found.setdefault(_series_of(row), {})[int(row["level"])] = str(row["instruction"])
    return found


def _series_of(row: Row) -> tuple[str, str]:
    return str(row["group"]), str(row["example_id"])


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
