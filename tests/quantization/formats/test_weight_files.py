"""Weight files: read without residue, refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.core.errors import ModelError
from harness.quantization.formats.weight_files import INDEX, WeightReader


def test_reading(tiny_model: Callable[..., Path]) -> None:
    reader = WeightReader(tiny_model("llama", dtype="bfloat16", shards=3))
    one = reader.read("model.norm.weight", torch.float32)
    assert one.dtype == torch.float32
    many = reader.read_many(reader.names(), torch.bfloat16)
    assert list(many) == list(reader.names()) and torch.equal(
        many["model.norm.weight"].float(), one
    )
    assert set(reader.stored_bits().values()) == {16}


def test_refusals(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="no safetensors file"):
        WeightReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match="pickled weights"):
        WeightReader(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="is not a readable safetensors file"):
        WeightReader(tmp_path)
    with pytest.raises(ModelError, match="no weight file holds nothing"):
        WeightReader(tiny_model("llama")).read("nothing", torch.float32)
    sharded = tiny_model("llama", shards=3)
    listed = json.loads((sharded / INDEX).read_text())["weight_map"]
    gone = sharded / sorted(set(listed.values()))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"missing: {gone.name}"):
        WeightReader(sharded)


def test_a_truncated_file_is_named(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        WeightReader(folder).read("model.norm.weight", torch.float32)
