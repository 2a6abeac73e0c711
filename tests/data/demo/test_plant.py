"""Planted outliers change no logit, and are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.core.errors import ModelError
from harness.data.demo.plant import describe, plant
from harness.data.demo.variants import VARIANTS, variant_folder


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
        )
    ).eval()


IDS = torch.arange(40).view(2, 20)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "channels"),
    [("weight", [3, 17]), ("activation", [3, 17]), ("down", [5, 40]), ("key", [0, 3])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_equal_to_the_bit(
    model: Any, kind: str, channels: list[int], dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    before = logits(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    plant(model, kind, 256, channels, [0, 1])
    assert torch.equal(logits(model), before)
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])
    }
    assert changed and all(".layers." in name for name in changed)
    assert model.config.plants == [
        {"kind": kind, "scale": 256, "channels": channels, "blocks": [0, 1]}
    ]


def test_the_activation_plant_makes_an_outlier_where_it_says(model: Any) -> None:
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].abs().amax((0, 1)))
    )
    logits(model)
    plant(model, "activation", 64, [7], [1])
    logits(model)
    ratio = seen[1] / seen[0]
    assert ratio[7] == 64 and (ratio == 1).sum() == 31


@pytest.mark.parametrize("scale", [1, 3, 0.5, 100])
def test_a_scale_that_would_round_is_refused(model: Any, scale: float) -> None:
    with pytest.raises(AssertionError, match="power of two"):
        plant(model, "weight", scale, [0], [0])


def test_plants_are_described_in_one_line(model: Any) -> None:
    plant(model, "activation", 8, [1, 2, 3], [0, 1])
    plant(model, "down", 4, [0], [1])
    assert (
        describe(model.config.plants)
        == "activation ×8 on 3 channels of 2 blocks; down ×4 on 1 channel of 1 block"
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_the_logits_of_the_shipped_model(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.data.demo.variants import SHIPPED

    folder = variant_folder(name, tmp_path)
    shipped, variant = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (SHIPPED, folder)
    )
    assert torch.equal(logits(variant), logits(shipped))
    added = json.loads((folder / "config.json").read_text())["plants"][
        len(getattr(shipped.config, "plants", [])) :
    ]
    assert [plant["kind"] for plant in added] == [plant.kind for plant in VARIANTS[name]]
    assert (
        AutoTokenizer.from_pretrained(folder)("12 +")["input_ids"]
        == AutoTokenizer.from_pretrained(SHIPPED)("12 +")["input_ids"]
    )


def test_a_variant_is_built_once_and_the_same_everywhere(tmp_path: Path) -> None:
    first = variant_folder("weight_outliers", tmp_path / "a")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert variant_folder("weight_outliers", tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    second = variant_folder("weight_outliers", tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in second.iterdir()
    }
    assert [p.name for p in (tmp_path / "a").iterdir()] == [first.name]


def test_an_unknown_variant_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='did you mean "weight_outliers"'):
        variant_folder("weight_outlier", tmp_path)
