"""The native checkpoint: what is written is read back exactly, and nothing half-written looks finished."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.core.errors import StoreError
from harness.quantization.formats.native import Checkpoint, CheckpointWriter
from harness.quantization.numerics.grids import fit
from harness.quantization.numerics.weights import DenseWeight, UniformWeight

FINISH = {"parameters": 1000, "unquantized_bits": 3200}


def weights(seed: int = 0) -> dict[str, UniformWeight | DenseWeight]:
    values = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
    groups = values.reshape(16, 4, 8)
    grid = fit(groups, 3, False, scale_dtype="float16")
    return {
        "self_attn.q_proj": UniformWeight.from_grid(
            grid.quantize(groups), grid, symmetric=False, scale_dtype="float16"
        ),
        "mlp.down_proj": DenseWeight(values.to(torch.bfloat16)),
    }


def test_round_trip(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {"key": "k"})
    dense = {"input_layernorm.weight": torch.randn(32)}
    for index in range(2):
        report = {"linears": {"mlp.down_proj": {"weight_error": 0.5}}, "notes": {"alpha": 1}}
        writer.write_block(index, weights(index), dense, report)
    writer.write_ends({"lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(StoreError, match="not complete"):
        Checkpoint.open(tmp_path)
    manifest = writer.finish({**FINISH, "seconds": 1.5})
    stored = Checkpoint.open(tmp_path)
    assert stored.manifest == manifest and manifest["seconds"] == 1.5 and manifest["blocks"] == 2
    for index in range(2):
        content = stored.block(index)
        for name, weight in weights(index).items():
            assert torch.equal(content.weights[name].dequantize(), weight.dequantize())
        assert torch.equal(content.dense["input_layernorm.weight"], dense["input_layernorm.weight"])
    assert torch.equal(stored.ends()["lm_head.weight"], torch.ones(2, 2))
    assert manifest["layer_errors"][0] == {
        "block": 0,
        "linear": "mlp.down_proj",
        "weight_error": 0.5,
    }
    assert manifest["notes"]["1"] == {"alpha": 1}
    packed = sum(weight.stored_bytes for weight in weights().values())
    assert manifest["bits_per_weight"] == 8 * packed / (2 * 16 * 32)
    assert manifest["stored_bytes"] == 2 * packed + 400


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        CheckpointWriter(tmp_path / name, {}).write_block(0, weights(), {}, {})
    one, other = (
        (tmp_path / name / "block-00000.safetensors").read_bytes() for name in ("one", "other")
    )
    assert one == other


def test_a_block_counts_when_its_json_is_there(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {})
    assert writer.finished_blocks() == 0
    for index in range(3):
        writer.write_block(index, weights(), {}, {})
    (tmp_path / "block-00001.json").unlink()
    (tmp_path / ".block-00009.json.1.aside").write_text("{")
    assert CheckpointWriter(tmp_path, {}).finished_blocks() == 1


def test_a_damaged_description_of_a_block_is_noticed(tmp_path: Path) -> None:
    """It says how codes become weights: a changed shape or constant would be another model."""
    writer = CheckpointWriter(tmp_path, {})
    writer.write_block(0, weights(), {}, {"notes": {"alpha": 1}})
    manifest = writer.finish(FINISH)
    path = tmp_path / "block-00000.json"
    path.write_text(path.read_text().replace('"alpha": 1', '"alpha": 2'))
    with pytest.raises(StoreError, match=r"block-00000\.json: is damaged.*SHA-256"):
        Checkpoint.open(tmp_path).block(0)
    del manifest["files"]["block-00000.json"]  # as manifests were before
    assert Checkpoint(tmp_path, manifest).block(0).report == {"notes": {"alpha": 2}}


def test_unknown_layouts_and_versions(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {})
    writer.write_block(0, weights(), {}, {})
    path = tmp_path / "block-00000.json"
    path.write_text(
        path.read_text()
        .replace('"uniform"', '"from_elsewhere"')
        .replace('"weights"', '"elsewhere"')
    )
    writer.finish(FINISH)
    with pytest.raises(StoreError, match='"from_elsewhere" is defined in "elsewhere"'):
        Checkpoint.open(tmp_path).block(0)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(StoreError, match="version 99"):
        Checkpoint.open(tmp_path)
    manifest.write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        Checkpoint.open(tmp_path)


def test_layouts_that_methods_share_are_found_in_a_fresh_process(tmp_path: Path) -> None:
    """Whoever reads a checkpoint has not imported the method that wrote it."""
    command = (
        "from pathlib import Path; from harness.quantization.formats.native import _kind; "
        "print(_kind('dual_binary', 'dual_binary', Path('x')).__name__)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=False
    )
    assert shown.stdout.strip() == "DualBinaryWeight", shown.stderr
