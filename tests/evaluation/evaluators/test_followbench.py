"""FollowBench: rules, rates, and a judge that is a stub on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from subjects import last, stories

from harness.core.cell import Evaluation
from harness.core.errors import EvaluationError
from harness.evaluation.evaluators import followbench
from harness.evaluation.evaluators.followbench import Evaluator

INSTRUCTION = "Write about the sea."
ROWS = [
    *(
        {
            "group": "style",
            "example_id": "1",
            "level": level,
            "instruction": INSTRUCTION + " Be brief." * level,
            "target": "",
        }
        for level in range(3)
    ),
    {
        "group": "content",
        "example_id": "2",
        "level": 1,
        "instruction": "Once upon a",
        "target": "time",
    },
]
EVALUATION = Evaluation("followbench", "followbench")


class Judge(BaseHTTPRequestHandler):
    """Says YES to the first requirement and NO to the others; fails once with 503 before."""

    requests: list[dict[str, Any]] = []  # noqa: RUF012 one per test
    failures = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if type(self).failures > 0:
            type(self).failures -= 1
            self.send_error(503)
            return
        type(self).requests.append(
            {"body": body, "path": self.path, "key": self.headers.get("Authorization")}
        )
        count = body["messages"][0]["content"].count("[Instruction ") - 1
        reply = "\n".join(f"{n + 1}: {'YES' if n == 0 else 'NO'}" for n in range(count))
        content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[str]:
    Judge.requests, Judge.failures = [], 0
    server = HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def data_root(tmp_path: Path) -> str:
    folder = tmp_path / "tasks" / "followbench"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path)


def test_the_judge_is_asked_about_every_added_constraint(
    shared: Path, data_root: str, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.setattr(followbench.time, "sleep", lambda seconds: None)
    Judge.failures = 1
    settings = Evaluator.Settings(
        data_root=data_root,
        judge_url=judge,
        judge_model="stub",
        judge_key_name="JUDGE_KEY",
        new_tokens=4,
    )
    made = Evaluator(settings)
    assert made.check(EVALUATION, stories(shared).cell.model) == []
    score = last(made.score(stories(shared), EVALUATION))
    assert [request["key"] for request in Judge.requests] == ["Bearer secret"] * 2
    assert (
        Judge.requests[0]["path"] == "/v1/chat/completions"
        and Judge.requests[0]["body"]["model"] == "stub"
    )
    rule = score.metrics["followbench/rules"]
    assert score.items is not None and score.items["ssr"][:2] == [1.0, 0.5]
    assert score.metrics["followbench/hsr"] == pytest.approx(((1 + rule) / 2 + 0) / 2)
    assert score.details["judge"] == "stub" and score.details["not_run"] == 0
    assert "secret" not in json.dumps(score.details)


def test_without_a_judge_only_the_rules_are_scored_and_the_rest_is_marked(
    shared: Path, data_root: str
) -> None:
    score = last(
        Evaluator(Evaluator.Settings(data_root=data_root, new_tokens=4)).score(
            stories(shared), EVALUATION
        )
    )
    assert set(score.metrics) == {"followbench/rules"}
    assert score.details["not_run"] == 2 and score.details["judge"] == "none"


def test_real_items_run_by_rule(shared: Path) -> None:
    made = Evaluator(Evaluator.Settings(data_root=str(shared / "data"), new_tokens=2))
    score = last(made.score(stories(shared), Evaluation("followbench", "followbench", limit=8)))
    assert score.details["smoke"] is True and 0 <= score.metrics["followbench/rules"] <= 1


def test_a_judge_that_is_not_there_fails_the_evaluation_with_its_address(
    shared: Path, data_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followbench.time, "sleep", lambda seconds: None)
    settings = Evaluator.Settings(
        data_root=data_root, judge_url="http://127.0.0.1:9/v1", judge_model="none", new_tokens=2
    )
    with pytest.raises(EvaluationError, match=r"127\.0\.0\.1:9.*did not answer"):
        last(Evaluator(settings).score(stories(shared), EVALUATION))


def test_missing_data_is_said_in_the_plan(shared: Path, tmp_path: Path) -> None:
    (reason,) = Evaluator(Evaluator.Settings(data_root=str(tmp_path))).check(
        EVALUATION, stories(shared).cell.model
    )
    assert "tasks/followbench/test.jsonl" in reason


def test_rates_of_a_known_case() -> None:
    rows = [{"group": "style", "example_id": "1", "level": level} for level in (1, 2, 3)]
    found = followbench.rates(rows, [[True], [True, True], [True, False, True]])
    assert found == {
        "hsr": pytest.approx(2 / 3),
        "ssr": pytest.approx((1 + 1 + 2 / 3) / 3),
        "csl": 2,
    }
    assert followbench.rates(rows, [[False], [True, True], [True] * 3])["csl"] == 0


def test_rules() -> None:
    assert followbench.meets("name[The Waterman]", "It is Name[the waterman].")
    assert not followbench.meets("cat", "concatenate")
    template = "{instruction}\n{{'AI assistant': '{answer}'}}"
    assert followbench.meets(template, "{'AI assistant': 'Meeting on Monday'}")
    assert not followbench.meets(template, "Meeting on Monday")


def test_verdicts_must_be_as_many_as_the_constraints() -> None:
    assert followbench.read_verdicts("1: YES\n2: no", 2, "x") == [True, False]
    with pytest.raises(EvaluationError, match="1 verdicts for 2"):
        followbench.read_verdicts("1: YES", 2, "x")


def test_settings_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="belong together"):
        Evaluator.Settings(judge_url="http://x")
