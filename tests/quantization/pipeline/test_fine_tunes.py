"""Cells that store a fine-tune's difference from its base, through a pass: bytes, sizes, the base that is read again, resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_cell import base_for
from safetensors.torch import load_file, save_file
from small import cell, failures, part, quantize, windows

from harness.core.cell import Cell, Method, Model, WeightScheme, base_of, quantize_key, untuned
from harness.core.errors import MethodError, StoreError
from harness.core.events import Failed
from harness.data.model_folders import model_digest
from harness.quantization.formats.base_model import BaseModel
from harness.quantization.formats.native import Checkpoint, CheckpointWriter
from harness.quantization.inference.load import load
from harness.quantization.numerics.deltas import DeltaWeight
from harness.quantization.pipeline.passes import run_pass
from harness.quantization.pipeline.tuning import run_tuning

PLAN = {"groups": [[8, 1], [2, 0]]}
SIGN = WeightScheme("sign", 1, -1, True)
BUDGET = WeightScheme("delta", 2, 32)


def fine_tune(
    folder: Path,
    base: Path,
    name: str,
    scheme: WeightScheme,
    tuning: str = "",
    reference: bool = False,
    **settings: object,
) -> Cell:
    method = Method(
        name,
        rounding=part(name, **settings),
        tuning=part(
            tuning,
            "tuning",
            steps=12,
            batch=2,
            length=12,
            rate=0.0002,
            reference_parameters=reference,
        )
        if tuning
        else None,
    )
    made = cell(folder, method)
    model = dataclasses.replace(
        made.model,
        base=str(base),
        base_digest=model_digest(str(base)),
        digest=model_digest(str(folder)),
    )
    return dataclasses.replace(
        made, model=model, scheme=dataclasses.replace(made.scheme, weight=scheme)
    )


@pytest.fixture
def pair(tiny_model: Callable[..., Path]) -> tuple[Path, Path]:
    folder = tiny_model("llama", num_hidden_layers=2)
    return folder, base_for(folder)


def cells(folder: Path, base: Path) -> list[Cell]:
    return [
        fine_tune(folder, base, "low_rank_delta", BUDGET),
        fine_tune(folder, base, "delta_gptq", WeightScheme("int", 4, 32)),
        fine_tune(folder, base, "bitdelta", SIGN),
        fine_tune(folder, base, "delta_come", BUDGET, **PLAN),
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"
    }


def test_a_cell_alone_has_the_bytes_of_a_cell_in_company(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    known = cells(*pair)
    quantize(known, pair[0], tmp_path / "together")
    for each in known:
        quantize([each], pair[0], tmp_path / "alone")
        key = quantize_key(each)
        assert files(tmp_path / "alone" / key) == files(tmp_path / "together" / key)


def test_the_manifest_states_the_base_and_what_one_more_model_costs(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """The final norm and a norm of block 1 differ: they are counted, all other tensors outside the matrices cost nothing."""
    folder, base = pair
    changed = load_file(folder / "model.safetensors")
    changed["model.norm.weight"] += 0.5
    changed["model.layers.1.input_layernorm.weight"] += 0.5
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    own = fine_tune(folder, base, "bitdelta", SIGN)
    quantize([own], folder, tmp_path)
    manifest = json.loads((tmp_path / quantize_key(own) / "manifest.json").read_text())
    delta = manifest["delta"]
    assert manifest["base"] == {
        "digest": own.model.base_digest,
        "source": str(base),
        "dtype": "float32",
    }
    stored = sum(entry["bytes"] for entry in manifest["linears"])
    assert delta["bytes"] == stored and delta["ends_bytes"] == 2 * 64 * 4
    whole = sum(tensor.numel() * 4 for tensor in changed.values())
    assert delta["ratio"] == pytest.approx(whole / (stored + 2 * 64 * 4))
    assert manifest["stored_bytes"] == stored + 2 * 64 * 4
    assert delta["base_bits_per_weight"] == 32
    assert all(entry["delta_error"] < 1 for entry in manifest["layer_errors"])


def test_a_loaded_model_is_base_and_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = pair
    own = fine_tune(folder, base, "delta_come", BUDGET, **PLAN)
    quantize([own], folder, tmp_path)
    place = tmp_path / quantize_key(own)
    dense, _ = load(own, folder, place)
    packed, _ = load(own, folder, place, mode="packed")
    tokens = windows(1, 20)
    with torch.no_grad():
        logits = dense(tokens).logits
        assert torch.equal(packed(tokens).logits, logits)
        thin, _ = load(own, folder, place, mode="native:thin_products")
        largest = float(logits.abs().max())
        assert torch.allclose(thin(tokens).logits, logits, atol=1e-5 * largest)
    named = base_of(own.model)
    assert named is not None
    below = BaseModel.of(own).matrices(1)
    content = Checkpoint.open(place).block(1)
    for name, weight in content.weights.items():
        assert isinstance(weight, DeltaWeight) and weight.base is None
        expected = below[name] + weight.change.dequantize()
        module = dense.model.layers[1].get_submodule(name)
        assert torch.equal(module.weight, expected)


def test_another_base_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = pair
    own = fine_tune(folder, base, "bitdelta", SIGN)
    quantize([own], folder, tmp_path)
    place = tmp_path / quantize_key(own)
    other = dataclasses.replace(
        own,
        model=dataclasses.replace(
            own.model, base=str(folder), base_digest=model_digest(str(folder))
        ),
    )
    with pytest.raises(StoreError, match=f"holds differences from {base}.*set model.base={base}"):
        load(other, folder, place)
    assert quantize_key(other) != quantize_key(own)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreError, match="its files have changed"):
        load(own, folder, place)


def test_a_pass_reads_its_base_again_when_it_goes_on(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, base = pair
    known = cells(folder, base)
    quantize(known, folder, tmp_path / "whole")
    place = tmp_path / "killed"
    quantize(known, folder, place, stop_after=1)
    assert not (place / quantize_key(known[0]) / "block-00001.json").exists()
    assert not failures(quantize(known, folder, place))
    for c in known:
        for name in ("block-00000.safetensors", "block-00001.safetensors"):
            again = (place / quantize_key(c) / name).read_bytes()
            assert again == (tmp_path / "whole" / quantize_key(c) / name).read_bytes()


def test_without_a_base_only_the_cells_that_need_one_fail(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, base = pair
    own = fine_tune(folder, base, "bitdelta", SIGN)
    bare = dataclasses.replace(own, model=dataclasses.replace(own.model, base="", base_digest=""))
    with pytest.raises(MethodError, match=r"names no base; set model\.base"):
        BaseModel.of(bare)
    writer = CheckpointWriter(tmp_path / "x", {"quantize_key": quantize_key(bare)})
    events = list(run_pass([bare], folder, None, {quantize_key(bare): writer}))
    assert [event.reason for event in events if isinstance(event, Failed)]


def test_scales_are_trained_towards_the_fine_tune(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = pair
    own = fine_tune(folder, base, "bitdelta", SIGN, tuning="bitdelta")
    start = untuned(own)
    quantize([start], folder, tmp_path)
    place = tmp_path / quantize_key(own)
    writer = CheckpointWriter(place, {"quantize_key": quantize_key(own)})
    list(run_tuning(own, folder, tmp_path / quantize_key(start), windows(12, 24), writer))
    manifest = json.loads((place / "manifest.json").read_text())
    before = Checkpoint.open(tmp_path / quantize_key(start)).block(0).weights
    after = Checkpoint.open(place).block(0).weights
    moved = 0
    for name, weight in after.items():
        one, other = weight, before[name]
        assert isinstance(one, DeltaWeight) and isinstance(other, DeltaWeight)
        assert torch.equal(one.change.signs, other.change.signs)  # type: ignore[attr-defined]
        moved += not torch.equal(one.change.alpha, other.change.alpha)  # type: ignore[attr-defined]
    assert moved == len(after)
    assert manifest["base"]["digest"] == own.model.base_digest
    assert manifest["delta"]["bytes"] == sum(entry["bytes"] for entry in manifest["linears"])
    losses = manifest["tuning"]["loss"]
    assert losses[-1] < losses[0] and manifest["tuning"]["negative_scales"] == 0
    assert manifest["tuning"]["trained_parameters"] == len(manifest["linears"])


def test_all_parameters_are_trained_and_stored_as_in_the_authors_code(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, base = pair
    own = fine_tune(folder, base, "bitdelta", SIGN, tuning="bitdelta", reference=True)
    start = untuned(own)
    quantize([start], folder, tmp_path)
    place = tmp_path / quantize_key(own)
    writer = CheckpointWriter(place, {"quantize_key": quantize_key(own)})
    list(run_tuning(own, folder, tmp_path / quantize_key(start), windows(12, 24), writer))
    checkpoint, source = Checkpoint.open(place), load_file(folder / "model.safetensors")
    assert set(checkpoint.ends()) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert set(checkpoint.block(1).dense) == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    matrices = {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in checkpoint.block(0).weights}
    rest = sum(tensor.numel() * 4 for name, tensor in source.items() if name not in matrices)
    assert checkpoint.manifest["delta"]["ends_bytes"] == rest
    model, _ = load(own, folder, place)
    head = model.lm_head.weight
    assert torch.equal(head, checkpoint.ends()["lm_head.weight"])
    assert not torch.equal(head, source["lm_head.weight"])


def test_a_base_has_no_part_in_keys_of_other_methods() -> None:
    with_base = Model("m", "m", digest="d", base="b", base_digest="e")
    without = Model("m", "m", digest="d")
    rtn = Method("rtn", rounding=part("rtn"))
    delta = Method("bitdelta", rounding=part("bitdelta"))
    some = cell(Path("m"), rtn)
    keys = {
        quantize_key(dataclasses.replace(some, method=method, model=model))
        for method in (rtn, delta)
        for model in (with_base, without, dataclasses.replace(with_base, base="another name"))
    }
    assert len(keys) == 3  # rtn's; BitDelta's with this base, whatever its name; BitDelta's without
