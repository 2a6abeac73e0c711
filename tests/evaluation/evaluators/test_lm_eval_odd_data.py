"""Odd models and odd data: no number that is not one, no item that is its own example, nothing left out in silence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from subjects import last

from harness.core.cell import Cell, Evaluation, Method, Model, Scheme
from harness.core.errors import DataError, EvaluationError, HarnessError
from harness.data import model_folders
from harness.evaluation import flips
from harness.evaluation.evaluators import lm_eval_tasks
from harness.evaluation.evaluators.lm_eval_tasks import Evaluator
from harness.evaluation.protocols import Score, Subject

CHOICE: dict[str, Any] = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{c}}",
    "doc_to_target": "a",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        {"metric": "mcc"},
        {"metric": "brier_score"},
    ],
    "metadata": {"version": 1},
}
ROLLING = {
    "dataset_path": "json",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "word_perplexity"},
        {"metric": "byte_perplexity"},
        {"metric": "bits_per_byte"},
    ],
}
LAST_WORD = {
    "dataset_path": "json",
    "output_type": "loglikelihood",
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_target": " red",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
WRITE = {
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{w}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def questions(count: int = 8) -> list[dict[str, Any]]:
    colours = [" red", " blue", " green", " grey"]
    return [{"q": f"Box {i} is :", "c": colours, "a": i % 4, "w": "red"} for i in range(count)]


@pytest.fixture
def demo() -> Subject:
    """The embedded model, loaded anew: tests damage it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = Model("demo", "demo")
    folder = model_folders.model_folder(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cell = Cell(model, Method("none"), Scheme("full"))
    return Subject(cell, loaded, AutoTokenizer.from_pretrained(folder), "cpu", 4, {}, folder)


def make(
    folder: Path, name: str, task: dict[str, Any], rows: Any, split: str = "test", **own: Any
) -> Evaluator:
    data = folder / "data" / "tasks" / name
    data.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))
    content = rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode()
    (data / f"{split}.jsonl").write_bytes(content)
    own = {"task": name, "include": str(folder), "data_root": str(folder / "data"), **own}
    return Evaluator(Evaluator.Settings(**own))


def score(evaluator: Evaluator, subject: Subject) -> Score:
    name = evaluator.settings.task
    return last(evaluator.score(subject, Evaluation(name, "lm_eval_tasks")))


def spoil(subject: Subject) -> Subject:
    """Every logit NaN, as after an overflow in float16."""
    model: Any = subject.model
    model.model.norm.weight.data[3] = math.nan
    return subject


def reasons(evaluator: Evaluator) -> list[str]:
    name = evaluator.settings.task
    return evaluator.check(Evaluation(name, "lm_eval_tasks"), Model("demo", "demo"))


@pytest.mark.parametrize("scorer", ["shared_prefix", "lm_eval"])
@pytest.mark.parametrize(
    "kind", [CHOICE, LAST_WORD, ROLLING, WRITE], ids=lambda k: k["output_type"]
)
def test_logits_that_are_no_numbers_give_no_number(
    tmp_path: Path, demo: Subject, kind: dict[str, Any], scorer: str
) -> None:
    rows = questions() if kind is not ROLLING else [{"text": "one box is red"}] * 4
    found = score(make(tmp_path, "nan", kind, rows, scorer=scorer), spoil(demo))
    assert len(found.metrics) == len(kind["metric_list"])
    assert all(math.isnan(value) for value in found.metrics.values()) and not found.stderr
    assert found.items is not None and found.problems["unscored"] == len(rows)
    assert "not numbers" in found.problems["sentences"][0]
    for name in {"chosen", "correct", "response"} & set(found.items):
        assert set(found.items[name]) == {None}
    for name in {"acc", "acc_norm", "exact_match"} & set(found.items):
        assert all(math.isnan(value) for value in found.items[name])


