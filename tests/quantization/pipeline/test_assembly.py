"""Assembled checkpoints: equal to those of a pass where they claim to be, and measured as an evaluation measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.core.cell import Cell, Method, quantize_key
from harness.core.errors import MethodError
from harness.planning.allocation import Matrix, groups_of, matrices_in, mixed_cell
from harness.quantization import models
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.inference.load import load
from harness.quantization.pipeline.assembly import (
    Assembly,
    Candidates,
    fisher_table,
    is_exact,
    write,
)
from tests.support.small import (
    GPTQ,
    RTN,
    SEQUENTIAL,
    cell,
    content,
    failures,
    part,
    quantize,
    windows,
)

Make = Callable[..., Path]
FULL = {"inputs": "full_precision"}
QUAROT = Method("quarot_gptq", part("quarot", "transform"), part("gptq"))
METHODS = {
    "gptq": GPTQ,
    "rtn": RTN,
    "hqq": Method("hqq", rounding=part("hqq")),
    "quarot_gptq": QUAROT,
    "block_hadamard": Method("mr_gptq", part("block_hadamard", "transform", size=16), part("gptq")),
    "gptq and rtn": None,
}


def candidates_of(folder: Path, method: Method | None) -> list[Cell]:
    methods = [method, method, method] if method is not None else [GPTQ, RTN, GPTQ]
    return [cell(folder, m, bits, 16, **FULL) for m, bits in zip(methods, (2, 3, 4), strict=True)]


def assembled(
    folder: Path, store: Path, cells: Sequence[Cell], seed: int = 0
) -> tuple[Cell, dict[Matrix, int], Candidates]:
    """A choice at random, with its cell and the candidates' checkpoints."""
    assert not failures(quantize(cells, folder, store))
    opened = Candidates([store / quantize_key(each) for each in cells])
    shapes = models.shapes(folder)
    groups = groups_of(matrices_in(opened.checkpoints[0].manifest), shapes.linears, "serving")
    rng = torch.Generator().manual_seed(seed)
    choice = tuple(torch.randint(0, len(cells), (len(groups),), generator=rng).tolist())
    assert len(set(choice)) > 1
    made = mixed_cell(cells, groups, [1] * len(groups), choice, "mixed@3")[1]
    parts = {m: k for members, k in zip(groups, choice, strict=True) for m in members}
    return made, parts, opened


@pytest.mark.parametrize("name", METHODS)
def test_an_assembly_equals_a_pass_byte_for_byte(
    name: str, tiny_model: Make, tmp_path: Path
) -> None:
    folder = tiny_model("llama", num_hidden_layers=2)
    cells = candidates_of(folder, METHODS[name])
    assert all(map(is_exact, cells))
    made, parts, opened = assembled(folder, tmp_path / "store", cells)
    key = quantize_key(made)
    assert write(opened, parts, made, CheckpointWriter(tmp_path / key, {"key": key}))
    assert not failures(quantize([made], folder, tmp_path / "passed"))
    ours, theirs = content(tmp_path / key), content(tmp_path / "passed" / key)
    theirs.pop("seconds.json", None)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_an_interrupted_assembly_goes_on(tiny_model: Make, tmp_path: Path) -> None:
    folder = tiny_model("llama", num_hidden_layers=3)
    made, parts, opened = assembled(folder, tmp_path / "store", candidates_of(folder, GPTQ))
    for place, last in (("all", 3), ("cut", 1)):
        writer = CheckpointWriter(tmp_path / place, {})
        write(opened, parts, made, writer)
        if last < 3:
            for name in ("manifest.json", *(f"block-0000{i}.json" for i in range(last, 3))):
                (tmp_path / place / name).unlink()
            write(opened, parts, made, CheckpointWriter(tmp_path / place, {}))
    assert content(tmp_path / "all") == content(tmp_path / "cut")


@pytest.mark.parametrize(
    "method,inputs",
    [
        (Method("awq", part("awq", "transform"), part("rtn")), "full_precision"),
        (SEQUENTIAL, "full_precision"),
        (GPTQ, "quantized"),
        (Method("omniquant", rounding=part("omniquant")), "full_precision"),
    ],
    ids=["awq", "sequential", "quantized inputs", "block-wise"],
)
def test_what_a_pass_must_round_anew(method: Method, inputs: str, tiny_model: Make) -> None:
    assert not is_exact(cell(tiny_model("llama"), method, inputs=inputs))


