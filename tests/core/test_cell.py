"""Keys: what plugins state of their settings counts, also for cells that are read back."""

from __future__ import annotations

import ast
import dataclasses

import pytest

from harness.core import plugins
from harness.core.cell import (
    Cell,
    Evaluation,
    Method,
    Model,
    Scheme,
    freeze,
    from_json,
    make_part,
    score_key,
    to_json,
)
from harness.core.errors import ConfigError
from harness.core.package import PACKAGE

CELL = Cell(Model("demo", "demo", digest="d"), Method("none"), Scheme("full"))


def key(settings: dict[str, object], evaluator: str = "lm_eval_tasks") -> str:
    evaluation = Evaluation("e", evaluator, freeze(settings), data_digest="d")
    cell = dataclasses.replace(CELL, evaluations=(evaluation,))
    back = from_json(Cell, to_json(cell))
    assert score_key(back, back.evaluations[0]) == score_key(cell, evaluation)
    return score_key(cell, evaluation)


def test_a_setting_added_later_counts_only_while_it_is_on() -> None:
    assert key({"task": "t"}) == key({"task": "t", "apply_chat_template": False})
    assert key({"task": "t"}) != key({"task": "t", "apply_chat_template": True})
    assert key({"task": "t"}, "perplexity") != key(
        {"task": "t", "apply_chat_template": False}, "perplexity"
    ), "only the plugin that states it"
    assert key({"a": 1}, "gone") != key({"a": 2}, "gone"), "a plugin that is no longer there"


def test_where_data_lies_does_not_count_once_its_digest_is_known() -> None:
    assert key({"source": "a"}, "perplexity") == key({"source": "b"}, "perplexity")


@pytest.mark.parametrize("folder", ["core", "config"])
def test_core_and_config_name_no_evaluator(folder: str) -> None:
    names = set(plugins.find("evaluator"))
    found = [
        (path.name, node.value)
        for path in sorted((PACKAGE / folder).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not found


def test_a_part_around_another_has_the_facts_of_both_and_the_bases_version() -> None:
    """A stochastic base with needs of its own, and one that does without data."""
    of = {
        base: make_part("rounding", "eora", {"base": base, "base_settings": {}, "rank": 4})
        for base in ("vptq", "squeezellm", "rtn")
    }
    assert of["vptq"].stochastic and not of["rtn"].stochastic
    assert of["squeezellm"].needs == ("hessian", "squared_gradient")
    assert of["rtn"].needs == ("hessian",)
    version = plugins.facts("rounding", "squeezellm").get("version", 0)
    assert of["squeezellm"]["base_version"] == version
    assert from_json(type(of["rtn"]), to_json(of["rtn"])) == of["rtn"]
    settings = to_json(of["rtn"])["settings"]
    assert plugins.build("rounding", "eora", settings).base.settings.grid == "gptq"
    with pytest.raises(ConfigError, match="name one without a base"):
        make_part("rounding", "svdquant", {"base": "eora", "base_settings": {}})
