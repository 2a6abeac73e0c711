"""SpinQuant: learned rotations leave the function of the whole model, lower the rounded model's loss, and stay rotations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import llama_shapes
from small import RTN, cell, content, failures, part, quantize, windows
from torch import Tensor

from harness.core.cell import (
    ActivationScheme,
    KVScheme,
    Method,
    Model,
    Scheme,
    WeightScheme,
    baseline_of,
    quantize_key,
)
from harness.data import model_folders
from harness.quantization.formats.native import Checkpoint, CheckpointWriter
from harness.quantization.inference.load import load
from harness.quantization.methods.spinquant import Transform
from harness.quantization.pipeline import passes

W4 = Scheme("w4", WeightScheme(bits=4))
W3A3 = Scheme("w3a3", WeightScheme(bits=3, symmetric=True), ActivationScheme(bits=3))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def learned_in(folder: Path) -> dict[str, Tensor]:
    held = CheckpointWriter(folder, Checkpoint.open(folder).manifest["fingerprint"]).learned()
    assert held is not None
    return held


def rotations(learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in learned.items() if name != "loss"}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_a_model_with_learned_rotations_keeps_its_logits(
    family: str, tiny_model: Any, tmp_path: Path
) -> None:
    """Grouped queries, biases, tied heads and fused projections among them; through pass, checkpoint and loading."""
    folder = tiny_model(family)
    method = Method("turned", transform=part("spinquant", "transform", steps=2, sequences=2))
    one = dataclasses.replace(cell(folder, method), scheme=W4)
    assert not failures(quantize([one], folder, tmp_path))
    own = learned_in(tmp_path / quantize_key(one))
    for rotation in rotations(own).values():
        assert torch.allclose(
            rotation.T @ rotation, torch.eye(len(rotation), dtype=torch.float64), rtol=0, atol=1e-12
        )
    assert float(own["residual"].abs().std()) > 0, "still a Hadamard matrix: nothing was learned"
    full, _ = load(baseline_of(one), folder, None)
    found, _ = load(one, folder, tmp_path / quantize_key(one))
    with torch.no_grad():
        assert difference(found(windows(2)).logits, full(windows(2)).logits) < 1e-4


def demo_cell(scheme: Scheme, **settings: Any) -> Any:
    model = Model("demo", "demo:activation_outliers", digest="x")
    method = Method(
        "spinquant", part("spinquant", "transform", **settings), part("rtn", grid="awq")
    )
    return dataclasses.replace(
        cell(model_folders.model_folder(model), method), model=model, scheme=scheme
    )


def test_learning_lowers_the_rounded_models_loss(tmp_path: Path) -> None:
    """Three bits everywhere on the demo model with activation outliers: on the text it learned from, and after rounding."""
    folder = model_folders.model_folder(Model("demo", "demo:activation_outliers", digest="x"))
    text = demo_windows(folder)
    losses = {}
    for steps in (0, 4):
        own = demo_cell(W3A3, steps=steps, sequences=4)
        assert not failures(quantize([own], folder, tmp_path, text))
        notes = Checkpoint.open(tmp_path / quantize_key(own)).manifest["notes"]["0"]["learned"]
        model, _ = load(own, folder, tmp_path / quantize_key(own))
        with torch.no_grad():
            logits = model(text).logits[:, :-1].log_softmax(-1)
        losses[steps] = float(-logits.gather(-1, text[:, 1:, None]).mean())
        assert losses[steps] == pytest.approx(notes["loss_after"], rel=0.02), (
            "what is learned against is what is run"
        )
    assert losses[4] < losses[0] - 0.05, losses


def demo_windows(folder: Path) -> Tensor:
    from transformers import AutoTokenizer

    from harness.core.cell import Calibration
    from harness.quantization.calibration import draw_windows

    return draw_windows(
        Calibration("demo", "demo", samples=4, length=128), AutoTokenizer.from_pretrained(folder)
    )


def test_without_rounding_there_is_nothing_to_learn(tiny_model: Any, tmp_path: Path) -> None:
    """The loss does not depend on the rotations then: its gradient is round-off."""
    folder = tiny_model("llama")
    found = []
    for steps in (0, 2):
        transform = part("spinquant", "transform", steps=steps, sequences=2, round_weights=False)
        one = dataclasses.replace(cell(folder, Method("turned", transform=transform)), scheme=W4)
        assert not failures(quantize([one], folder, tmp_path))
        found.append(learned_in(tmp_path / quantize_key(one)))
    for name, start in rotations(found[0]).items():
        assert difference(found[1][name], start) < 1e-4
    assert float(found[1]["loss"][0]) == pytest.approx(float(found[1]["loss"][-1]), abs=1e-5)


def test_a_rounded_cache_alone_moves_the_rotations_of_values(
    tiny_model: Any, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    kv = KVScheme(
        bits=2, group_size=16, residual=0, key_axis="token", value_axis="token", hadamard=True
    )
    found = []
    for steps in (0, 1):
        transform = part("spinquant", "transform", steps=steps, sequences=2, round_weights=False)
        one = dataclasses.replace(
            cell(folder, Method("turned", transform=transform)),
            scheme=dataclasses.replace(W4, kv=kv),
        )
        assert not failures(quantize([one], folder, tmp_path))
        found.append(rotations(learned_in(tmp_path / quantize_key(one))))
    moved = {name: difference(found[1][name], found[0][name]) for name in found[0]}
    assert all(moved[name] > 1e-3 for name in moved if name != "residual"), moved


def test_cells_learn_once_and_as_they_would_alone(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two roundings behind one transform and one scheme; another scheme learns its own rotations; a resumed pass learns nothing."""
    folder = tiny_model("llama")
    transform = part("spinquant", "transform", steps=1, sequences=2)
    cells = [
        dataclasses.replace(cell(folder, method), scheme=scheme)
        for method, scheme in (
            (Method("one", transform, part("rtn")), W4),
            (Method("two", transform, part("gptq")), W4),
            (RTN, W4),
            (Method("one", transform, part("rtn")), W3A3),
        )
    ]
    calls: list[Scheme] = []
    learn = Transform.learn

    def counted(self: Transform, model: Any, scheme: Scheme, rng: torch.Generator) -> Any:
        calls.append(scheme)
        return learn(self, model, scheme, rng)

    monkeypatch.setattr(Transform, "learn", counted)
    assert not failures(quantize(cells, folder, tmp_path / "together"))
    assert calls == [W4, W3A3]
    for one in cells:
        assert not failures(quantize([one], folder, tmp_path / "alone"))
        key = quantize_key(one)
        assert content(tmp_path / "alone" / key) == content(tmp_path / "together" / key)
    calls.clear()
    quantize(cells[:1], folder, tmp_path / "resumed", stop_after=2)
    quantize(cells[:1], folder, tmp_path / "resumed")
    key = quantize_key(cells[0])
    assert len(calls) == 1 and content(tmp_path / "resumed" / key) == content(
        tmp_path / "alone" / key
    )


