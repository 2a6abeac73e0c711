"""HumanEval: off unless asked for; programs run apart, with limits; the reference solutions pass."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from subjects import last, stories

from harness.core.cell import Evaluation
from harness.core.errors import EvaluationError
from harness.evaluation.evaluators import humaneval
from harness.evaluation.evaluators.humaneval import Evaluator, run_program
from harness.evaluation.generation import Completion

EVALUATION = Evaluation("humaneval", "humaneval", limit=2)
MEMORY = 2**30


def test_it_is_off_unless_asked_for(shared: Path) -> None:
    made = Evaluator(Evaluator.Settings(data_root=str(shared / "data")))
    (reason,) = made.check(EVALUATION, stories(shared).cell.model)
    assert "evaluations.humaneval.run_generated_code=true" in reason
    with pytest.raises(EvaluationError):
        last(made.score(stories(shared), EVALUATION))


def test_reference_solutions_pass(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        json.loads(line)
        for line in (shared / "data/tasks/humaneval/test.jsonl").read_text().splitlines()
    ][:3]
    answers = {row["prompt"]: row["canonical_solution"] for row in rows}
    monkeypatch.setattr(
        humaneval,
        "complete",
        lambda subject, prompt, new_tokens, stop: Completion(answers[prompt], False),
    )
    made = Evaluator(Evaluator.Settings(data_root=str(shared / "data"), run_generated_code=True))
    assert made.check(EVALUATION, stories(shared).cell.model) == []
    score = last(made.score(stories(shared), Evaluation("humaneval", "humaneval", limit=3)))
    assert score.metrics == {"humaneval/pass_at_1": 1.0} and score.details["smoke"] is True


def test_a_model_that_writes_no_code_fails(shared: Path) -> None:
    made = Evaluator(
        Evaluator.Settings(data_root=str(shared / "data"), run_generated_code=True, new_tokens=4)
    )
    score = last(made.score(stories(shared), EVALUATION))
    assert score.metrics == {"humaneval/pass_at_1": 0.0}


def test_outcomes() -> None:
    assert run_program("assert 1 + 1 == 2", 120, MEMORY) == "passed"
    assert run_program("assert 1 + 1 == 3", 120, MEMORY) == "failed"
    assert run_program("raise SystemExit(1)", 120, MEMORY) == "failed"
    assert run_program("not python", 120, MEMORY) == "failed"
    assert (
        run_program("def f():\n    raise SystemExit\nf()\nassert False", 120, MEMORY) == "failed"
    )  # it left before the tests


def test_limits_hold(tmp_path: Path) -> None:
    began = time.monotonic()
    assert run_program("while True: pass", 1, MEMORY) == "timed out"
    assert time.monotonic() - began < 120
    assert run_program("x = bytearray(2**31)", 120, MEMORY) == "failed"
    assert run_program("open('big', 'wb').write(bytes(2**22))", 120, MEMORY) == "failed"


def test_nothing_of_the_environment_reaches_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (
        run_program(
            "import os; assert 'HF_TOKEN' not in os.environ and os.listdir() == ['program.py']",
            120,
            MEMORY,
        )
        == "passed"
    )


def test_what_a_program_starts_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n"
    )
    assert run_program(program, 120, MEMORY) == "passed"
    for _ in range(1200):
        try:
            state = (
                Path(f"/proc/{int(mark.read_text())}/stat")
                .read_text()
                .rpartition(")")[2]
                .split()[0]
            )
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    os.kill(int(mark.read_text()), 0)
    pytest.fail("the child is still there")
