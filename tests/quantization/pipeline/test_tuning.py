"""Training after rounding: a base checkpoint is trained, and what is stored is what was trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import RTN, cell, part, quantize, windows

from harness.core.cell import ActivationScheme, Cell, Method, cell_key, quantize_key, untuned
from harness.core.errors import MethodError, StoreError
from harness.core.events import Progress, Quantized
from harness.quantization.formats.native import Checkpoint, CheckpointWriter
from harness.quantization.inference.load import load
from harness.quantization.methods import db_llm
from harness.quantization.pipeline.tuning import LanguageModel, run_tuning

FAMILIES = ["llama", "qwen3"]


def distilled(
    folder: Path, group_size: int = 32, rounding: str = "db_llm", **settings: Any
) -> Cell:
    method = Method("db_llm", rounding=part(rounding), tuning=part("db_llm", "tuning", **settings))
    return cell(folder, method, 2, group_size)


def tune(c: Cell, folder: Path, store: Path, tokens: torch.Tensor | None = None) -> list[Any]:
    """Quantize the base unless it is there, then tune; every checkpoint in store/<quantize_key>."""
    base = untuned(c)
    if not (store / quantize_key(base) / "manifest.json").exists():
        quantize([base], folder, store)
    writer = CheckpointWriter(store / quantize_key(c), {"quantize_key": quantize_key(c)})
    return list(
        run_tuning(
            c,
            folder,
            store / quantize_key(base),
            windows(4, 24) if tokens is None else tokens,
            writer,
        )
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_checkpoint_runs_and_is_nearer_to_its_teacher(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = tiny_model(family)
    c = distilled(folder, epochs=6, rate=0.02, generated=False, gamma=0.0)
    tokens = windows(4, 24)
    events = tune(c, folder, tmp_path, tokens)
    assert isinstance(events[-1], Quantized) and events[-1].cell_keys == (cell_key(c),)
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].step == progress[-1].steps == 24 and progress[-1].stage == "tuning"
    losses = events[-1].record["tuning"]["loss"]
    assert losses[-1] < losses[0]

    full = dataclasses.replace(c, method=Method("none"))
    models = [load(full, folder, None)[0]]
    models += [load(each, folder, tmp_path / quantize_key(each))[0] for each in (untuned(c), c)]
    with torch.no_grad():
        teacher, before, after = (LanguageModel(model, "cpu").logits(tokens) for model in models)
    assert float(db_llm.distillation_loss(after, teacher, 0)) < float(
        db_llm.distillation_loss(before, teacher, 0)
    )


def test_the_manifest_tells_base_and_tuning_apart(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    c = distilled(folder, epochs=1)
    (record,) = [
        event.record for event in tune(c, folder, tmp_path) if isinstance(event, Quantized)
    ]
    base = Checkpoint.open(tmp_path / quantize_key(untuned(c))).manifest
    tuned = Checkpoint.open(tmp_path / quantize_key(c)).manifest
    assert record["methods"] == tuned["methods"] == {"rounding": "db_llm", "tuning": "db_llm"}
    assert tuned["tuning"]["base"] == "" or len(tuned["tuning"]["base"]) == 64
    for key in ("parameters", "unquantized_bits", "coverage", "bits_per_weight", "stored_bytes"):
        assert tuned[key] == base[key], key  # the same layout: scales grew, nothing else
    assert tuned["tuning"]["trained_parameters"] == 2 * sum(
        e["shape"][0] * e["shape"][1] // 32 for e in tuned["linears"]
    )
    assert all(
        entry["weight_change"] > 0 and entry["weight_error"] > 0 for entry in tuned["layer_errors"]
    )
    assert tuned["seconds"] > base["seconds"]
    assert json.loads(json.dumps(tuned)) == tuned


def test_no_training_leaves_the_base(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    c = distilled(folder, epochs=0)
    tune(c, folder, tmp_path)
    base, tuned = (Checkpoint.open(tmp_path / quantize_key(each)) for each in (untuned(c), c))
    for index in range(3):
        for name, weight in base.block(index).weights.items():
            assert torch.equal(weight.dequantize(), tuned.block(index).weights[name].dequantize())


@pytest.mark.parametrize("transform", ["awq", "bi_smoothing", "quarot"])
def test_what_a_transform_does_to_inputs_is_kept(
    tiny_model: Callable[..., Path], tmp_path: Path, transform: str
) -> None:
    folder = tiny_model("llama")
    tokens = windows(4, 24)
    models = {}
    for epochs in (0, 2):
        tuning = part("peqa", "tuning", epochs=epochs, rate=0.001)
        c = cell(
            folder,
            Method(
                "odd", transform=part(transform, "transform"), rounding=RTN.rounding, tuning=tuning
            ),
            4,
            16,
        )
        events = tune(c, folder, tmp_path, tokens)
        models[epochs] = load(c, folder, tmp_path / quantize_key(c))[0]
    losses = events[-1].record["tuning"]["loss"]
    assert losses[1] < losses[0]
    base = load(untuned(c), folder, tmp_path / quantize_key(untuned(c)))[0]
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, base(tokens).logits)
        before, after = (
            float(
                torch.nn.functional.cross_entropy(
                    model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
                )
            )
            for model in (models[0], models[2])
        )
    assert before == pytest.approx(losses[0], rel=0.05) and after < before


def test_the_same_seed_gives_the_same_bytes(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    files = []
    for store, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.manual_seed(len(files))
        c = dataclasses.replace(distilled(folder), seed=seed)
        tune(c, folder, tmp_path / store)
        files.append((tmp_path / store / quantize_key(c) / "block-00001.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_activations_are_not_rounded_while_training(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    plain = distilled(folder)
    rounded = dataclasses.replace(
        plain, scheme=dataclasses.replace(plain.scheme, activation=ActivationScheme(bits=4))
    )
    assert quantize_key(plain) == quantize_key(rounded), "one checkpoint serves both"
    blocks = []
    for name, c in (("plain", plain), ("rounded", rounded)):
        tune(c, folder, tmp_path / name)
        blocks.append((tmp_path / name / quantize_key(c) / "block-00000.safetensors").read_bytes())
    assert blocks[0] == blocks[1]


def test_a_layout_that_cannot_be_trained_fails_the_cell(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    method = Method("odd", rounding=RTN.rounding, tuning=part("db_llm", "tuning"))
    with pytest.raises(MethodError, match=r"block 0, self_attn.q_proj: .*uniform"):
        tune(cell(folder, method, 2), folder, tmp_path)


def test_an_unfinished_base_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    c = distilled(folder)
    writer = CheckpointWriter(tmp_path / "tuned", {})
    with pytest.raises(StoreError, match="not complete"):
        list(run_tuning(c, folder, tmp_path / "nothing", windows(2), writer))


def test_text_by_the_model_follows_its_probabilities(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    c = dataclasses.replace(cell(folder, Method("none")))
    model = LanguageModel(load(c, folder, None)[0], "cpu")
    first = torch.arange(40) % 250
    text, again = (model.sample(first, 12, torch.Generator().manual_seed(5)) for _ in range(2))
    assert text.shape == (40, 12) and torch.equal(text[:, 0], first) and torch.equal(text, again)
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model.logits(text), -1)[:, :-1]
    chosen = log_probabilities.gather(-1, text[:, 1:, None]).mean()
    uniform = log_probabilities.mean()
    assert chosen > uniform + 0.5, "likely tokens are written, through the cache as without it"
