"""The shipped model: loads offline, answers its questions, is the model of this corpus, and loses its bits as large models do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.config.grid import load_sweep
from harness.core.cell import quantize_key
from harness.core.events import Failed
from harness.data.demo import corpus, train
from harness.quantization.calibration import draw_windows
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.inference.load import load
from harness.quantization.pipeline.passes import run_pass


@pytest.fixture(scope="module")
def model() -> Any:
    import torch

    return AutoModelForCausalLM.from_pretrained(
        train.FOLDER, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(train.FOLDER, local_files_only=True)


def recipe() -> dict[str, Any]:
    return json.loads((train.FOLDER / "recipe.json").read_text(encoding="utf-8"))


def test_it_is_small_and_has_the_shapes_of_the_recipe(model: Any) -> None:
    assert (train.FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    assert {name: getattr(model.config, name) for name in train.CONFIG} == train.CONFIG
    assert sum(p.numel() for p in model.parameters()) == recipe()["parameters"]


def test_it_was_trained_on_this_corpus() -> None:
    assert recipe()["corpus"] == {split: corpus.corpus_digest(split) for split in corpus.DOCUMENTS}
    assert (recipe()["steps"], recipe()["seed"]) == (train.STEPS, train.SEED)


def test_it_answers_in_full_precision(model: Any, tokenizer: Any) -> None:
    accuracies = {kind: train.accuracy(model, tokenizer, kind, count=100) for kind in corpus.KINDS}
    assert sum(accuracies.values()) / len(accuracies) >= 0.92, accuracies
    assert min(accuracies.values()) >= 0.85, accuracies


def test_its_perplexity_is_the_recorded_one(model: Any, tokenizer: Any) -> None:
    tokens = train.encode(tokenizer, corpus.documents("test"))
    assert train.perplexity(model, tokens) == pytest.approx(
        recipe()["figures"]["perplexity"], rel=1e-3
    )


def test_its_plants_cover_every_block(model: Any) -> None:
    plants = model.config.plants
    assert {plant["kind"] for plant in plants} == {"activation"}
    assert {block for plant in plants for block in plant["blocks"]} == set(range(4))
    assert {plant["scale"] for plant in plants} == {train.RUN_SCALE, *train.OUTLIER_SCALES}
    assert plants[0]["channels"] == list(range(train.RUN_CHANNELS)) and plants[0]["blocks"] == list(
        range(4)
    )


@pytest.fixture(scope="module")
def perplexities(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], float]:
    """By method and scheme, on 16 windows of the test text, quantized and loaded as a sweep does it."""
    sweep = load_sweep("demo", ["calibration.samples=8"])
    cells = [
        cell for cell in sweep.cells if cell.scheme.name in ("w8", "w3", "w3g32", "w2", "w2g32")
    ]
    cells = [
        cell for cell in cells if cell.method.name == "rtn" or cell.scheme.name in ("w3", "w3g32")
    ]
    calibration = next(cell.calibration for cell in cells if cell.calibration is not None)
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {quantize_key(cell): root / quantize_key(cell)[:16] for cell in cells}
    writers = {
        key: CheckpointWriter(folder, {"quantize_key": key}) for key, folder in folders.items()
    }
    events = list(run_pass(cells, train.FOLDER, draw_windows(calibration, tokenizer), writers))
    assert not [event for event in events if isinstance(event, Failed)]
    tokens = train.encode(tokenizer, corpus.documents("test"))
    measured = {}
    for cell in cells:
        loaded, _ = load(cell, train.FOLDER, folders[quantize_key(cell)], "cpu")
        measured[cell.method.name, cell.scheme.name] = train.perplexity(loaded, tokens, windows=16)
    return measured


def test_it_loses_more_with_fewer_bits(
    model: Any, tokenizer: Any, perplexities: dict[tuple[str, str], float]
) -> None:
    full = train.perplexity(model, train.encode(tokenizer, corpus.documents("test")), windows=16)
    assert perplexities["rtn", "w8"] == pytest.approx(full, rel=2e-3)
    assert full * 1.1 < perplexities["rtn", "w3"] < perplexities["rtn", "w2"] / 1.5


def test_calibration_and_groups_help(perplexities: dict[tuple[str, str], float]) -> None:
    for scheme in ("w3", "w3g32"):
        assert perplexities["gptq", scheme] < perplexities["rtn", scheme] / 1.02, scheme
        assert perplexities["awq", scheme] < perplexities["rtn", scheme] / 1.02, scheme
    assert perplexities["rtn", "w2g32"] < perplexities["rtn", "w2"] / 1.1
    for method in ("rtn", "gptq", "awq"):
        assert perplexities[method, "w3g32"] < perplexities[method, "w3"], method


def test_every_digit_is_a_token_and_text_survives(tokenizer: Any) -> None:
    assert len(tokenizer) == 512
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    for text in (corpus.documents("test")[0], "é, naïve — 漢字\n\n\t!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_is_made_again_from_the_corpus(tokenizer: Any) -> None:
    again = train.train_tokenizer(corpus.documents("train")[: train.TOKENIZER_DOCUMENTS])
    assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_lm_eval_reads_the_task(kind: str) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    path = Path(train.__file__).parent / "tasks" / f"demo_{kind}.yaml"
    task = tasks.TaskManager(include_path=str(path.parent), include_defaults=False).load(
        [path.stem]
    )["tasks"][path.stem]
    documents = list(task.test_docs())
    asked = corpus.questions(kind)
    assert len(documents) == len(asked) == 400
    for document, question in zip(documents[:20], asked, strict=False):
        assert task.doc_to_text(document) == question.prompt
        assert task.doc_to_choice(document) == list(question.choices)
        assert task.doc_to_target(document) == question.answer
