"""REAP: which experts it removes where that is known, and what is left of the router."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import small
import torch
from reductions import logits, reduce, reducing
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.core import plugins
from harness.core.cell import Method
from harness.data.demo.tiny import TINY
from harness.quantization.methods.protocols import ExpertOutputs
from harness.quantization.methods.reap import CRITERIA, saliency
from harness.quantization.models import config_by_block, read_config, shapes
from harness.quantization.pipeline.reduction import ReadModel

MIXTURES = [family for family in TINY if "moe" in family or family == "mixtral"]


def seen(folder: Path, windows: Tensor) -> list[ExpertOutputs]:
    model = ReadModel(folder, "float32", "cpu", ("expert_output",), windows)
    return [block.experts for block in model.surveyed() if block.experts is not None]


@pytest.mark.parametrize("family", MIXTURES)
def test_a_smaller_mixture_loads_with_the_kept_experts(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, target, windows = tiny_model(family), tmp_path / "made", small.windows()
    record = reduce(folder, target, reducing("reap", experts=1, share=0.0), windows)
    assert shapes(target).experts == shapes(folder).experts - 1
    kept = record["choice"]["kept"]
    assert kept and all(found == sorted(found) for found in kept.values())
    original = ReadModel(folder, "float32", "cpu", (), None)
    smaller = ReadModel(target, "float32", "cpu", (), None)
    for index, experts in kept.items():
        names = original.expert_tensors(int(index))
        assert any("gate" in name.rpartition(".")[0] for name in names)  # the router among them
        for name in names:
            ours = original.block(int(index))[name][experts]
            assert torch.equal(smaller.block(int(index))[name], ours)
    assert bool(torch.isfinite(logits(target, windows)).all())


def test_an_expert_without_output_goes_first(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("mixtral")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "experts" in name and "layers.1." in name and (".2.w2" in name or "down_proj" in name):
            (tensor[2] if tensor.ndim == 3 else tensor).zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record = reduce(
        folder, tmp_path / "made", reducing("reap", experts=1, share=0.0), small.windows()
    )
    assert 2 not in record["choice"]["kept"]["1"] and record["choice"]["saliency"]["1"][2] == 0


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_seen_of_experts_adds_up(family: str, tiny_model: Callable[..., Path]) -> None:
    folder, windows = tiny_model(family), small.windows(4, 24)
    whole, halves = seen(folder, windows), [seen(folder, half) for half in windows.split(2)]
    config = config_by_block(read_config(folder))
    for index, experts in enumerate(whole):
        assert float(experts.tokens.sum()) == windows.numel() * config["num_experts_per_tok"]
        for name in ("tokens", "gate", "norm", "gated_norm"):
            parts = sum(getattr(half[index], name) for half in halves)
            torch.testing.assert_close(getattr(experts, name), parts, rtol=1e-6, atol=1e-6)


def test_each_criterion_is_its_formula() -> None:
    def row(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    experts = ExpertOutputs(row(2, 0, 4), row(1, 0, 1), row(6, 0, 4), row(3, 0, 1), row(9, 0, 1))
    wanted = {
        "reap": [1.5, 0, 0.25],
        "frequency": [2, 0, 4],
        "ean_sum": [6, 0, 4],
        "ean_mean": [3, 0, 1],
        "weighted_ean_sum": [3, 0, 1],
    }
    assert {name: saliency(experts, name).tolist() for name in CRITERIA} == wanted


def test_the_plan_refuses_with_the_reason(tiny_model: Callable[..., Path]) -> None:
    def reasons(family: str, **settings: object) -> str:
        folder = tiny_model(family)
        built = plugins.build("reduction", "reap", settings)
        return "; ".join(built.check(shapes(folder), config_by_block(read_config(folder))))

    assert "has no experts" in reasons("llama")
    assert "none would be removed" in reasons("mixtral", share=0.01)
    assert "and a token chooses" in reasons("mixtral", share=0.9)
    assert reasons("mixtral", share=0.0, experts=1) == ""


def test_a_mixture_is_rounded_after_its_reduction(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    target = tmp_path / "made"
    reduce(tiny_model("mixtral"), target, reducing("reap", experts=1, share=0.0), small.windows())
    cell = small.cell(target, Method("rtn", rounding=small.part("rtn")))
    assert not small.failures(small.quantize([cell], target, tmp_path / "store"))