def test_a_learning_that_fails_takes_its_cells_out_and_no_other(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    cells = [
        dataclasses.replace(cell(folder, method), scheme=W4)
        for method in (
            Method("turned", part("spinquant", "transform", steps=1, sequences=1), part("rtn")),
            RTN,
        )
    ]
    monkeypatch.setattr(passes.StreamedModel, "gradients", lambda *_: float("nan"))
    (failed,) = failures(quantize(cells, folder, tmp_path))
    assert failed.stage == "learning" and "lower the rate" in failed.reason
    assert Checkpoint.open(tmp_path / quantize_key(cells[1])).manifest["blocks"] == 3


@pytest.mark.parametrize(
    ("change", "scheme", "reason"),
    [
        ({"rotations": False}, W3A3, "does not allow rotations"),
        ({"experts": 8}, W3A3, "experts"),
        ({"hidden_size": 30}, W3A3, "no Hadamard matrix"),
        (
            {},
            dataclasses.replace(
                W3A3, activation=ActivationScheme(granularity="tensor", dynamic=False)
            ),
            "static",
        ),
        (
            {},
            dataclasses.replace(W3A3, activation=ActivationScheme(format="fp8_e4m3")),
            "no gradient",
        ),
        ({}, Scheme("nf4", WeightScheme("nf4", 4, 16)), "nf4"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_the_plan(
    change: dict[str, Any], scheme: Scheme, reason: str
) -> None:
    (found,) = Transform(Transform.Settings()).check(
        scheme, dataclasses.replace(llama_shapes(), **change)
    )
    assert reason in found


@pytest.mark.parametrize(
    "settings",
    [{"steps": -1}, {"sequences": 0}, {"rate": 0.0}, {"grid": "hqq"}, {"rotation_seed": -1}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings)) + "|grid"):
        Transform.Settings(**settings)
