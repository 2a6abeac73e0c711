"""AutoRound: starts at the nearest codes, moves each by at most about one, and never keeps what is worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import FakeBlock, generator, llama_shapes, random_weight
from small import cell, content, failures, part, quantize, windows
from torch import Tensor

from harness.core import plugins
from harness.core.cell import ActivationScheme, Method, Scheme, WeightScheme, quantize_key
from harness.core.errors import ConfigError, MethodError
from harness.data.demo.tiny import build
from harness.quantization.formats.native import Checkpoint
from harness.quantization.methods import autoround
from harness.quantization.methods.autoround import _Offsets
from harness.quantization.methods.blockwise import GroupedMatrix, block_loss
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight


def w(bits: int, symmetric: bool = False, group_size: int = 16, **fields: Any) -> WeightScheme:
    dtype = fields.pop("scale_dtype", "float32")
    return WeightScheme(
        "int", bits, group_size, symmetric, dtype, signed_scales=symmetric, **fields
    )


def rounded(
    block: FakeBlock, scheme: WeightScheme, activation: ActivationScheme | None = None, **own: Any
) -> dict[str, QuantizedWeight]:
    method = plugins.build("rounding", "autoround", own)
    return method.round_block(block, Scheme("test", scheme, activation), generator())


def error(block: FakeBlock, weights: dict[str, QuantizedWeight]) -> float:
    values = {name: weight.dequantize() for name, weight in weights.items()}
    with torch.no_grad():
        return sum(float(block_loss(block, i, values)) for i in range(len(block.inputs()))) / len(
            block.inputs()
        )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group_size", [16, -1])
def test_without_iterations_it_is_round_to_nearest_on_its_grid(
    symmetric: bool, scale_dtype: str, group_size: int
) -> None:
    block, scheme = FakeBlock(), w(3, symmetric, group_size, scale_dtype=scale_dtype)
    rtn = plugins.build("rounding", "rtn", {"grid": "gptq"})
    for name, found in rounded(block, scheme, iterations=0).items():
        weight = block.linear(name).weight.detach()
        nearest = rtn.round_layer(name, weight, None, scheme, generator())
        assert torch.equal(found.dequantize(), nearest.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
def test_values_and_gradients_are_those_of_the_formulas(symmetric: bool) -> None:
    """Written out from the rule: straight through every rounding, clamps pass what is inside."""
    bits, top, middle = 3, 7, 4
    groups = random_weight(4, 32, seed=2).reshape(4, 2, 16)
    groups[0, 0] = groups[0, 0].abs()  # a range with one end at 0
    matrix = _Offsets(GroupedMatrix(groups, w(bits, symmetric)))
    rng, upstream = generator(5), torch.randn(4, 32, generator=generator(6))
    with torch.no_grad():
        matrix.offset.copy_(torch.rand(groups.shape, generator=rng) - 0.5)
        for factor in (matrix.lower, matrix.upper):
            factor.copy_(0.5 + 0.5 * torch.rand(factor.shape, generator=rng))
    matrix.nearest().backward(upstream)

    lo, hi = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    a, b, v = matrix.lower.detach(), matrix.upper.detach(), matrix.offset.detach()
    g = upstream.reshape(groups.shape)
    if symmetric:
        lower_decides = -a * lo > b * hi
        s = torch.where(lower_decides, -a * lo, -b * hi) / middle
        z = torch.full_like(s, middle)
        ds_da = torch.where(lower_decides, -lo / middle, 0.0)
        ds_db = torch.where(lower_decides, 0.0, -hi / middle)
    else:
        s = (b * hi - a * lo) / top
        z = torch.round(-a * lo / s)
        ds_da, ds_db = -lo / top, hi / top
    raw = torch.round(groups / s + v) + z
    q = raw.clamp(0, top)
    inside = (q == raw).float()
    ds = g * ((q - z) - inside * groups / s)
    da, db = ds * ds_da, ds * ds_db
    if not symmetric:  # clamped codes move with the zero point
        moved = (1 - inside) * g
        da = da + moved * (lo - s * (a * lo / s**2) * ds_da)
        db = db - moved * s * (a * lo / s**2) * ds_db
    assert 0 < float(inside.mean()) < 1
    assert torch.allclose(matrix.nearest().detach().reshape(groups.shape), s * (q - z), atol=1e-7)
    assert torch.allclose(matrix.offset.grad, inside * g * s, rtol=1e-5, atol=1e-7)
    assert torch.allclose(matrix.lower.grad, da.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert torch.allclose(matrix.upper.grad, db.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_it_ends_below_round_to_nearest(bits: int, symmetric: bool) -> None:
    block, scheme = FakeBlock(), w(bits, symmetric)
    start = error(block, rounded(block, scheme, iterations=0))
    found = rounded(block, scheme, iterations=40)
    notes = block.notes["autoround"]
    assert notes["initial_loss"] == pytest.approx(start, rel=1e-5)
    assert error(block, found) < 0.8 * start
    assert len(notes["loss"]) == 20 and 0 < notes["kept_iteration"] < 40
    assert 0 < notes["codes_off_nearest"] < 0.5


@pytest.mark.parametrize("keep", ["best", "best_of_all", "last"])
def test_what_is_kept_with_sequences_of_unlike_size(keep: str) -> None:
    """Batches of large sequences have large losses, whatever the parameters: only best_of_all compares like with like."""
    block = FakeBlock(sequences=8, length=16)

    def enlarge(of: FakeBlock) -> None:
        of.calibration[[1, 5]] *= 3
        for shape in of.shapes.linears:
            of.linear(shape.name).weight *= 2

    block.change(enlarge)
    start = error(block, rounded(block, w(2), iterations=0))
    found = rounded(block, w(2), iterations=30, batch=2, keep=keep)
    kept = block.notes["autoround"]["kept_iteration"]
    if keep == "best_of_all":
        assert error(block, found) <= start * (1 + 1e-6) and kept % 10 == 0
    elif keep == "last":
        assert kept == 30
    else:
        assert kept < 30


def test_offsets_and_factors_stay_within_the_papers_bounds() -> None:
    block, scheme = FakeBlock(), w(3)
    for name, found in rounded(block, scheme, iterations=30, keep="last").items():
        assert isinstance(found, UniformWeight) and found.zero is not None
        weight = block.linear(name).weight.detach().reshape(*found.scale.shape, 16)
        lo, hi = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        factor = found.scale / ((hi - lo) / 7)
        assert bool((factor > 0.48).all()) and bool((factor <= 1 + 1e-6).all())
        codes = found.codes.reshape(weight.shape).float()
        unclamped = (codes > 0) & (codes < 7)
        steps = (found.dequantize().reshape(weight.shape) - weight) / found.scale.unsqueeze(-1)
        assert float(steps[unclamped].abs().max()) < 1.5


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_stays_zero(symmetric: bool) -> None:
    block = FakeBlock()

    def clear(of: FakeBlock) -> None:
        of.linear("mlp.up_proj").weight[:5, :16] = 0

    block.change(clear)
    found = rounded(block, w(2, symmetric), iterations=12, keep="last")["mlp.up_proj"].dequantize()
    assert not found[:5, :16].any() and found[5:].any()


def test_impossible_settings_are_refused_and_broken_numbers_are_named() -> None:
    for settings, message in (
        ({"rate": -1.0}, "rate is -1"),
        ({"iterations": -1}, "iterations is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"keep": "first"}, 'no keep "first"'),
    ):
        with pytest.raises(ConfigError, match=message):
            plugins.build("rounding", "autoround", settings)
    block = FakeBlock(index=4)

    def poison(of: FakeBlock) -> None:
        of.calibration[2, 3, 5] = torch.nan

    block.change(poison)
    with pytest.raises(MethodError, match="block 4: the loss of iteration 1 is nan"):
        rounded(block, w(3), iterations=3)


def test_more_sequences_per_step_than_there_are_is_all_of_them() -> None:
    first, second = FakeBlock(sequences=3), FakeBlock(sequences=3)
    a, b = (
        rounded(block, w(3), iterations=4, batch=batch)
        for block, batch in ((first, 3), (second, 99))
    )
    assert all(torch.equal(a[name].dequantize(), b[name].dequantize()) for name in a)


def test_rounded_activations_change_what_is_learned() -> None:
    plain = rounded(FakeBlock(), w(3), iterations=6)
    found = rounded(FakeBlock(), w(3), ActivationScheme(bits=4), iterations=6)
    assert any(
        not torch.equal(plain[name].dequantize(), found[name].dequantize()) for name in found
    )


def test_symmetric_schemes_have_signed_scales() -> None:
    method, shapes = plugins.build("rounding", "autoround", {}), llama_shapes()

    def reasons(weight: WeightScheme, activation: ActivationScheme | None = None) -> list[str]:
        return method.check(Scheme("test", weight, activation), shapes)

    assert not reasons(w(4, True)) and not reasons(w(4, False))
    (reason,) = reasons(WeightScheme("int", 4, 16, symmetric=True))
    assert "signed_scales=true" in reason
    (reason,) = reasons(w(4), ActivationScheme(dynamic=False))
    assert "static activation scales" in reason


# ---- in a pass -------------------------------------------------------------------------------------------------------


def test_a_cell_alone_has_the_bytes_that_it_has_in_company(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("llama", folder, num_hidden_layers=2)
    method = Method("autoround", rounding=part("autoround", iterations=4, batch=2))
    own = cell(folder, method, bits=3)
    others = [cell(folder, method, bits=2), cell(folder, method, bits=3, seed=1)]
    assert not failures(quantize([own], folder, tmp_path / "alone"))
    assert not failures(quantize([*others, own], folder, tmp_path / "company"))
    key = quantize_key(own)
    assert content(tmp_path / "alone" / key) == content(tmp_path / "company" / key)
    assert len({quantize_key(each) for each in (own, *others)}) == 3


def test_experts_that_no_token_reached_stay_at_their_nearest_codes(tmp_path: Path) -> None:
    folder = tmp_path / "mixtral"
    build("mixtral", folder, num_hidden_layers=1)
    one = windows(1, 2)
    own = cell(folder, Method("a", rounding=part("autoround", iterations=3)), bits=3)
    nearest = cell(folder, Method("rtn", rounding=part("rtn")), bits=3)
    assert not failures(quantize([own, nearest], folder, tmp_path / "runs", one))
    ours, theirs = (
        Checkpoint.open(tmp_path / "runs" / quantize_key(each)) for each in (own, nearest)
    )
    unreached = ours.manifest["notes"]["0"]["rounded_to_nearest"]
    assert unreached and set(unreached.values()) == {0}

    def values(of: Checkpoint, name: str) -> Tensor:
        return of.block(0).weights[name].dequantize()

    for name in unreached:
        assert torch.equal(values(ours, name), values(theirs, name))


def test_gradients_that_float16_cannot_hold_still_teach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a mean over a few thousand tokens' outputs lie below the smallest number of float16, 6e-8."""

    def tiny_loss(_block: Any, _sample: int, weights: dict[str, Tensor], _receive: Any) -> Tensor:
        return 1e-8 * sum(weight.half().float().square().sum() for weight in weights.values())

    monkeypatch.setattr(autoround, "block_loss", tiny_loss)
    block = FakeBlock()
    rounded(block, w(3), iterations=8)
    assert block.notes["autoround"]["codes_off_nearest"] > 0
