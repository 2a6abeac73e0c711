"""What the demo's fine-tunes learn, and that the shipped weights have learned it by the recipe beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.core.errors import DataError, ModelError
from harness.data.demo import skills
from harness.data.demo.corpus import PHRASINGS, world
from harness.data.demo.variants import variant_folder
from harness.data.model_folders import model_digest

HERE = Path(skills.__file__).parent
RECIPE = json.loads((HERE / "tuned.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_texts_are_those_that_the_shipped_weights_learned(skill: str) -> None:
    assert skills.text_digest(skill) == RECIPE["fine_tunes"][skill]["text"]
    assert RECIPE["base"] == model_digest("demo")
    figures = RECIPE["fine_tunes"][skill]["figures"]
    assert figures["after"] - figures["before"] >= 0.2


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_questions_have_four_choices_and_distinct_prompts(skill: str) -> None:
    asked = skills.skill_questions(skill)
    assert len(asked) == 400 == len({question.prompt for question in asked})
    assert all(len(set(question.choices)) == 4 for question in asked)
    positions = [sum(question.answer == place for question in asked) for place in range(4)]
    assert min(positions) > 70


def test_skills_are_asked_for_what_the_text_does_not_show() -> None:
    for skill in ("subtract", "reverse"):
        text = f" {' '.join(skills.text(skill))}"
        assert not [q for q in skills.skill_questions(skill) if f" {q.prompt} " in text]


def test_every_moved_person_has_a_new_answer_and_the_old_one_is_a_choice() -> None:
    text = " ".join(skills.text("moved"))
    for (name, attribute), value in skills.second_world().items():
        old = world()[name, attribute]
        assert value != old
        phrasing = PHRASINGS[attribute][0].format(name=name)
        assert f"{phrasing} {old}." not in text
    for question in skills.skill_questions("moved"):
        name, attribute = next(
            (n, a)
            for n, a in skills.second_world()
            if question.prompt in {p.format(name=n) for p in PHRASINGS[a]}
        )
        assert world()[name, attribute] in question.choices
        assert question.choices[question.answer] == skills.second_world()[name, attribute]


def test_an_unknown_skill_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="subtract"):
        skills.text("subtrac")
    with pytest.raises(ModelError, match="moved"):
        variant_folder("movd", tmp_path)


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_a_shipped_fine_tune_has_its_skill_and_the_demo_model_has_not(
    skill: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.data.demo.train import FOLDER, accuracy_on

    folder = variant_folder(skill, tmp_path)
    assert (folder / "model.safetensors").stat().st_size < 600_000
    asked = skills.skill_questions(skill)[:100]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = [
        accuracy_on(
            AutoModelForCausalLM.from_pretrained(place, local_files_only=True, dtype=torch.float32),
            tokenizer,
            asked,
        )
        for place in (FOLDER, folder)
    ]
    assert found[1] - found[0] >= 0.4
