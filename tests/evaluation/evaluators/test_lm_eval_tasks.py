"""Benchmarks: our scores are lm-eval's own, item by item, on every local task."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from subjects import last, stories

from harness.config import evaluations
from harness.core.cell import Evaluation, Model, Scheme, freeze, score_key
from harness.core.cell import KVScheme as KV
from harness.core.errors import ConfigError, DataError, EvaluationError
from harness.data import task_files
from harness.evaluation.evaluators import lm_eval_tasks
from harness.evaluation.evaluators.lm_eval_tasks import Evaluator
from harness.evaluation.protocols import Subject

TASKS = [
    "arc_easy",
    "boolq",
    "piqa",
    "winogrande",
    "commonsense_qa",
    "copa",
    "hellaswag",
    "openbookqa",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "lambada_openai",
    "bbq",
    "tinystories_cloze",
    "tinystories_lastword",
]
LIMIT = 12


def evaluator(shared: Path, task: str, **settings: Any) -> Evaluator:
    return Evaluator(Evaluator.Settings(task=task, data_root=str(shared / "data"), **settings))


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval without its pool of processes, its list of installed packages and the user's cache of data sets."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


_known: dict[str, dict[str, Any]] = {}


def stock(shared: Path, tmp_path: Path, task: str, limit: int, **arguments: Any) -> dict[str, Any]:
    """lm-eval's simple_evaluate on the same files, as the data's README says to run it."""
    if task not in _known:
        _known[task] = _stock(shared, tmp_path, task, limit, **arguments)
    return _known[task]


def _stock(
    shared: Path,
    tmp_path: Path,
    task: str,
    limit: int,
    subject: Subject | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (file,) = task_files.members(task)
    local = task_files.local_data(file, shared / "data")
    grid: dict[str, Any] = {
        "include": str(file.path),
        "task": f"{task}_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in local.splits.items()}
        },
    }
    grid |= {
        key: None for key in task_files.SPLITS if str(file.config.get(key)) not in local.splits
    }
    (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(grid))
    subject = subject or stories(shared)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return simple_evaluate(
            model=HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=16),
            tasks=[f"{task}_local"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            limit=limit,
            bootstrap_iters=10,
            **arguments,
        )


@pytest.mark.parametrize("scorer", ["lm_eval", "shared_prefix"])
@pytest.mark.parametrize("task", TASKS)
def test_equals_simple_evaluate(shared: Path, tmp_path: Path, task: str, scorer: str) -> None:
    theirs = stock(shared, tmp_path, task, LIMIT)
    score = last(
        evaluator(shared, task, scorer=scorer).score(
            stories(shared, batch_size=16), Evaluation(task, "lm", limit=LIMIT)
        )
    )
    result = theirs["results"][f"{task}_local"]
    for key, value in result.items():
        name, _, filter_name = key.partition(",")
        if (
            filter_name == "none"
            and not name.endswith("_stderr")
            and isinstance(value, int | float)
        ):
            assert score.metrics[f"{task}/{name}"] == pytest.approx(value, rel=1e-5, nan_ok=True), (
                name
            )
            if name == "acc" and isinstance(result["acc_stderr,none"], float):
                assert score.stderr[f"{task}/acc"] == pytest.approx(result["acc_stderr,none"])
    samples = theirs["samples"][f"{task}_local"]
    assert score.items["doc_id"] == [sample["doc_id"] for sample in samples]
    assert score.items["prompt_hash"] == [sample["prompt_hash"] for sample in samples]
    for ours, sample in zip(score.items["log_likelihoods"], samples, strict=True):
        assert ours == pytest.approx(
            [response[0][0] for response in sample["resps"]], abs=2e-3, rel=1e-5
        )
    if task == "truthfulqa_mc2":  # a probability
        assert score.items["acc"] == pytest.approx([sample["acc"] for sample in samples], rel=1e-3)
        assert "correct" not in score.items
    else:
        assert score.items["acc"] == [float(sample["acc"]) for sample in samples]
        assert score.items["correct"] == [int(sample["acc"]) for sample in samples]
    assert score.details["scorer"] == scorer and score.details["smoke"] is True


def test_worked_examples_are_the_same(shared: Path, tmp_path: Path) -> None:
    theirs = stock(shared, tmp_path, "gsm8k", 3, num_fewshot=1, gen_kwargs="max_gen_toks=8")
    built = lm_eval_tasks._built(
        Evaluator.Settings(task="gsm8k", data_root=str(shared / "data"), num_fewshot=1), 3
    )
    ours = [instance.args[0] for instance in built.instances]
    assert ours == [sample["arguments"][0][0] for sample in theirs["samples"]["gsm8k_local"][:3]]


def test_a_chat_template_is_applied_as_lm_eval_does(shared: Path, tmp_path: Path) -> None:
    turns = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
    subject = stories(shared)
    subject.tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    theirs = _stock(
        shared, tmp_path, "arc_easy", 4, subject, num_fewshot=0, apply_chat_template=True
    )
    own = evaluator(shared, "arc_easy", apply_chat_template=True)
    score = last(own.score(subject, Evaluation("arc_easy", "lm", limit=4)))
    samples = theirs["samples"]["arc_easy_local"]
    assert samples[0]["arguments"][0][0].startswith("<user>Question:")
    assert score.items["prompt_hash"] == [sample["prompt_hash"] for sample in samples]
    for ours, sample in zip(score.items["log_likelihoods"], samples, strict=True):
        assert ours == pytest.approx(
            [response[0][0] for response in sample["resps"]], abs=2e-3, rel=1e-5
        )
    model = Model("stories", str(shared / "models" / "stories260K"))
    assert "has no chat template" in own.check(Evaluation("arc_easy", "lm"), model)[0]
    with pytest.raises(EvaluationError, match="has no chat template"):
        last(own.score(stories(shared), Evaluation("arc_easy", "lm", limit=4)))
    off = Evaluation(
        "arc_easy",
        "lm_eval_tasks",
        freeze({"task": "arc_easy", "apply_chat_template": False}),
        data_digest="d",
    )
    absent = dataclasses.replace(off, settings=freeze({"task": "arc_easy"}))
    on = dataclasses.replace(
        off, settings=freeze({"task": "arc_easy", "apply_chat_template": True})
    )
    assert (
        score_key(subject.cell, off)
        == score_key(subject.cell, absent)
        != score_key(subject.cell, on)
    )


def test_a_group_reads_one_file_by_subject(shared: Path) -> None:
    score = last(
        evaluator(shared, "mmlu", num_fewshot=2).score(
            stories(shared), Evaluation("mmlu", "lm", limit=1)
        )
    )
    assert len(score.items["id"]) == 57 and len(score.details["tasks"]) == 57
    accuracies = [score.metrics[f"{task}/acc"] for task in score.details["tasks"]]
    assert (
        score.metrics["mmlu/acc"]
        == score.metrics["mmlu/acc_macro"]
        == pytest.approx(sum(accuracies) / 57)
    )
    assert "mmlu_stem/acc" in score.metrics and score.details["truncated_requests"] > 0
    anatomy = (
        lm_eval_tasks._built(evaluator(shared, "mmlu", num_fewshot=2).settings, 1)
        .tasks["mmlu_anatomy"]
        .instances[0]
        .args[0]
    )
    rows = [
        json.loads(line) for line in (shared / "data/tasks/mmlu/dev.jsonl").read_text().splitlines()
    ]
    first = next(row["question"] for row in rows if row["subject"] == "anatomy")
    assert "about anatomy" in anatomy and first.strip() in anatomy


def test_a_group_weighs_items(shared: Path) -> None:
    values, errors = lm_eval_tasks.group_metrics(
        [
            {"acc,none": 1.0, "acc_stderr,none": 0.1, "sample_len": 3, "alias": "a"},
            {"acc,none": 0.5, "acc_stderr,none": 0.2, "sample_len": 1, "alias": "b"},
        ]
    )
    assert values == {"acc": 0.875, "acc_macro": 0.75}
    assert errors["acc"] == pytest.approx(((0.1 * 0.75) ** 2 + (0.2 * 0.25) ** 2) ** 0.5)


def test_a_second_model_does_not_rebuild_and_does_not_inherit(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stories(shared)
    evaluation = Evaluation("cloze", "lm", limit=8)
    before = last(evaluator(shared, "tinystories_cloze").score(first, evaluation))
    monkeypatch.setattr(lm_eval_tasks, "_build", None)
    monkeypatch.setattr(lm_eval_tasks, "encode_pairs", None)
    again = last(evaluator(shared, "tinystories_cloze").score(first, evaluation))
    assert again.items == before.items and again.metrics == before.metrics
    other = stories(shared)
    other.model.get_input_embeddings().weight.data.mul_(0.5)
    changed = last(evaluator(shared, "tinystories_cloze").score(other, evaluation))
    assert changed.items["log_likelihoods"] != before.items["log_likelihoods"]


def test_another_tokenizer_is_encoded_anew(shared: Path) -> None:
    evaluation = Evaluation("cloze", "lm", limit=3)
    one = last(evaluator(shared, "tinystories_lastword").score(stories(shared), evaluation))
    other = last(
        evaluator(shared, "tinystories_lastword").score(
            stories(shared, name="babyllama-105"), evaluation
        )
    )
    assert (
        one.items["prompt_hash"] == other.items["prompt_hash"]
        and one.items["log_likelihoods"] != other.items["log_likelihoods"]
    )


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_requests_are_tokenized_as_lm_eval_does(shared: Path, add_bos_token: bool | None) -> None:
    subject = stories(shared)
    model = lm_eval_tasks._language_model(
        subject, Evaluator.Settings(task="x", add_bos_token=add_bos_token)
    )
    requests = [
        ("Once upon a time", " there was"),
        ("Once upon ", "a time"),
        ("", "Once upon"),
        ("Once\n\n", "upon a"),
        ("<s>Once", " upon"),
        ("a  ", " b"),
    ]
    theirs = [model._encode_pair(*request) if request[0] else None for request in requests]
    for request, ours, expected in zip(
        requests, lm_eval_tasks.encode_pairs(model, requests), theirs, strict=True
    ):
        if expected is None:
            assert ours[0].tolist() == [model.prefix_token_id]
            assert ours[1].tolist() == model.tok_encode(request[1], add_special_tokens=False)
        else:
            assert (ours[0].tolist(), ours[1].tolist()) == expected


def test_generation_and_filters(shared: Path, tmp_path: Path) -> None:
    rows = [{"question": f"Say {number}", "answer": str(number)} for number in range(3)]
    folder = tmp_path / "data" / "tasks" / "say"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "say.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "say",
                "dataset_path": "json",
                "test_split": "test",
                "output_type": "generate_until",
                "doc_to_text": "{{question}}",
                "doc_to_target": "{{answer}}",
                "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
                "metric_list": [
                    {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
                ],
                "filter_list": [
                    {
                        "name": "first",
                        "filter": [
                            {"function": "regex", "regex_pattern": "(.)"},
                            {"function": "take_first"},
                        ],
                    }
                ],
                "metadata": {"version": 3},
            }
        )
    )
    settings = Evaluator.Settings(
        task="say", include=str(tmp_path), data_root=str(tmp_path / "data")
    )
    score = last(Evaluator(settings).score(stories(shared), Evaluation("say", "lm")))
    assert set(score.metrics) == {"say/exact_match/first"} and len(score.items["response"]) == 3
    assert score.details["tasks"]["say"]["version"] == 3


def test_changed_data_is_read_again_by_the_same_process(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "tasks" / "ask"
    folder.mkdir(parents=True)
    (tmp_path / "ask.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "ask",
                "dataset_path": "json",
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": ["a", "b"],
                "doc_to_target": 0,
            }
        )
    )
    settings = Evaluator.Settings(
        task="ask", include=str(tmp_path), data_root=str(tmp_path / "data")
    )

    def asked(question: str) -> str:
        (folder / "test.jsonl").write_text(json.dumps({"question": question}))
        places = {"include": str(tmp_path), "data_root": str(tmp_path / "data")}
        data = evaluations.task_digest(task_files.members("ask", str(tmp_path)), places)
        return str(lm_eval_tasks._built(settings, None, data).instances[0].args[0])

    assert asked("Which?") == "Which?" and asked("Who?") == "Who?"


def test_what_the_plan_refuses(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model, evaluation = Model("m", str(shared / "models/stories260K")), Evaluation("e", "lm")

    def reasons(task: str, **settings: Any) -> list[str]:
        return Evaluator(Evaluator.Settings(task=task, **settings)).check(evaluation, model)

    data = {"data_root": str(shared / "data")}
    assert reasons("arc_easy", **data) == reasons("mmlu", num_fewshot=5, **data) == []
    (unknown,) = reasons("arc_eesy")
    assert '"arc_easy"' in unknown
    (remote,) = reasons("arc_easy")
    assert "allenai/ai2_arc" in remote and "tasks/arc_easy" in remote
    (group,) = reasons("mmlu")
    assert "cais/mmlu" in group and "tasks/mmlu/" in group
    (own,) = reasons("tinystories_cloze")
    assert "data.root" in own
    (shots,) = reasons("arc_easy", num_fewshot=5, **data)
    assert "train.jsonl" in shots
    (fixed,) = reasons("truthfulqa_mc1", num_fewshot=5, **data)
    assert "fixes num_fewshot" in fixed
    assert any("code" in reason for reason in reasons("humaneval", **data))
    (absent,) = reasons("sciq", **data)
    assert "no folder for it" in absent
    with pytest.raises(ConfigError, match="no such folder"):
        task_files.members("x", str(tmp_path / "none"))


def test_continuations_that_do_not_fit_are_named(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "tinystories_cloze"
    folder.mkdir(parents=True)
    rows = [{"query": "One day", "choices": [" a", " dog" * 600], "gold": 0}]
    (folder / "validation.jsonl").write_text(json.dumps(rows[0]))
    settings = Evaluator.Settings(task="tinystories_cloze", data_root=str(tmp_path))
    with pytest.raises(EvaluationError, match=r"tinystories_cloze item 0 \(\d+ tokens\)"):
        last(Evaluator(settings).score(stories(shared), Evaluation("e", "lm")))


def test_damaged_data_is_said_by_line(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "tinystories_cloze"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text(
        '{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query"'
    )
    settings = Evaluator.Settings(task="tinystories_cloze", data_root=str(tmp_path))
    with pytest.raises(DataError, match="line 2"):
        last(Evaluator(settings).score(stories(shared), Evaluation("e", "lm")))


def test_rounded_keys_and_values_keep_lm_evals_scorer(shared: Path) -> None:
    subject = stories(shared)
    cell = dataclasses.replace(subject.cell, scheme=Scheme("kv4", kv=KV()))
    subject = dataclasses.replace(subject, cell=cell)
    score = last(
        evaluator(shared, "tinystories_cloze").score(subject, Evaluation("e", "lm", limit=2))
    )
    assert score.details["scorer"] == "lm_eval"
    with pytest.raises(EvaluationError, match="keys and values"):
        last(
            evaluator(shared, "tinystories_cloze", scorer="shared_prefix").score(
                subject, Evaluation("e", "lm", limit=2)
            )
        )


@pytest.mark.parametrize(
    "settings", [{}, {"task": "a", "scorer": "shared"}, {"task": "a", "num_fewshot": -1}]
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Evaluator.Settings(**settings)
