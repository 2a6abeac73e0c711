"""Evaluations without a YAML: any task of lm-eval by name, and a text of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.grid import load_sweep
from harness.core.cell import Evaluation
from harness.core.errors import ConfigError

GRID = ("model=demo", "method=rtn", "scheme=w4", "tracking=none")


def evaluations(*overrides: str) -> tuple[Evaluation, ...]:
    return load_sweep(None, [*GRID, *overrides]).cells[0].evaluations


def test_any_task_of_lm_eval_is_an_evaluation_by_name() -> None:
    (copa,) = evaluations("evaluations=lm_eval:copa")
    assert (copa.name, copa.evaluator) == ("copa", "lm_eval_tasks")
    assert dict(copa.settings)["task"] == "copa" and dict(copa.settings)["num_fewshot"] is None
    (shots,) = evaluations("evaluations=lm_eval:copa", "evaluations.copa.num_fewshot=5")
    assert dict(shots.settings)["num_fewshot"] == 5


def test_a_task_by_name_with_the_settings_of_a_yaml_is_that_evaluation() -> None:
    """So that its scores are found again."""
    named = evaluations("evaluations=lm_eval:arc_easy", "evaluations.arc_easy.num_fewshot=0")
    assert named == evaluations("evaluations=arc_easy")


def test_a_text_of_ones_own_is_a_perplexity(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("some words " * 50)
    (notes,) = evaluations(f"evaluations=text:{text}")
    assert (notes.name, notes.evaluator) == ("notes", "perplexity")
    assert dict(notes.settings)["source"] == str(text) and dict(notes.settings)["length"] == 0
    text.write_text("other words " * 50)
    (other,) = evaluations(f"evaluations=text:{text}")
    assert other.data_digest != notes.data_digest  # another text has other scores


def test_both_stand_beside_those_with_a_yaml_in_a_sweep_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some words " * 50)
    file = tmp_path / "own.yaml"
    file.write_text(
        "# Own\nmodel: demo\nmethod: rtn\nscheme: w4\n"
        "evaluations: [demo_perplexity, 'lm_eval:copa', {'text:notes.txt': {length: 64}}]\n"
    )
    found = load_sweep(str(file), ["tracking=none"]).cells[0].evaluations
    assert [each.name for each in found] == ["demo_perplexity", "copa", "notes"]
    assert dict(found[2].settings)["length"] == 64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lm_eval:copaa", 'no task "copaa"; did you mean "copa"'),
        ("text:", "nothing follows the colon"),
        ("text:absent.txt", "absent.txt"),
        ("coppa", "lm_eval:TASK is any task of lm-eval"),
        ("[text:a/notes.txt,text:b/notes.txt]", "text:b/notes.txt has the name of another one"),
    ],
)
def test_what_is_wrong_is_named(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text(f"words of {folder} " * 50)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        evaluations(f"evaluations={value}")


def test_methods_have_the_names_of_their_papers() -> None:
    assert load_sweep("demo").method_titles == {"rtn": "RTN", "gptq": "GPTQ", "awq": "AWQ"}
    joined = load_sweep(
        None, ["model=demo", "transform=awq", "rounding=hqq", "scheme=w4", "calibration=demo"]
    )
    assert joined.method_titles == {"awq+hqq": "AWQ + HQQ"}
