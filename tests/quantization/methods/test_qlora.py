"""QLoRA and what the adapter methods share: from a base through training, storing and loading, and back from a kill."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import generator, llama_shapes
from small import cell, part, quantize, windows
from torch import nn

from harness.core import plugins
from harness.core.cell import Cell, Method, Scheme, WeightScheme, quantize_key, untuned
from harness.core.errors import ConfigError, DataError
from harness.core.events import Quantized
from harness.quantization.formats.native import Checkpoint, CheckpointWriter
from harness.quantization.inference.load import load
from harness.quantization.numerics.adapters import AdaptedWeight
from harness.quantization.numerics.training import Document
from harness.quantization.pipeline.tuning import LanguageModel, run_tuning

SMALL: dict[str, Any] = {
    "rank": 4,
    "steps": 30,
    "batch": 4,
    "rate": 0.005,
    "prompt_length": 8,
    "answer_length": 24,
}
BASES = {"qlora": "rtn", "ir_qlora": "ir_qlora", "qa_lora": "gptq"}
TEXTS = [Document(tokens, 6) for tokens in windows(4, 24)]


def adapted(
    folder: Path, name: str = "qlora", rounding: str = "", bits: int = 3, **settings: Any
) -> Cell:
    method = Method(
        name,
        rounding=part(rounding or BASES[name]),
        tuning=part(name, "tuning", **{**SMALL, **settings}),
    )
    return cell(folder, method, bits, 32)


def tune(c: Cell, folder: Path, store: Path) -> dict[str, Any]:
    base = untuned(c)
    if not (store / quantize_key(base) / "manifest.json").exists():
        quantize([base], folder, store)
    writer = CheckpointWriter(store / quantize_key(c), {"quantize_key": quantize_key(c)})
    *_, last = run_tuning(c, folder, store / quantize_key(base), TEXTS, writer)
    assert isinstance(last, Quantized)
    return dict(last.record)


def loaded(c: Cell, folder: Path, store: Path, mode: str = "dense") -> nn.Module:
    return load(c, folder, store / quantize_key(c), mode=mode)[0]


@torch.no_grad()
def loss(model: nn.Module) -> float:
    logits = LanguageModel(model, "cpu").logits(windows(4, 24))
    return float(
        nn.functional.cross_entropy(logits[:, 5:-1].flatten(0, 1), windows(4, 24)[:, 6:].flatten())
    )


@pytest.mark.parametrize("name", sorted(BASES))
def test_what_is_loaded_is_what_was_trained(
    tiny_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = tiny_model("llama")
    exact = {"zero_dtype": "float32"} if name == "qa_lora" else {"adapter_dtype": "float32"}
    c = adapted(folder, name, **exact)
    record = tune(c, folder, tmp_path)
    notes = record["tuning"]
    assert notes["loss"][-1] < notes["loss"][0] and notes["documents"] == notes["with_prompt"] == 4
    before, after = loss(loaded(untuned(c), folder, tmp_path)), loss(loaded(c, folder, tmp_path))
    assert after < before and after < notes["loss"][0]
    assert notes["loss"][-1] == pytest.approx(after, rel=0.3), "the loaded model is the trained one"
    again, packed = loaded(c, folder, tmp_path), loaded(c, folder, tmp_path, "packed")
    with torch.no_grad():
        first = loaded(c, folder, tmp_path)(windows(2, 24)).logits
        assert torch.equal(first, again(windows(2, 24)).logits) and torch.equal(
            first, packed(windows(2, 24)).logits
        )


@pytest.mark.parametrize("name", sorted(BASES))
def test_no_steps_leave_the_base(
    tiny_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = tiny_model("llama")
    c = adapted(folder, name, steps=0)
    tune(c, folder, tmp_path)
    base, tuned = (Checkpoint.open(tmp_path / quantize_key(each)) for each in (untuned(c), c))
    for index in range(3):
        for linear, weight in base.block(index).weights.items():
            assert torch.equal(weight.dequantize(), tuned.block(index).weights[linear].dequantize())


def test_adapters_are_stored_beside_their_base_and_counted(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    c = adapted(folder, linears=["q_proj", "down_proj"])
    record = tune(c, folder, tmp_path)
    base, tuned = (Checkpoint.open(tmp_path / quantize_key(each)) for each in (untuned(c), c))
    numbers = extra = 0
    for index in range(3):
        for name, weight in tuned.block(index).weights.items():
            held = base.block(index).weights[name]
            if name.endswith(("q_proj", "down_proj")):
                assert isinstance(weight, AdaptedWeight) and torch.equal(
                    weight.base.dequantize(), held.dequantize()
                )
                assert weight.down.shape == (4, held.shape[1]) and weight.up.shape == (
                    held.shape[0],
                    4,
                )
                numbers += 4 * sum(held.shape)
                extra += 2 * 4 * sum(held.shape)
            else:
                assert weight.kind == held.kind and torch.equal(
                    weight.dequantize(), held.dequantize()
                )
    assert record["tuning"]["trained_parameters"] == numbers
    bytes_of = [
        sum(entry["bytes"] for entry in checkpoint.manifest["linears"])
        for checkpoint in (base, tuned)
    ]
    assert bytes_of[1] - bytes_of[0] == extra
    assert (
        tuned.manifest["calibration"]["documents"] == 4
        and len(tuned.manifest["calibration"]["documents_sha256"]) == 64
    )


def test_the_layout_of_the_base_is_found_by_a_process_that_never_saw_it(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    import subprocess

    folder = tiny_model("llama")
    tuning = part("ir_qlora", "tuning", **{**SMALL, "steps": 1})
    method = Method("ir_qlora", rounding=part("ir_qlora", shift_steps=2), tuning=tuning)
    scheme = Scheme("nf4g32", WeightScheme("nf4", 4, 32, scale_dtype="float32"))
    c = dataclasses.replace(cell(folder, method), scheme=scheme)
    tune(c, folder, tmp_path)
    code = (
        "import sys; from pathlib import Path; from harness.quantization.formats.native import Checkpoint; "
        "print(Checkpoint.open(Path(sys.argv[1])).block(0).weights['self_attn.q_proj'].contained[0].kind)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / quantize_key(c))],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "shifted", done.stderr


def test_a_killed_tuning_starts_again_from_its_base(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    c = adapted(folder)
    quantize([untuned(c)], folder, tmp_path)
    writer = CheckpointWriter(tmp_path / quantize_key(c), {"quantize_key": quantize_key(c)})
    walk = run_tuning(c, folder, tmp_path / quantize_key(untuned(c)), TEXTS, writer)
    next(walk)
    walk.close()
    assert not (tmp_path / quantize_key(c) / "manifest.json").exists()
    tune(c, folder, tmp_path)
    tune(c, folder, tmp_path / "undisturbed")
    for index in range(3):
        name = f"{quantize_key(c)}/block-{index:05}.safetensors"
        assert (tmp_path / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_the_seed_is_part_of_the_numbers(tiny_model: Callable[..., Path]) -> None:
    c = adapted(tiny_model("llama"))
    assert quantize_key(c) != quantize_key(dataclasses.replace(c, seed=1))
    assert quantize_key(untuned(c)) == quantize_key(untuned(dataclasses.replace(c, seed=1))), (
        "its base is shared"
    )


def test_nothing_to_learn_from_is_said(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    c = adapted(folder)
    quantize([untuned(c)], folder, tmp_path)
    with pytest.raises(DataError, match="no text to train on"):
        list(
            run_tuning(
                c,
                folder,
                tmp_path / quantize_key(untuned(c)),
                [],
                CheckpointWriter(tmp_path / "tuned", {}),
            )
        )


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_linear_that_is_not_there_is_refused(name: str) -> None:
    method = plugins.build("tuning", name, {"linears": ["q_proj", "up_prj"]})
    reasons = method.check(Scheme("w4g16", WeightScheme("int", 4, 16)), llama_shapes())
    assert len(reasons) == 1 and "up_prj" in reasons[0] and "up_proj" in reasons[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"steps": -1},
        {"batch": 0},
        {"rate": 0.0},
        {"dropout": 1.0},
        {"clip": -1.0},
        {"adapter_dtype": "float8"},
        {"linears": [["q_proj"]]},
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plugins.build("tuning", "qlora", settings)


def test_only_named_linears_get_adapters() -> None:
    method = plugins.build("tuning", "qlora", {"linears": ["q_proj"], "rank": 2})
    weight = plugins.build("rounding", "rtn", {}).round_layer(
        "q", torch.ones(4, 32), None, WeightScheme("int", 4, 32), generator()
    )
    counts = [
        len(list(method.linear(name, weight, None, None).parameters()))
        for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert counts == [2, 0]