def test_flips_against_a_model_without_answers_are_no_numbers(
    tmp_path: Path, demo: Subject
) -> None:
    evaluator = make(tmp_path, "flip", CHOICE, questions())
    before = pandas.DataFrame(score(evaluator, demo).items)
    now = pandas.DataFrame(score(evaluator, spoil(demo)).items)
    same = flips.of_items(before.merge(before, on="id", suffixes=("", "_before")))
    assert same["flips"] == same["choice_kl"] == 0.0
    for pair in (now.merge(before, on="id", suffixes=("", "_before")),) * 2:
        assert all(math.isnan(value) for value in flips.of_items(pair).values())


def test_one_item_without_an_answer_leaves_no_mean_of_the_others(
    tmp_path: Path, demo: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.evaluation import prefix_scoring

    whole = prefix_scoring.scores

    def one_lost(*arguments: Any, **options: Any) -> Any:
        for answers in whole(*arguments, **options):
            yield {i: ((math.nan, False) if i == 5 else answer) for i, answer in answers.items()}

    monkeypatch.setattr(prefix_scoring, "scores", one_lost)
    found = score(make(tmp_path, "one", CHOICE, questions()), demo)
    assert all(math.isnan(value) for value in found.metrics.values())
    assert found.items is not None and found.items["chosen"].count(None) == 1
    assert found.items["correct"][1] is None and None not in found.items["correct"][2:]
    assert found.problems["unscored"] == 1 and "item 1" in found.problems["sentences"][0]


def test_an_overflow_is_infinite_and_the_rest_is_kept(tmp_path: Path, demo: Subject) -> None:
    """300 characters without a blank are one word: its perplexity exceeds 1e308."""
    rows = [{"text": "石头在河里灯在桌上面包在盘中马在草地上" * 30} for _ in range(4)]
    found = score(make(tmp_path, "long", ROLLING, rows), demo)
    assert found.metrics["long/word_perplexity"] == math.inf
    assert math.isfinite(found.metrics["long/byte_perplexity"])
    assert math.isfinite(found.metrics["long/bits_per_byte"])
    assert found.details["split_texts"] == 4


def test_a_finite_perplexity_whose_error_overflows_has_none(
    tmp_path: Path, demo: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.evaluation import prefix_scoring

    def far(model: Any, requests: Any, *arguments: Any) -> Any:
        yield {index: (-500.0 - index, False) for index in range(len(requests))}

    monkeypatch.setattr(prefix_scoring, "scores", far)
    found = score(make(tmp_path, "far", LAST_WORD, questions(4)), demo)
    assert found.metrics["far/perplexity"] == pytest.approx(math.exp(501.5))
    assert found.metrics["far/acc"] == 0.0 and "far/perplexity" not in found.stderr
    assert "far/acc" in found.stderr


@pytest.mark.parametrize(("answer", "said"), [(7, "answer 7 of 4"), (-1, "answer -1 of 4")])
def test_answers_out_of_range_are_counted_and_said(
    tmp_path: Path, demo: Subject, answer: int | str, said: str
) -> None:
    task = {**CHOICE, "metric_list": CHOICE["metric_list"][:1]}
    rows = [{**row, "a": answer} if i == 3 else row for i, row in enumerate(questions())]
    task |= {"doc_to_target": "{{a}}"} if isinstance(answer, str) else {}
    found = score(make(tmp_path, "range", task, rows), demo)
    (sentence,) = found.problems["sentences"]
    assert "out of range" in sentence and "1 of 8 items" in sentence
    assert "item 3" in sentence and said in sentence
    assert found.items is not None and found.items["acc"][3] == 0.0
    assert score(make(tmp_path, "fine", task, questions()), demo).problems == {}


def test_an_item_that_lm_eval_cannot_score_is_shown(tmp_path: Path, demo: Subject) -> None:
    rows = [{**row, "a": None} if i == 3 else row for i, row in enumerate(questions())]
    with pytest.raises(EvaluationError, match=r'"Box 3 is :".*"a": null'):
        score(make(tmp_path, "null", CHOICE, rows), demo)


def test_items_that_leave_the_denominator_and_warnings_are_said(
    tmp_path: Path, demo: Subject
) -> None:
    (tmp_path / "utils.py").write_text(
        "import logging\n\n\ndef partly(doc, results):\n"
        "    logging.getLogger('lm_eval.tasks').warning('odd item')\n"
        "    return {} if doc['a'] == 0 else {'acc': 1.0}\n"
    )
    (tmp_path / "left.yaml").write_text("")
    task = {**CHOICE, "metric_list": CHOICE["metric_list"][:1]}
    evaluator = make(tmp_path, "left", task, questions())
    path = tmp_path / "left.yaml"
    path.write_text(f"{path.read_text()}process_results: !function utils.partly\n")
    found = score(evaluator, demo)
    assert found.problems["unscored"] == 2 and found.metrics == {"left/acc": 1.0}
    left, warned = found.problems["sentences"]
    assert "2 of 8 items" in left and "items 0, 4" in left and "acc" in left
    assert "odd item" in warned


def test_prompts_that_are_cut_are_counted_in_every_kind(tmp_path: Path, demo: Subject) -> None:
    long = [{**row, "q": "the box is red " * 200 + row["q"]} for row in questions(2)]
    rows = [*long, *questions(6)]
    written = score(make(tmp_path, "w", WRITE, rows), demo).details
    assert written["truncated_prompts"] == 2 and written["truncated_requests"] == 0
    chosen = score(make(tmp_path, "c", CHOICE, rows), demo).details
    assert chosen["truncated_requests"] == 8 and chosen["truncated_prompts"] == 0


EXAMPLES = {**CHOICE, "metric_list": CHOICE["metric_list"][:1], "num_fewshot": 4}


@pytest.mark.parametrize(
    "splits",
    [
        {"test_split": "test", "validation_split": "validation", "fewshot_split": "validation"},
        {"test_split": None, "validation_split": "validation", "fewshot_split": "validation"},
        {"test_split": "validation", "fewshot_split": "validation"},
        {
            "test_split": "t",
            "validation_split": "validation",
            "fewshot_config": {"split": "validation"},
        },
    ],
)
@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_no_prompt_holds_its_own_item(tmp_path: Path, splits: dict[str, Any], sampler: str) -> None:
    """The prompts are those of lm-eval for a task that names the scored split its test split."""
    task = {**EXAMPLES, **splits}
    task["fewshot_config"] = {"sampler": sampler, **task.get("fewshot_config", {})}
    rows = questions(8)
    evaluator = make(tmp_path, "leak", task, rows, split="validation")
    assert reasons(evaluator) == []
    built = lm_eval_tasks._built(evaluator.settings, None, str(tmp_path))
    prompts = [i.args[0] for i in built.instances if i.idx == 0]
    assert [prompt.count("Box") for prompt in prompts] == [5] * 8
    assert not any(prompt.count(row["q"]) > 1 for prompt, row in zip(prompts, rows, strict=True))
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    official = {
        **task,
        "task": "own",
        "test_split": "validation",
        "validation_split": None,
        "fewshot_split": "validation",
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
    }
    assert prompts == official_prompts(official)


def official_prompts(task: dict[str, Any]) -> list[str]:
    """lm-eval's own, from its own loader."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    datasets.disable_progress_bars()
    made = ConfigurableTask(config=task)
    made.set_fewshot_seed(seed=1234)
    made.sampler.set_rnd(1234) if hasattr(made, "sampler") else None
    made.build_all_requests(limit=None, rank=0, world_size=1)
    return [instance.args[0] for instance in made.instances if instance.idx == 0]


def test_worked_examples_that_cannot_be_are_refused_in_the_plan(tmp_path: Path) -> None:
    few = {**EXAMPLES, "num_fewshot": 5, "fewshot_split": "dev"}
    make(tmp_path, "few", few, questions(3), split="dev")
    (reason,) = reasons(make(tmp_path, "few", few, questions()))
    assert "5 worked examples" in reason and "dev.jsonl has 3" in reason and "=3" in reason
    own = {**EXAMPLES, "fewshot_split": "test"}
    (reason,) = reasons(make(tmp_path, "own", own, questions(4)))
    assert "has 3" in reason and "num_fewshot=3" in reason
    (reason,) = reasons(make(tmp_path, "twins", own, [questions(1)[0]] * 9))
    assert "has 0" in reason
    assert reasons(make(tmp_path, "enough", own, questions(5))) == []
    listed = {**EXAMPLES, "fewshot_config": {"sampler": "first_n", "samples": questions(2)}}
    (reason,) = reasons(make(tmp_path, "listed", listed, questions(5)))
    assert "lists 2" in reason


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ('{"q": "café"}\n'.encode("latin-1"), ("line 1", "Latin-1")),
        (b"", ("no rows",)),
        (b"[1, 2]\n[3, 4]\n", ("line 1", "a list")),
        (b'{"q": "a"}\n{"q"', ("line 2", "not JSON")),
    ],
)
def test_data_that_cannot_be_read_are_refused_in_the_plan(
    tmp_path: Path, content: bytes, facts: tuple[str, ...]
) -> None:
    (reason,) = reasons(make(tmp_path, "bad", CHOICE, content))
    assert all(fact in reason for fact in ("test.jsonl", *facts)), reason


def test_other_things_that_the_plan_knows(tmp_path: Path) -> None:
    room = {**WRITE, "generation_kwargs": {"max_gen_toks": 256}}
    (reason,) = reasons(make(tmp_path, "room", room, questions()))
    assert "256 new tokens" in reason
    absent = {**CHOICE, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "no.jsonl")}}}
    evaluator = make(tmp_path, "absent", absent, questions(), data_root=None)
    (reason,) = reasons(evaluator)
    assert "no.jsonl" in reason and "does not exist" in reason


def test_what_a_tasks_function_filters_away_is_said(tmp_path: Path, demo: Subject) -> None:
    (tmp_path / "utils.py").write_text("def none(rows):\n    return rows.filter(lambda r: False)\n")
    evaluator = make(tmp_path, "none", CHOICE, questions())
    path = tmp_path / "none.yaml"
    path.write_text(f"{path.read_text()}process_docs: !function utils.none\n")
    with pytest.raises(DataError) as error:
        score(evaluator, demo)
    assert "no items are left" in str(error.value) and "none.yaml" in str(error.value)


FIELDS = st.sampled_from(["text", 3, None, True, math.nan, [], ["a"], {"k": 1}, "", " x", -1, 1.5])


@given(
    st.lists(
        st.fixed_dictionaries(
            {"q": st.sampled_from(["Box 1 is :", "é\u2028", 7, None])},
            optional={"c": st.just([" red", " blue"]) | FIELDS, "a": st.integers(-1, 3) | FIELDS},
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0, 2]),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_odd_items_give_lm_evals_own_prompts_or_one_sentence(
    tmp_path: Path, rows: list[dict[str, Any]], shots: int
) -> None:
    """Fuzz: two outcomes only."""
    task = {
        **CHOICE,
        "metric_list": CHOICE["metric_list"][:1],
        "fewshot_split": "test",
        "num_fewshot": shots,
    }
    evaluator = make(tmp_path, "odd", task, rows)
    refused = reasons(evaluator)
    if refused:
        assert all("test.jsonl" in reason for reason in refused)
        return
    try:
        built = lm_eval_tasks._build(evaluator.settings, None, None)
    except HarnessError as error:
        assert "odd" in str(error) and str(tmp_path) in str(error)
        return
    path = tmp_path / "data" / "tasks" / "odd" / "test.jsonl"
    official = {
        **task,
        "task": "official",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
    }
    prompts = [instance.args[0] for instance in built.instances if instance.idx == 0]
    assert prompts == official_prompts(official)
