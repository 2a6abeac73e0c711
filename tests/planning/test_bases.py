"""Plan-time reasons of cells that store a fine-tune's difference from its base, and the keys that follow from `model.base`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config import grid
from harness.core.cell import Cell, cell_key, quantize_key
from harness.core.errors import ConfigError
from harness.planning.checks import Checker
from harness.planning.planner import make
from harness.storage.store import Store

COMMON = ("baseline=false", "evaluations=[]", "device=cpu", "tracking=none")


def cells(*words: str) -> list[Cell]:
    return list(grid.load_sweep(None, [*words, *COMMON]).cells)


def reasons(*words: str) -> list[str]:
    sweep = grid.load_sweep(None, [*words, *COMMON])
    return Checker(sweep.runtime).reasons(sweep.cells[0])


def test_a_fine_tune_of_the_demo_is_accepted_and_its_base_is_in_the_key() -> None:
    (bitdelta,) = cells("model=demo_moved", "method=bitdelta_untuned", "scheme=sign")
    assert bitdelta.model.base == "demo" and len(bitdelta.model.base_digest) == 64
    assert bitdelta.calibration is None
    assert reasons("model=demo_moved", "method=bitdelta_untuned", "scheme=sign") == []
    (other,) = cells(
        "model=demo_moved", "model.base=demo:subtract", "method=bitdelta_untuned", "scheme=sign"
    )
    (named,) = cells(
        "model=demo:moved",
        "model.base=demo",
        "method=bitdelta_untuned",
        "scheme=sign",
        "model.dtype=float32",
    )
    assert quantize_key(other) != quantize_key(bitdelta) == quantize_key(named)
    rounded = [
        cells("model=demo_moved", *base, "method=rtn", "scheme=w4g32")[0]
        for base in ((), ("model.base=demo:subtract",), ("model.base=''",))
    ]
    assert len({cell_key(each) for each in rounded}) == 1


def test_no_base_is_refused_with_the_setting() -> None:
    (reason,) = reasons("model=demo", "method=low_rank_delta", "scheme=delta8g32")
    assert "it names none; set model.base=<name>" in reason


def test_a_base_that_does_not_exist_is_refused_when_the_sweep_is_read() -> None:
    with pytest.raises(ConfigError, match="no_such_model"):
        cells("model=demo", "model.base=no_such_model", "method=rtn", "scheme=w4")


def test_a_digest_of_the_base_cannot_be_stated() -> None:
    with pytest.raises(ConfigError, match="base_digest"):
        cells("model=demo", "model.base_digest=abc", "method=rtn", "scheme=w4")


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        (
            "mistral",
            {},
            "the architecture is LlamaForCausalLM here and MistralForCausalLM in the base",
        ),
        ("llama", {"num_hidden_layers": 3}, "there are 2 blocks here and 3 in the base"),
        (
            "llama",
            {"num_hidden_layers": 2, "intermediate_size": 128},
            "model.layers.0.mlp.gate_proj is [96, 64] here and [128, 64] in the base",
        ),
    ],
)
def test_the_first_matrix_that_differs_is_named(
    tiny_model: Callable[..., Path], family: str, settings: dict[str, int], expected: str
) -> None:
    folder = tiny_model("llama", num_hidden_layers=2)
    base = tiny_model(family, **settings)
    (reason,) = reasons(
        f"model={folder}", f"model.base={base}", "method=bitdelta_untuned", "scheme=sign"
    )
    assert expected in reason


def test_another_vocabulary_is_no_reason(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", num_hidden_layers=2)
    base = tiny_model("llama", num_hidden_layers=2, vocab_size=300)
    words = (f"model={folder}", f"model.base={base}", "method=bitdelta_untuned", "scheme=sign")
    assert reasons(*words) == []


def test_a_transform_changes_the_model_and_is_refused() -> None:
    found = reasons(
        "model=demo_moved",
        "method=delta_gptq",
        "transform=smoothquant",
        "scheme=w4g32",
        "calibration=demo",
    )
    assert any("a difference is taken of the model as it is" in reason for reason in found)


def test_a_tuning_that_does_not_train_differences_is_refused() -> None:
    found = reasons(
        "model=demo_moved",
        "method=bitdelta_untuned",
        "tuning=qlora",
        "scheme=sign",
        "calibration=demo",
    )
    assert any("qlora does not train a difference from a base; use bitdelta" in r for r in found)


def test_too_few_tokens_for_the_steps_of_a_tuning() -> None:
    words = ("model=demo_moved", "method=bitdelta", "scheme=sign", "calibration=demo")
    (reason,) = reasons(*words)
    assert "set calibration.samples=400 or more, or lower tuning.steps" in reason
    assert reasons(*words, "tuning.steps=8") == []
    assert "lower tuning.length" in reasons(*words, "tuning.length=512")[0]


def test_a_model_that_is_its_own_base_is_noted(tmp_path: Path) -> None:
    sweep = grid.load_sweep(
        None,
        [
            "model=demo",
            "model.base=demo",
            "method=bitdelta_untuned",
            "scheme=sign",
            f"runs={tmp_path}",
            *COMMON,
        ],
    )
    made = make(sweep, Store(tmp_path))
    assert not made.refused
    assert any("is its own base" in note for note in made.notes)


def test_names_of_budgets() -> None:
    (cell,) = cells("model=demo_moved", "method=low_rank_delta", "scheme=delta8g16")
    assert dataclasses.astuple(cell.scheme.weight)[:3] == ("delta", 2, 16)
    (cell,) = cells("model=demo_moved", "method=low_rank_delta", "scheme=delta16")
    assert dataclasses.astuple(cell.scheme.weight)[:3] == ("delta", 1, 128)
    with pytest.raises(ConfigError, match=r"0\.25"):
        cells("model=demo_moved", "method=low_rank_delta", "scheme=delta128")
