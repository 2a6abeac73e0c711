"""Which weight files count, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness.core.errors import ModelError
from harness.data.safetensors_headers import (
    INDEX,
    SINGLE,
    look_at_weights,
    read_header,
    summary,
    weight_files,
)

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(path: Path, *names: str, value: float = 1.0) -> None:
    save_file({name: np.full((2, 3), value, np.float32) for name in names}, path)


def sharded(folder: Path, **index: object) -> None:
    write(folder / FIRST, "a")
    write(folder / SECOND, "b")
    content = {"metadata": {}, "weight_map": {"a": FIRST, "b": SECOND}} | index
    (folder / INDEX).write_text(json.dumps(content))


def faults(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        weight_files(folder)
    return str(error.value)


def test_model_safetensors_precedes_an_index_and_all_others(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, "a", "c")
    for name in ("another.safetensors", "zz.safetensors", "consolidated.safetensors"):
        write(tmp_path / name, "a", value=2.0)
    sharded(tmp_path)
    found = weight_files(tmp_path)
    assert found.files == (tmp_path / SINGLE,) and sorted(found.tensors) == ["a", "c"]
    assert len(found.ignored) == 5
    stored = found.tensors["a"]
    assert (stored.dtype, stored.shape, stored.bytes) == ("F32", (2, 3), 24)


def test_shards_are_those_of_the_index_and_names_those_of_the_headers(tmp_path: Path) -> None:
    sharded(tmp_path, weight_map={"a": SECOND, "b": FIRST})
    write(tmp_path / "old.safetensors", "a", value=2.0)
    found = weight_files(tmp_path)
    assert found.tensors["a"].file.name == FIRST and found.ignored == ("old.safetensors",)


@pytest.mark.parametrize(
    "spoil,facts",
    [
        (lambda f: (f / SECOND).unlink(), [SECOND, "missing", "download"]),
        (
            lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-4]),
            [SECOND, "truncated", "download"],
        ),
        (lambda f: (f / SECOND).write_bytes(b"\x90" + bytes(40)), [SECOND, "download"]),
        (
            lambda f: (f / SECOND).write_text(
                "version https://git-lfs.github.com/spec/v1\noid x\n"
            ),
            [SECOND, "Git LFS", "lfs pull"],
        ),
        (lambda f: (f / INDEX).unlink(), [INDEX, "missing", "download"]),
        (lambda f: (f / INDEX).write_text("[1]"), [INDEX, "list", "download"]),
        (lambda f: (f / INDEX).write_text("{"), [INDEX, "download"]),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), [INDEX, "no file", "metadata"]),
        (lambda f: write(f / SECOND, "a", "b"), [FIRST, SECOND, "both hold a", "remove"]),
    ],
)
def test_faults_name_file_and_remedy(
    tmp_path: Path, spoil: Callable[[Path], object], facts: list[str]
) -> None:
    sharded(tmp_path)
    spoil(tmp_path)
    text = faults(tmp_path)
    assert all(fact in text for fact in (*facts, str(tmp_path))), text


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / FIRST).unlink()
    (tmp_path / SECOND).write_bytes(b"no weights")
    found = look_at_weights(tmp_path)
    assert found.absent and FIRST in found.faults[0] and SECOND in found.faults[1]


def test_other_names_alone_are_no_weights(tmp_path: Path) -> None:
    write(tmp_path / "weights.safetensors", "a")
    assert "weights.safetensors" in faults(tmp_path) and SINGLE in faults(tmp_path)


def test_headers_of_odd_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    for header in (b"[1]", b"{}x", b'{"a": 1}', b'{"a": {"data_offsets": [0, 0]}}', b"\xff\xfe{}"):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ModelError, match=SINGLE):
            read_header(path)


def test_names_are_gathered() -> None:
    names = [f"m.layers.{i}.q.bias" for i in (0, 1, 2, 5)] + ["head.w{}", "norm"]
    assert summary(names) == "m.layers.0-2,5.q.bias, head.w{}, norm"
    assert summary(names, most=1) == "m.layers.0-2,5.q.bias and 2 more kinds"
