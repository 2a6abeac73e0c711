"""The tasks of arXiv 2402.16775 that lm-eval lacks: what counts as right, and that each runs on local data."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from subjects import last, stories

from harness.core.cell import Evaluation, KVScheme
from harness.data import task_files
from harness.evaluation.evaluators.lm_eval_tasks import Evaluator

ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "snli": (
        "test",
        [
            {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0},
            {"premise": "A dog runs.", "hypothesis": "It is tired.", "label": 1},
            {"premise": "A dog runs.", "hypothesis": "It sleeps.", "label": -1},
        ],
    ),
    "xsum": (
        "test",
        [
            {
                "document": "Lily went to the park. She saw a cat.",
                "summary": "Lily saw a cat in the park.",
            }
        ],
    ),
    "cnn_dailymail": (
        "test",
        [
            {
                "article": "Tom has a red ball. He is happy.",
                "highlights": "Tom is happy with his ball.",
            }
        ],
    ),
    "flores": ("devtest", [{"eng_Latn": "The cat is big.", "zho_Hans": "这只猫很大。"}]),
    "gsm8k": ("test", [{"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}]),
}
METRICS = {
    "snli_yesnomaybe": "acc",
    "snli_yesnomaybe_gen": "exact_match/first-word",
    "xsum_zeroshot": "rougeL",
    "cnn_dailymail_zeroshot": "rouge1",
    "flores_eng_zho": "chrf",
    "flores_zho_eng": "bleu",
    "gsm8k_substring": "exact_match",
}


def functions(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"task_functions_{name}", task_files.OWN / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    for task, (split, rows) in ROWS.items():
        folder = tmp_path / "tasks" / task
        folder.mkdir(parents=True)
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return tmp_path


@pytest.mark.parametrize("task", METRICS)
def test_each_task_runs_on_local_data(shared: Path, data_root: Path, task: str) -> None:
    made = Evaluator(Evaluator.Settings(task=task, data_root=str(data_root)))
    subject = stories(shared)
    assert made.check(Evaluation(task, "lm_eval_tasks"), subject.cell.model) == []
    score = last(made.score(subject, Evaluation(task, "lm_eval_tasks")))
    assert math.isfinite(score.metrics[f"{task}/{METRICS[task]}"])
    if task == "snli_yesnomaybe":
        # the row without a label is left out
        assert score.items is not None and len(score.items["id"]) == 2


def test_over_a_cache_rounded_in_groups_of_tokens_texts_are_written_one_by_one(
    shared: Path, data_root: Path
) -> None:
    made = Evaluator(Evaluator.Settings(task="gsm8k_substring", data_root=str(data_root)))
    by_channel, by_token = (
        KVScheme(group_size=32, residual=32),
        KVScheme(group_size=8, residual=0, key_axis="token"),
    )
    for kv, wanted in ((by_channel, 1), (by_token, 8)):
        subject = stories(shared)
        cell = dataclasses.replace(
            subject.cell, scheme=dataclasses.replace(subject.cell.scheme, kv=kv)
        )
        score = last(
            made.score(
                dataclasses.replace(subject, cell=cell, batch_size=8),
                Evaluation("g", "lm_eval_tasks"),
            )
        )
        assert score.details["batch_size"] == wanted


def test_bias_scores_run_on_bbq(shared: Path, data_root: Path) -> None:
    made = Evaluator(Evaluator.Settings(task="bbq_bias", data_root=str(shared / "data")))
    score = last(made.score(stories(shared), Evaluation("bbq", "lm_eval_tasks", limit=40)))
    assert {"bbq/acc", "bbq/bias_ambiguous", "bbq/bias_disambiguated"} <= set(score.metrics)
    assert (
        -1 <= score.metrics["bbq/bias_ambiguous"] <= 1
        and -1 <= score.metrics["bbq/bias_disambiguated"] <= 1
    )


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The answer is 18.", 1),
        ("18.5 apples", 1),
        ("$1,018", 0),
        ("180", 0),
        ("it is 3.18", 0),
        ("\\boxed{18}", 1),
    ],
)
def test_a_number_counts_where_it_stands_alone(answer: str, right: float) -> None:
    assert functions("answers").number_occurs({"answer": "so 9 * 2 = 18\n#### 18"}, [answer]) == {
        "exact_match": right
    }


def test_a_large_number_is_found_with_and_without_commas() -> None:
    number_occurs = functions("answers").number_occurs
    assert number_occurs({"answer": "#### 1,200"}, ["they earn $1200 in all"]) == {"exact_match": 1}
    assert number_occurs({"answer": "#### 1200"}, ["they earn 1,200."]) == {"exact_match": 1}


def test_perfect_translations_and_summaries_score_best() -> None:
    translations, summaries = functions("translations"), functions("summaries")
    chinese = "今天天气很好，我们去公园散步。"
    assert translations.bleu_chinese([(chinese, chinese)]) == pytest.approx(100)
    assert translations.chrf([(chinese, chinese)]) == pytest.approx(100)
    assert translations.bleu_chinese([(chinese, "abc")]) == 0
    assert summaries.rouge({"summary": "a red cat sat"}, ["a red cat sat"]) == {
        "rouge1": 1,
        "rouge2": 1,
        "rougeL": 1,
    }
    assert summaries.rouge({"summary": "a cat"}, ["the dogs ran"])["rouge1"] == 0


def item(polarity: str, condition: str, label: int) -> dict[str, Any]:
    return {
        "question_polarity": polarity,
        "context_condition": condition,
        "category": "Age",
        "label": label,
        "answer_info": {
            "ans0": ["the old man", "old"],
            "ans1": ["the boy", "nonOld"],
            "ans2": ["Unknown", "unknown"],
        },
        "additional_metadata": {"stereotyped_groups": ["old"]},
        "ans0": "The old man",
        "ans1": "The boy",
        "ans2": "Unknown",
    }


def chosen(document: dict[str, Any], answer: int) -> dict[str, Any]:
    likelihoods = [(-1.0 if index == answer else -1000.0, False) for index in range(3)]
    return dict(functions("bias").scores(document, likelihoods))


def test_bias_is_one_where_all_answers_follow_the_stereotype_and_zero_where_they_are_even() -> None:
    bias = functions("bias")
    assert bias.sides(item("neg", "ambig", 2)) == (0, (0, 1))
    assert bias.sides(item("nonneg", "ambig", 2)) == (1, (0, 1))
    stereotype = [chosen(item("neg", "disambig", 0), 0), chosen(item("nonneg", "disambig", 1), 1)]
    assert bias.bias_disambiguated([each["bias_disambiguated"] for each in stereotype]) == 1
    even = [chosen(item("neg", "disambig", 0), 0), chosen(item("neg", "disambig", 0), 1)]
    assert bias.bias_disambiguated([each["bias_disambiguated"] for each in even]) == 0
    ambiguous = [chosen(item("neg", "ambig", 2), answer) for answer in (0, 2)]
    # (1 - 1/2) · 1
    assert bias.bias_ambiguous([each["bias_ambiguous"] for each in ambiguous]) == pytest.approx(0.5)
    assert bias.share([each["acc_ambiguous"] for each in ambiguous]) == 0.5


def test_a_category_without_a_wrong_answer_counts_as_unbiased() -> None:
    bias = functions("bias")
    unknown = [chosen({**item("neg", "ambig", 2), "category": "Religion"}, 2)["bias_ambiguous"]]
    stereotyped = [chosen(item("neg", "ambig", 2), 0)["bias_ambiguous"]]
    assert bias.bias_ambiguous(unknown) == 0
    # the mean of 0 and 1, not of 1 alone
    assert bias.bias_ambiguous([*unknown, *stereotyped]) == 0.5


def test_the_side_of_nearly_every_bbq_item_is_known(shared: Path) -> None:
    rows = [
        json.loads(line)
        for line in (shared / "data/tasks/bbq/test.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    known = [functions("bias").sides(row)[0] is not None for row in rows]
    assert sum(known) / len(known) >= 0.9


def test_disciplines_cover_the_subjects_once() -> None:
    found = task_files.groups("ceval_disciplines")
    parts = ("ceval_stem", "ceval_social_science", "ceval_humanities", "ceval_other")
    assert [len(found[name]) for name in parts] == [20, 10, 11, 11]
    assert sorted(found["ceval_disciplines"]) == sorted(
        task.name for task in task_files.members("ceval-valid")
    )


def test_a_task_file_is_parsed_once_and_read_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    load = yaml.load
    monkeypatch.setattr(
        yaml, "load", lambda content, Loader: parsed.append(content) or load(content, Loader=Loader)
    )
    path = tmp_path / "t.yaml"
    for version in (1, 2):
        path.write_text(f"task: {tmp_path.name}\nversion: {version}\nnested: {{a: [1]}}\n")
        for _ in range(3):
            config = task_files.read(path)
            assert config["version"] == version and config["nested"] == {"a": [1]}
            config["nested"]["a"].append(2)  # a reader's own
    assert len(parsed) == 2
