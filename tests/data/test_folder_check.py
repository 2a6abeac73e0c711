"""What a model folder says of itself: config.json, tokenizer, adapters, stored quantization."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import ModelError
from harness.data import folder_check
from harness.data.demo.variants import SHIPPED


def config(folder: Path, **changes: Any) -> None:
    content = json.loads((SHIPPED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    "text,facts",
    [
        ("[1]", ["[1]", "object"]),
        ('"x"', ["object"]),
        ("{", ["Expecting"]),
        ('\ufeff{"model_type": "llama"}', ["BOM"]),
        ("[" * 100_000, ["config"]),
        ("version https://git-lfs.github.com/spec/v1\noid x\n", ["Git LFS", "lfs pull"]),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str, facts: list[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as error:
        folder_check.read_config(tmp_path)
    assert all(fact in str(error.value) for fact in (*facts, str(tmp_path / "config.json")))


@pytest.mark.parametrize(
    "changes,facts",
    [
        ({"rope_theta": float("nan")}, ["rope_theta", "NaN"]),
        ({"rope_parameters": {"factor": [1.0, float("nan")]}}, ["rope_parameters.factor[1]"]),
        ({"hidden_size": "64"}, ["hidden_size", '"64"']),
        ({"hidden_size": True}, ["hidden_size", "true"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "1000000000"]),
        ({"text_config": {"vocab_size": -1}}, ["text_config.vocab_size", "-1"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ({"transformers_weights": "other.safetensors"}, ["other.safetensors"]),
        (
            {"hidden_size": 0, "vocab_size": 1.5, "rms_norm_eps": float("nan")},
            ["hidden_size", "vocab_size", "rms_norm_eps"],
        ),
    ],
)
def test_values_that_cannot_be_meant_are_named(
    tmp_path: Path, changes: dict[str, Any], facts: list[str]
) -> None:
    config(tmp_path, **changes)
    with pytest.raises(ModelError) as error:
        folder_check.read_config(tmp_path)
    assert all(fact in str(error.value) for fact in (*facts, "config.json"))


@pytest.mark.parametrize(
    "method",
    ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq", "mxfp4", "none of these"],
)
def test_stored_quantization_is_refused_by_name(tmp_path: Path, method: str) -> None:
    for changes in (
        {"quantization_config": {"quant_method": method}},
        {"text_config": {"quantization_config": {"quant_method": method}}},
    ):
        config(tmp_path, **changes)
        with pytest.raises(ModelError) as error:
            folder_check.read_config(tmp_path)
        assert method in str(error.value) and "quantization_config" in str(error.value)
        assert "full-precision" in str(error.value)
    config(tmp_path, quantization_config=None)
    assert folder_check.read_config(tmp_path)["model_type"] == "llama"


def copy(folder: Path) -> Path:
    for path in SHIPPED.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    "spoil,fact",
    [
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("[1]"), "tokenizer_config.json"),
        (
            lambda f: (f / "tokenizer.json").write_text(
                "version https://git-lfs.github.com/spec/v1"
            ),
            "Git LFS",
        ),
        (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter"),
    ],
)
def test_files_beside_the_weights_are_looked_at(
    tmp_path: Path, spoil: Callable[[Path], object], fact: str
) -> None:
    folder = copy(tmp_path)
    assert folder_check.look(folder).faults == () and folder_check.is_complete(folder)
    spoil(folder)
    (fault,) = folder_check.look(folder).faults
    assert fact in fault and str(tmp_path) in fault


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert folder_check.look(folder).faults == ()


def test_all_faults_of_a_folder_stand_together(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "config.json").write_text("[1]")
    (folder / "tokenizer.json").unlink()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    text = "\n".join(folder_check.look(folder).faults)
    assert all(fact in text for fact in ("config.json", "no tokenizer", "truncated"))


def test_the_context_is_that_of_the_language_part() -> None:
    assert folder_check.context_length({"n_positions": 1024}) == 1024
    inner = {"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 8}
    assert folder_check.context_length(inner) == 64
    assert folder_check.context_length({"max_position_embeddings": "64"}) is None
