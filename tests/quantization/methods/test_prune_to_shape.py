"""A target shape: limits in which the model computes what it did before, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from reductions import logits, reduce, reducing
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.core import plugins
from harness.quantization.models import config_by_block, read_config, shapes

NAME = "prune_to_shape"


def edited(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def matrix(tensors: dict[str, Tensor], block: int, linear: str) -> Tensor:
    return tensors[f"model.layers.{block}.{linear}.weight"]


def same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    windows = small.windows(2, 24)
    torch.testing.assert_close(
        logits(one, windows), logits(other, windows), rtol=tolerance, atol=tolerance
    )


def counted(layers: int, inner: int, heads: int, kv: int, hidden: int, head_dim: int) -> int:
    block = hidden * head_dim * (2 * heads + 2 * kv) + 3 * hidden * inner + 2 * hidden
    return layers * block + 2 * 259 * hidden + hidden


def test_what_contributes_nothing_goes_first_and_is_not_missed(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model()
    found = shapes(folder)
    inner, width = 128, found.head_dim * found.heads // found.kv_heads

    def silence(tensors: dict[str, Tensor]) -> None:
        for block in range(3):
            down = matrix(tensors, block, "mlp.down_proj")
            down[:, :: down.shape[1] // 8] = 0
            matrix(tensors, block, "self_attn.o_proj")[:, width:] = 0
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            matrix(tensors, 1, linear).zero_()

    edited(folder, silence)
    inner = int(read_config(folder)["intermediate_size"])
    target = {"blocks": 2, "intermediate": inner - 8, "kv_heads": 1}
    record = reduce(folder, tmp_path / "made", reducing(NAME, **target), small.windows())
    assert record["choice"]["blocks"] == [0, 2]
    assert record["choice"]["kv_heads"] == {"0": [0], "1": [0], "2": [0]}
    same(tmp_path / "made", folder, 1e-4)
    heads = found.heads // found.kv_heads
    wanted = counted(2, inner - 8, heads, 1, found.hidden_size, found.head_dim)
    assert shapes(tmp_path / "made").parameters == wanted


def test_silent_channels_of_the_stream_are_cut_without_loss(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Channels that nothing writes: the norms divide by fewer, and rescaling makes up for it exactly."""
    folder = tiny_model(rms_norm_eps=1e-12)

    def silence(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][:, 48:] = 0
        for block in range(3):
            for linear in ("self_attn.o_proj", "mlp.down_proj"):
                matrix(tensors, block, linear)[48:] = 0

    edited(folder, silence)
    record = reduce(folder, tmp_path / "made", reducing(NAME, hidden=48), small.windows())
    assert record["choice"]["hidden"] == list(range(48))
    assert record["choice"]["norms"]["final"] == pytest.approx((64 / 48) ** 0.5, rel=1e-4)
    same(tmp_path / "made", folder, 2e-4)


def test_a_duplicate_is_made_up_for_by_the_compensation(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model()

    def duplicate(tensors: dict[str, Tensor]) -> None:
        for block in range(3):
            for linear in ("mlp.gate_proj", "mlp.up_proj"):
                matrix(tensors, block, linear)[5] = matrix(tensors, block, linear)[4]
            down = matrix(tensors, block, "mlp.down_proj")
            down[:, 5] = 1e-3 * down[:, 4].norm() / down.shape[0] ** 0.5  # the least of all

    edited(folder, duplicate)
    inner = int(read_config(folder)["intermediate_size"])
    method = reducing(NAME, intermediate=inner - 1, damping_fraction=1e-7)
    record = reduce(folder, tmp_path / "with", method, small.windows())
    assert all(5 not in kept for kept in record["choice"]["channels"].values())
    same(tmp_path / "with", folder, 1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_compensation_and_criterion_on_every_model_of_the_structure(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, windows = tiny_model(family), small.windows()
    inner = int(read_config(folder)["intermediate_size"])
    errors: dict[bool, float] = {}
    for compensate in (True, False):
        target = tmp_path / str(compensate)
        method = reducing(NAME, intermediate=inner // 2, compensate=compensate)
        reduce(folder, target, method, windows)
        difference = logits(target, windows) - logits(folder, windows)
        errors[compensate] = float(difference.square().mean())
    assert errors[True] < errors[False]
    smaller = {"hidden": 48, "kv_heads": 1, "criterion": "magnitude"}
    reduce(folder, tmp_path / "all", reducing(NAME, **smaller), windows)
    assert bool(torch.isfinite(logits(tmp_path / "all", windows)).all())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "nothing would be removed"),
    "all": ({"blocks": 3}, "nothing would be removed"),
    "more": ({"hidden": 100}, "hidden 100: this model has 64"),
    "ends": ({"blocks": 1}, "protect_ends keeps two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_plan_refuses_with_the_reason(case: str, tiny_model: Callable[..., Path]) -> None:
    settings, reason = REFUSED[case]
    folder = tiny_model()
    built = plugins.build("reduction", NAME, settings)
    found = built.check(shapes(folder), config_by_block(read_config(folder)))
    assert any(reason in each for each in found), found


def test_other_structures_are_refused(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("opt")
    built = plugins.build("reduction", NAME, {"hidden": 8})
    found = built.check(shapes(folder), config_by_block(read_config(folder)))
    assert found == ['shapes are cut of Llama and models of its structure, not of family "opt"']


def test_kept_inputs_that_are_always_zero_take_over_nothing() -> None:
    weight, moment = torch.ones(3, 4), torch.zeros(4, 4)
    moment[2, 2] = moment[3, 3] = 1
    block = SimpleNamespace(
        index=0, matrices={"mlp.down_proj": weight}, evidence={"mlp.down_proj": {"hessian": moment}}
    )
    method = plugins.build("reduction", "prune_to_shape", {"intermediate": 2})
    method._compensate(block, "mlp.down_proj", [0, 1])
    assert torch.equal(method._compensated[0, "mlp.down_proj"], weight[:, :2])
