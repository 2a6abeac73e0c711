"""HumanEval (Chen et al. 2021, arXiv 2107.03374): pass@1 of greedy completions of Python functions, by running their unit tests.

This runs code that a language model wrote. It is off unless `run_generated_code` is set, and then every program runs in a process
of its own: a fresh interpreter in isolated mode without the user's environment, in an empty folder that is removed, with limits on
time, memory, file size and the number of processes, its whole process group killed at the end. That keeps accidents small; it is no
sandbox: such a program can read what its user can read and reach the network. Run it as a user, or in a container, that may lose.

A completion ends before the first line that starts a new top-level statement, as in the paper's stop sequences.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness.core.cell import Evaluation, Model
from harness.core.errors import EvaluationError, HarnessError
from harness.core.events import Progress
from harness.data import hub, task_files
from harness.data.task_files import LocalData, TaskFile
from harness.evaluation.generation import complete
from harness.evaluation.protocols import Score, Subject, no_answers
from harness.evaluation.statistics import mean_error

TASK = "humaneval_completion"
FOLDER = "humaneval"
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
FILE_BYTES = 2**20  # the largest file that a program may write
PROCESSES = 64  # of its user, those of other programs included
NO_ANSWER = "no answer"  # the outcome where the model's logits are not numbers
FIELDS = ("task_id", "prompt", "test", "entry_point")
FINISHED = 77  # exit status of a program that came to its end


class Evaluator:
    """Completions of every prompt, run with its tests."""

    version = 2
    generates = True
    metrics: ClassVar[dict[str, dict[str, Any]]] = {
        "pass_at_1": {"higher_is_better": True, "unit": "share of problems"}
    }

    @dataclass(frozen=True)
    class Settings:
        """
        task                names the file that says where the items lie: the hub, or data_root with tasks/humaneval/test.jsonl
        revisions           commit of the hub's data set; a sweep fills in that of conf/data_sets.yaml
        run_generated_code  must be true: see the head of this file
        new_tokens          at most, per completion
        timeout_seconds     of one program; memory_bytes: of its address space
        """

        task: str = "humaneval_completion"
        data_root: str | None = None
        revisions: dict[str, str] | None = None
        run_generated_code: bool = False
        new_tokens: int = 512
        timeout_seconds: float = 10.0
        memory_bytes: int = 2147483648

        def __post_init__(self) -> None:
            if self.task != TASK:
                raise ValueError(f"task={self.task}: the task of this evaluator is {TASK}")
            if self.new_tokens < 1 or self.timeout_seconds <= 0 or self.memory_bytes < 2**26:
                raise ValueError(
                    "new_tokens from 1, timeout_seconds above 0 and memory_bytes from 64 MiB are expected"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, evaluation: Evaluation, model: Model) -> list[str]:
        reasons = []
        if not self.settings.run_generated_code:
            reasons.append(
                "it runs code that the model writes, which is off; where that is acceptable (a container, a user without rights) "
                f"set evaluations.{evaluation.name}.run_generated_code=true"
            )
        task, local = self._task()
        if local is not None and "test" not in local.splits:
            return [*reasons, f"humaneval: no test.jsonl in {local.folder}"]
        if local is not None:
            try:
                local.rows("test", FIELDS)
            except HarnessError as error:
                reasons.append(str(error))
            return reasons
        missing = hub.missing_data_set(
            str(task.data_set), (self.settings.revisions or {}).get(str(task.data_set))
        )
        return (
            [*reasons, f"{missing}; give data.root=DIR with DIR/tasks/{FOLDER}/test.jsonl"]
            if missing
            else reasons
        )

    def score(self, subject: Subject, evaluation: Evaluation) -> Iterator[Progress | Score]:
        if not self.settings.run_generated_code:
            raise EvaluationError(
                "humaneval runs code that the model writes; set run_generated_code=true where that is acceptable"
            )
        rows = self._rows()[: evaluation.limit]
        completions: list[str | None] = []
        outcomes: list[str] = []
        truncated = 0
        yield subject.progress(evaluation, 0, len(rows))
        for row in rows:
            completion = complete(subject, str(row["prompt"]), self.settings.new_tokens, stop=STOP)
            completions.append(completion.text)
            truncated += completion.truncated
            outcomes.append(
                NO_ANSWER
                if completion.text is None
                else run_program(
                    f"{row['prompt']}{completion.text}\n\n{row['test']}\n\ncheck({row['entry_point']})\n",
                    self.settings.timeout_seconds,
                    self.settings.memory_bytes,
                )
            )
            yield subject.progress(evaluation, len(outcomes), len(rows))
        passed = [
            math.nan if outcome == NO_ANSWER else float(outcome == "passed") for outcome in outcomes
        ]
        rate, error = mean_error(passed)
        items: dict[str, list[Any]] = {
            "id": [str(row["task_id"]) for row in rows],
            "pass_at_1": passed,
            "outcome": outcomes,
            "response": completions,
        }
        details: dict[str, Any] = {
            "new_tokens": self.settings.new_tokens,
            "truncated_prompts": truncated,
            "timeout_seconds": self.settings.timeout_seconds,
            "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        }
        if evaluation.limit is not None:
            details["smoke"] = True
        name = f"{evaluation.name}/pass_at_1"
        stderr = {name: error} if math.isfinite(error) else {}
        problems = no_answers(TASK, outcomes.count(NO_ANSWER), len(outcomes))
        yield Score({name: rate}, stderr, items, details, problems)

    def _rows(self) -> list[dict[str, Any]]:
        task, local = self._task()
        if local is not None:
            return local.rows("test", FIELDS)
        data_set = str(task.data_set)
        return [
            dict(row)
            for row in hub.hub_rows(
                data_set, None, "test", (self.settings.revisions or {}).get(data_set)
            )
        ]

    def _task(self) -> tuple[TaskFile, LocalData | None]:
        (task,) = task_files.members(TASK)
        return task, task_files.local_data(task, self.settings.data_root)


def run_program(program: str, timeout_seconds: float, memory_bytes: int) -> str:
    """Run a Python program apart; "passed" if it comes to its end without an error, else "failed" or "timed out".

    One that leaves before its end (`raise SystemExit` in a completion) has not passed the tests that follow.
    """

    def limit() -> None:
        os.setsid()
        seconds = math.ceil(timeout_seconds) + 1
        for what, amount in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, memory_bytes),
            (resource.RLIMIT_FSIZE, FILE_BYTES),
            (resource.RLIMIT_NPROC, PROCESSES),
            (resource.RLIMIT_CORE, 0),
        ):
            _, most = resource.getrlimit(what)
            value = amount if most == resource.RLIM_INFINITY else min(amount, most)
            resource.setrlimit(what, (value, value))

    with tempfile.TemporaryDirectory(prefix="humaneval-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(f"{program}\nraise SystemExit({FINISHED})\n", encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(path)],
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=limit,
        )
        try:
            return "passed" if process.wait(timeout_seconds) == FINISHED else "failed"
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # whatever it left running goes with it
            except (ProcessLookupError, PermissionError):
                pass
            process.wait()
