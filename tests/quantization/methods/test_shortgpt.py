"""ShortGPT: which blocks it removes where that is known, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from evidence import llama_shapes
from reductions import logits, reduce, reducing
from safetensors.torch import load_file, save_file

from harness.core import plugins
from harness.quantization.methods.reducing import check_blocks, cosines, without_blocks


def edited(folder: Path, **factors: float) -> Path:
    """The model with the output projections of some blocks scaled: block_1=0.0."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        for block, factor in factors.items():
            number = block.removeprefix("block_")
            if f"layers.{number}." in name and ("o_proj" in name or "down_proj" in name):
                tensor *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_block_that_changes_nothing_goes_first(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, windows = edited(tiny_model(), block_1=0.0), small.windows()
    record = reduce(folder, tmp_path / "made", reducing("shortgpt", blocks=1), windows)
    assert record["choice"]["dropped"] == [1]
    assert record["choice"]["influence"][1] == pytest.approx(0, abs=1e-6)
    assert all(-1e-6 <= value <= 2 for value in record["choice"]["influence"])
    torch.testing.assert_close(
        logits(tmp_path / "made", windows), logits(folder, windows), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("measure", ["cosine", "angular"])
def test_the_order_of_the_texts_does_not_matter(
    measure: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, windows = edited(tiny_model(num_hidden_layers=4), block_2=0.1), small.windows()
    method = reducing("shortgpt", blocks=2, measure=measure)
    one = reduce(folder, tmp_path / "one", method, windows)["choice"]
    other = reduce(folder, tmp_path / "other", method, windows.flip(0))["choice"]
    assert one["dropped"] == other["dropped"] and 2 in one["dropped"]
    assert one["influence"] == pytest.approx(other["influence"], abs=1e-6)
    if measure == "angular":
        assert one["dropped"][1] == one["dropped"][0] + 1 and len(one["influence"]) == 3


def test_protected_blocks_stay(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(tiny_model(), block_1=0.0)
    method = reducing("shortgpt", blocks=1, protect=(1,))
    assert 1 in reduce(folder, tmp_path / "made", method, small.windows())["choice"]["kept"]


def test_a_zero_vector_counts_as_a_cosine_of_one_half() -> None:
    one, zero = torch.ones(2, 3), torch.zeros(2, 3)
    assert cosines(one, zero).tolist() == [0.5, 0.5]
    assert cosines(one, -7 * one).tolist() == pytest.approx([-1, -1])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "nothing says how many blocks"),
    "all": ({"blocks": 2}, "2 of 2 blocks would be removed"),
    "none": ({"drop": (5,)}, "name blocks 0 to 1"),
    "both": ({"drop": (1,), "protect": (1,)}, "named in drop and in protect"),
    "too many": ({"blocks": 1, "protect": (0, 1)}, "and 0 that are not protected"),
    "no run": ({"blocks": 2, "protect": (1,), "measure": "angular"}, "no 2 without a protected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_plan_refuses_with_the_reason(case: str) -> None:
    settings, reason = REFUSED[case]
    built = plugins.build("reduction", "shortgpt", settings)
    shapes = dataclasses.replace(llama_shapes(), blocks=3 if case == "no run" else 2)
    found = built.check(shapes, {"num_hidden_layers": shapes.blocks})
    assert any(reason in each for each in found), found


def test_the_share_is_rounded_to_the_nearest_number() -> None:
    def left(share: float, blocks: int) -> int:
        built = plugins.build("reduction", "shortgpt", {"share": share})
        found: int = built.config({"num_hidden_layers": blocks})["num_hidden_layers"]
        return found

    assert left(0.28, 32) == 23  # 8.96: nine of 32, as published for Llama-2-7B
    assert left(0.25, 2) == 1 and left(0.01, 32) == 31


def configs() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A config of four blocks, and what dropping blocks 0 and 2 leaves of it."""
    types = ["full", "sliding", "chunked", "linear"]
    yield {"layer_types": types}, {"layer_types": ["sliding", "linear"]}
    yield {"mlp_only_layers": [1, 2]}, {"mlp_only_layers": [0]}
    yield {"mlp_only_layers": [0, 1, 2, 3]}, {"mlp_only_layers": [0, 1]}
    yield {"max_window_layers": 2}, {"max_window_layers": 1}
    yield {"eos_token_id": [1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4]}


@pytest.mark.parametrize(("before", "after"), list(configs()))
def test_what_a_config_says_by_block_is_cut(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert without_blocks({"num_hidden_layers": 4, **before}, [1, 3]) == {
        "num_hidden_layers": 2,
        **after,
    }
    nested = without_blocks({"text_config": {"num_hidden_layers": 4, **before}}, [1, 3])
    assert nested["text_config"] == {"num_hidden_layers": 2, **after}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace"),
        ({"sliding_window_pattern": 6}, "every 6 blocks"),
        ({"use_sliding_window": True}, "max_window_layers"),
    ],
)
def test_patterns_by_the_index_of_a_block_are_refused(fields: dict[str, Any], name: str) -> None:
    assert any(name in reason for reason in check_blocks({"num_hidden_layers": 4, **fields}))
    listed = {"num_hidden_layers": 4, "layer_types": ["a"] * 4, "sliding_window_pattern": 6}
    assert check_blocks(listed) == []
