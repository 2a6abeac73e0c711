"""Exported adapters: PEFT loads them onto the base's weights and computes our logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import RTN, cell, part, quantize, windows
from transformers import AutoModelForCausalLM

from harness.core.cell import Cell, Method, make_part, quantize_key, untuned
from harness.core.errors import PlanError
from harness.quantization.export import base_alone, export, refusals
from harness.quantization.formats.native import Checkpoint, CheckpointWriter
from harness.quantization.inference.load import load
from harness.quantization.models import family_of, read_config
from harness.quantization.numerics.training import Document
from harness.quantization.pipeline.tuning import run_tuning
from harness.storage.store import Store


def tuned(
    folder: Path, store: Store, name: str, rounding: str, **settings: object
) -> tuple[Cell, str]:
    small = {
        "rank": 4,
        "steps": 4,
        "batch": 4,
        "rate": 0.02,
        "prompt_length": 8,
        "answer_length": 16,
        **settings,
    }
    c = cell(folder, Method(name, rounding=part(rounding), tuning=part(name, "tuning", **small)))
    quantize([untuned(c)], folder, store.root / "checkpoints")
    writer = CheckpointWriter(
        store.checkpoint_folder(quantize_key(c)), {"quantize_key": quantize_key(c)}
    )
    documents = [Document(tokens, 4) for tokens in windows(4, 24)]
    list(
        run_tuning(c, folder, store.checkpoint_folder(quantize_key(untuned(c))), documents, writer)
    )
    return c, store.open_cell(c)


@pytest.mark.parametrize(
    ("name", "linears"), [("qlora", []), ("ir_qlora", ["q_proj", "down_proj"])]
)
def test_peft_computes_our_logits(
    tiny_model: Callable[..., Path], tmp_path: Path, name: str, linears: list[str]
) -> None:
    folder, store = tiny_model("llama", num_hidden_layers=2), Store(tmp_path / "runs")
    c, key = tuned(folder, store, name, "rtn", linears=linears, adapter_dtype="float32")
    found = export(store, key, "peft", tmp_path / "adapter")
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert quantize_key(untuned(c))[:12] in found.text
    assert json.loads((found.folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(folder)

    before, ours, theirs = logits(c, untuned(c), folder, store, found.folder)
    assert torch.allclose(theirs, ours, atol=1e-5 * float(ours.abs().max()))
    assert float((before - ours).abs().max()) > 1e-3


def logits(
    adapted: Cell, base: Cell, folder: Path, store: Store, adapters: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the base's weights in the source model, of the adapted cell as it is loaded, and of PEFT on those weights."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = Checkpoint.open(store.checkpoint_folder(quantize_key(base)))
    family = family_of(read_config(folder))
    with torch.no_grad():
        for index in range(2):
            for linear, weight in checkpoint.block(index).weights.items():
                model.get_submodule(family.block_prefix(index) + linear).weight.copy_(
                    weight.dequantize()
                )
        before = model(windows(2, 24)).logits
        loaded = load(adapted, folder, store.checkpoint_folder(quantize_key(adapted)))[0]
        ours = loaded(windows(2, 24)).logits
        theirs = PeftModel.from_pretrained(model, adapters).eval()(windows(2, 24)).logits
    return before, ours, theirs


def corrected(
    folder: Path, name: str, base: str, inputs: str = "quantized", **more: object
) -> Cell:
    settings = {"base": base, "base_settings": {}, "rank": 40, "adapter_dtype": "float32", **more}
    method = Method(name, rounding=make_part("rounding", name, settings))
    return cell(folder, method, bits=2, inputs=inputs)


@pytest.mark.parametrize(("base", "inputs"), [("gptq", "full_precision"), ("rtn", "quantized")])
def test_peft_adds_what_a_rounding_left_beside_its_base(
    tiny_model: Callable[..., Path], tmp_path: Path, base: str, inputs: str
) -> None:
    """Adapters of 40 directions, and of 32 where a matrix has no more, are one folder."""
    folder, store = tiny_model("llama", num_hidden_layers=2), Store(tmp_path / "runs")
    c = corrected(folder, "eora", base, inputs)
    plain = base_alone(c)
    assert plain is not None and plain.method.rounding is not None
    quantize([c, plain], folder, store.root / "checkpoints")
    found = export(store, store.open_cell(c), "peft", tmp_path / "adapter")
    assert quantize_key(plain)[:12] in found.text
    ranks = {
        weight.down.shape[0]
        for weight in Checkpoint.open(store.checkpoint_folder(quantize_key(c)))
        .block(0)
        .weights.values()
    }
    assert len(ranks) > 1 and max(ranks) == 40
    before, ours, theirs = logits(c, plain, folder, store, found.folder)
    assert torch.allclose(theirs, ours, atol=1e-5 * float(ours.abs().max()))
    assert float((before - ours).abs().max()) > 1e-3


def test_what_has_no_adapter_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, store = tiny_model("llama", num_hidden_layers=2), Store(tmp_path / "runs")
    _, key = tuned(folder, store, "qa_lora", "gptq")
    with pytest.raises(PlanError, match="merged into"):
        export(store, key, "peft", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    shapes = family_of(read_config(folder)).shapes(read_config(folder))
    assert "nothing was tuned" in refusals(cell(folder, RTN), shapes, "peft")[0]
    adapted = cell(folder, Method("qlora", rounding=RTN.rounding, tuning=part("qlora", "tuning")))
    assert refusals(adapted, shapes, "peft") == []
    (reason,) = refusals(corrected(folder, "eora", "gptq"), shapes, "peft")
    assert "use inputs=full_precision" in reason
    (reason,) = refusals(corrected(folder, "svdquant", "rtn"), shapes, "peft")
    assert "the base rounds what the low-rank part leaves" in reason
