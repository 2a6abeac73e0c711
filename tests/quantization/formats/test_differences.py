"""Differences as other libraries read them: PEFT on the base computes our logits, and a plain folder is base + difference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_cell import base_for
from safetensors.torch import load_file, save_file
from small import cell, part, quantize, windows
from transformers import AutoModelForCausalLM

from harness.core.cell import Cell, Method, WeightScheme, quantize_key
from harness.core.errors import PlanError
from harness.data.model_folders import model_digest
from harness.quantization.export import export, refusals
from harness.quantization.inference.load import load
from harness.quantization.models import shapes
from harness.storage.store import Store

BUDGET, SIGN = WeightScheme("delta", 2, 32), WeightScheme("sign", 1, -1, True)


def made(
    folder: Path, base: Path, store: Store, name: str, scheme: WeightScheme, **settings: object
) -> tuple[Cell, str]:
    own = cell(folder, Method(name, rounding=part(name, **settings)))
    model = dataclasses.replace(own.model, base=str(base), base_digest=model_digest(str(base)))
    own = dataclasses.replace(
        own, model=model, scheme=dataclasses.replace(own.scheme, weight=scheme)
    )
    quantize([own], folder, store.root / "checkpoints")
    return own, store.open_cell(own)


def with_other_ends(folder: Path) -> None:
    """As in a real fine-tune, embeddings, head and norms differ from the base's too."""
    tensors = load_file(folder / "model.safetensors")
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
    ):
        tensors[name] = tensors[name] * 1.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("low_rank_delta", {}),
        ("low_rank_delta", {"factor_dtype": "float32"}),
        ("delta_come", {"groups": [[8, 1], [3, 3], [2, 0]]}),
    ],
)
def test_peft_on_the_base_computes_our_logits(
    tiny_model: Callable[..., Path], tmp_path: Path, name: str, settings: dict[str, object]
) -> None:
    from peft import PeftModel

    folder, store = tiny_model("llama", num_hidden_layers=2), Store(tmp_path / "runs")
    base = base_for(folder)
    with_other_ends(folder)
    own, key = made(folder, base, store, name, BUDGET, **settings)
    found = export(store, key, "peft", tmp_path / "adapter")
    config = json.loads((found.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert len(config["modules_to_save"]) == 4
    tokens = windows(2, 24)
    with torch.no_grad():
        ours = load(own, folder, store.checkpoint_folder(quantize_key(own)))[0](tokens).logits
        below = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        before = below(tokens).logits
        theirs = PeftModel.from_pretrained(below, found.folder).eval()(tokens).logits
    largest = float(ours.abs().max())
    assert torch.allclose(theirs, ours, atol=1e-5 * largest)
    assert float((before - ours).abs().max()) > 1e-2 * largest


@pytest.mark.parametrize(
    ("family", "name", "scheme"),
    [("llama", "bitdelta", SIGN), ("phi3", "delta_gptq", WeightScheme("int", 4, 32))],
)
def test_a_plain_folder_is_the_evaluated_model(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, name: str, scheme: WeightScheme
) -> None:
    folder, store = tiny_model(family, num_hidden_layers=2), Store(tmp_path / "runs")
    own, key = made(folder, base_for(folder), store, name, scheme)
    found = export(store, key, "transformers", tmp_path / "plain")
    assert "quantization_config" not in json.loads((found.folder / "config.json").read_text())
    tokens = windows(2, 24)
    with torch.no_grad():
        ours = load(own, folder, store.checkpoint_folder(quantize_key(own)))[0](tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32).eval()
        assert torch.allclose(plain(tokens).logits, ours, atol=1e-5 * float(ours.abs().max()))


def test_what_no_format_holds_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, store = tiny_model("llama", num_hidden_layers=2), Store(tmp_path / "runs")
    base = base_for(folder)
    signs, key = made(folder, base, store, "bitdelta", SIGN)
    with pytest.raises(PlanError, match="a sign matrix is of full rank and no adapter"):
        export(store, key, "peft", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    known = shapes(folder)
    assert "no base beside" in refusals(signs, known, "gptq")[0]
    low, key = made(folder, base, store, "low_rank_delta", BUDGET)
    assert refusals(low, known, "peft") == refusals(low, known, "transformers") == []
    assert "no base beside" in refusals(low, known, "compressed_tensors")[0]


def test_another_vocabulary_cannot_be_an_adapter(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = tiny_model("llama", num_hidden_layers=2), Store(tmp_path / "runs")
    base = tiny_model("llama", num_hidden_layers=2, vocab_size=300, seed=1)
    _, key = made(folder, base, store, "low_rank_delta", BUDGET)
    with pytest.raises(PlanError, match=r"lm_head.weight has another shape.*cannot resize"):
        export(store, key, "peft", tmp_path / "adapter")