def test_data_free_roundings_are_exact_on_any_inputs(tiny_model: Make) -> None:
    assert is_exact(cell(tiny_model("llama"), RTN, inputs="quantized"))


def test_matrices_that_belong_to_different_norms_are_not_mixed(
    tiny_model: Make, tmp_path: Path
) -> None:
    """AWQ moves scales into norms, for each scheme others: a block has one norm."""
    folder = tiny_model("llama", num_hidden_layers=2)
    awq = Method("awq", part("awq", "transform"), part("rtn"))
    _, parts, opened = assembled(folder, tmp_path / "store", candidates_of(folder, awq))
    with (
        Assembly(folder, "float32", opened, windows(2), "cpu") as assembly,
        pytest.raises(MethodError, match="together: block"),
    ):
        assembly.divergence(parts)


@torch.no_grad()
def reference(made: Cell, folder: Path, checkpoint: Path, tokens: Tensor) -> float:
    """The divergence with both models whole in memory, loaded as evaluations load them."""
    ours, _ = load(made, folder, checkpoint)
    baseline = dataclasses.replace(made, method=Method("none"))
    full, _ = load(baseline, folder, None)
    total = []
    for window in tokens:
        p, q = (
            model(window[None], use_cache=False).logits[0].double().log_softmax(-1)
            for model in (full, ours)
        )
        total.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(total).mean())


@pytest.mark.parametrize(
    "name,family", [("gptq", "llama"), ("gptq", "opt"), ("quarot_gptq", "llama")]
)
def test_the_divergence_is_that_of_the_loaded_model(
    name: str, family: str, tiny_model: Make, tmp_path: Path
) -> None:
    """Whatever assembly is held while another one is measured."""
    folder, tokens = tiny_model(family, num_hidden_layers=3), windows(3, seed=4)
    cells = candidates_of(folder, METHODS[name])
    made, parts, opened = assembled(folder, tmp_path / "store", cells)
    write(opened, parts, made, CheckpointWriter(tmp_path / "made", {}))
    wanted = reference(made, folder, tmp_path / "made", tokens)
    assert wanted > 0
    last = {m: (2 if m[0] == 2 else k) for m, k in parts.items()}
    with Assembly(folder, "float32", opened, tokens, "cpu") as assembly:
        assert assembly.divergence(parts) == pytest.approx(wanted, rel=1e-4)
        for held in (dict.fromkeys(parts, 1), last, parts):
            assembly.hold(held)
            assert assembly.divergence(parts) == pytest.approx(wanted, rel=1e-4)
            assert assembly.divergence(held) == pytest.approx(assembly.divergence(dict(held)))


def test_fisher_values_follow_their_definition(tiny_model: Make, tmp_path: Path) -> None:
    """Against gradients of the whole model: sum over sequences of squared gradients, times squared errors."""
    folder, tokens = tiny_model("llama", num_hidden_layers=2), windows(2, seed=1)
    cells = candidates_of(folder, RTN)
    assert not failures(quantize(cells, folder, tmp_path / "store"))
    opened = Candidates([tmp_path / "store" / quantize_key(each) for each in cells])
    found = fisher_table(folder, "float32", opened, tokens, "cpu", tmp_path / "scratch")
    model, _ = load(dataclasses.replace(cells[0], method=Method("none")), folder, None)
    weight = model.model.layers[1].mlp.down_proj.weight.requires_grad_()
    squares = torch.zeros_like(weight)
    for window in tokens:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, window[1:])
        squares += torch.autograd.grad(loss, weight)[0].square()
    for k in range(3):
        rounded = opened.block(k, 1).weights["mlp.down_proj"].dequantize()
        wanted = float((squares * (weight.detach() - rounded).square()).sum())
        assert found[1, "mlp.down_proj"][k] == pytest.approx(wanted, rel=1e-3)


def test_a_pass_refuses_roundings_per_matrix_that_need_the_block(
    tiny_model: Make, tmp_path: Path
) -> None:
    folder = tiny_model("llama", num_hidden_layers=1)
    cells = [cell(folder, SEQUENTIAL, 2, 16, **FULL), cell(folder, RTN, 3, 16, **FULL)]
    shapes = models.shapes(folder)
    matrices = [(0, linear.name) for linear in shapes.linears]
    groups = groups_of(matrices, shapes.linears, "serving")
    choice = (1, *(0 for _ in groups[1:]))
    made = mixed_cell(cells, groups, [1] * len(groups), choice, "x@1")[1]
    (failed,) = failures(quantize([made], folder, tmp_path))
    assert "linear by linear" in failed.reason
