"""A rounded cache, in KIVI's integers and in 8-bit floats: what each is blind to, and where it changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small import cell, failures, part, quantize, windows
from torch import nn

from harness.core.cell import (
    Calibration,
    Cell,
    KVScheme,
    Method,
    Model,
    Scheme,
    WeightScheme,
    _execution,
    baseline_of,
    cell_key,
    quantize_key,
)
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.data import model_folders
from harness.quantization.inference.kv_cache import (
    attend,
    cache_bits,
    check,
    facts,
    observe,
    round_cache,
    round_floats,
    simulate,
    static_scale,
)
from harness.quantization.inference.load import load


def cache(tokens: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, tokens, 16, generator=torch.Generator().manual_seed(seed))


def test_a_channel_scaled_by_a_power_of_two_scales_its_rounded_keys_exactly() -> None:
    keys = cache()
    scaled = keys.clone()
    scaled[..., 5] *= 64
    expected = round_cache(keys, 2, 8, "channel")
    expected[..., 5] *= 64
    assert torch.equal(round_cache(scaled, 2, 8, "channel"), expected)
    per_token = round_cache(keys, 2, 8, "token")
    per_token[..., 5] *= 64
    assert not torch.equal(round_cache(scaled, 2, 8, "token"), per_token)


def test_errors_of_values_do_not_depend_on_other_tokens() -> None:
    values = cache()
    spiked = values.clone()
    spiked[:, :, 3] *= 1000
    rounded, other = (round_cache(each, 2, 8, "token") for each in (values, spiked))
    others = [token for token in range(24) if token != 3]
    assert torch.equal(rounded[:, :, others], other[:, :, others])


def test_constant_groups_and_16_bits_are_exact() -> None:
    flat = torch.full((1, 1, 8, 16), 0.3)
    for axis in ("channel", "token"):
        assert torch.equal(round_cache(flat, 2, 8, axis), flat)
        assert torch.allclose(round_cache(cache(), 16, 8, axis), cache(), atol=1e-4)


def attended(
    scheme: KVScheme, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    return attend(nn.Module(), query, key, value, None, None, scheme)


def test_a_residual_longer_than_the_text_changes_nothing() -> None:
    query, key, value = (cache(seed=seed) for seed in range(3))
    exact = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(
        1, 2
    )
    assert torch.allclose(attended(KVScheme(2, 8, 32), query, key, value), exact, atol=1e-5)
    assert not torch.allclose(attended(KVScheme(2, 8, 8), query, key, value), exact, atol=1e-2)


def test_the_last_tokens_are_seen_as_they_are() -> None:
    """Query t sees key j rounded iff j < R floor(t / R), value j iff j < t - R: the first R queries see nothing rounded."""
    query, key, value = (cache(seed=seed) for seed in range(3))
    exact = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(
        1, 2
    )
    found = attended(KVScheme(2, 8, 8), query, key, value)
    assert torch.allclose(found[:, :8], exact[:, :8], atol=1e-5)
    changed = (found - exact).abs().amax((0, 2, 3))
    assert bool((changed[8:] > 1e-3).all())


def test_one_forward_is_kivis_decoding_token_by_token() -> None:
    """Their cache, step by step: a query reads rounded blocks and recent tokens as they are, and then what is full is rounded."""
    query, key, value = (cache(tokens=30, seed=seed) for seed in range(3))
    bits, size, residual = 2, 4, 8
    old_keys, old_values = key[:, :, :0], value[:, :, :0]
    keys, values, steps = key[:, :, :0], value[:, :, :0], []
    for t in range(30):
        keys, values = (
            torch.cat((keys, key[:, :, t : t + 1]), 2),
            torch.cat((values, value[:, :, t : t + 1]), 2),
        )
        scores = query[:, :, t : t + 1] @ torch.cat((old_keys, keys), 2).transpose(2, 3) / 4
        steps.append(scores.softmax(-1) @ torch.cat((old_values, values), 2))
        if keys.shape[2] == residual:
            old_keys, keys = (
                torch.cat((old_keys, round_cache(keys, bits, size, "channel")), 2),
                key[:, :, :0],
            )
        if values.shape[2] > residual:
            old_values = torch.cat(
                (old_values, round_cache(values[:, :, :1], bits, size, "token")), 2
            )
            values = values[:, :, 1:]
    found = attended(KVScheme(bits, size, residual), query, key, value)
    torch.testing.assert_close(found, torch.cat(steps, 2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_turned_keys_leave_the_scores_and_lose_less_by_an_outlying_channel() -> None:
    query, key, value = (cache(seed=seed) for seed in range(3))
    key[..., 5] *= 50
    query[..., 5] /= 50
    exact = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(
        1, 2
    )
    errors = {}
    for turned in (False, True):
        fine = KVScheme(16, 16, 0, "token", "token", turned)
        assert torch.allclose(attended(fine, query, key, value), exact, atol=2e-2)
        errors[turned] = float(
            (attended(KVScheme(4, 16, 0, "token", "token", turned), query, key, value) - exact)
            .square()
            .mean()
        )
    assert errors[True] < 0.5 * errors[False]


def test_head_sizes_without_a_hadamard_matrix_are_refused() -> None:
    shapes = Shapes("llama", 1, (), (), 28, 4, 4, 7, 0)
    problems = check(KVScheme(4, 7, 0, "token", "token", True), shapes)
    assert any("Hadamard" in problem for problem in problems)


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*(shape or (2, 12, 64)), generator=torch.Generator().manual_seed(seed))
    return x * (1 + 10 * torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(1)) ** 6)


def test_cache_rounding() -> None:
    x = inputs(1, 2, 20, 16)
    scaled = x.clone()
    scaled[..., 3] *= 64  # an outlier channel
    keys = round_cache(x, 2, 8, "channel")
    assert torch.equal(round_cache(scaled, 2, 8, "channel")[..., 3], 64 * keys[..., 3])
    assert torch.equal(round_cache(scaled, 2, 8, "channel")[..., 4], keys[..., 4])
    assert not torch.equal(
        round_cache(scaled, 2, 8, "token")[..., 4], round_cache(x, 2, 8, "token")[..., 4]
    )
    assert torch.equal(
        round_cache(x, 2, 8, "token")[:, :, :5], round_cache(x[:, :, :5], 2, 8, "token")
    )
    for axis in ("token", "channel"):
        assert torch.allclose(round_cache(x, 16, 8, axis), x, atol=1e-3)
        assert torch.equal(round_cache(torch.ones(1, 1, 8, 8), 2, 8, axis), torch.ones(1, 1, 8, 8))


# --- 8-bit floats ----------------------------------------------------------------------------------------------------------------


HEAD_DIM16 = Shapes("llama", 1, (), (), 64, 4, 3, 16, 0)
FP8 = KVScheme(residual=0, format="fp8_e4m3", granularity="head", scales="static")
TOP = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}


def seen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> nn.Module:
    """An attention that has seen these on its calibration data."""
    module = nn.Module()
    observed = attend(module, query, key, value, None, None, FP8, observing=True)
    exact = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(observed, exact.transpose(1, 2), atol=1e-5)
    return module


def scheme_of(granularity: str, format_: str = "fp8_e4m3", **fields: Any) -> KVScheme:
    scales = "dynamic" if granularity == "token_head" else "static"
    return dataclasses.replace(
        FP8, format=format_, granularity=granularity, **{"scales": scales, **fields}
    )


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax((0, 2, 3))


@pytest.mark.parametrize("format_", TOP)
def test_numbers_of_the_format_times_a_scale_are_exact(format_: str) -> None:
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[format_]
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = codes[codes.isfinite()]
    x = finite.repeat(16)[: 16 * (len(finite) // 16)].reshape(1, 1, -1, 16) * 0.125
    for granularity in ("head", "tensor"):
        scheme = scheme_of(granularity, format_)
        assert torch.equal(round_floats(x, scheme, largest(x)), x)
    one = scheme_of("tensor", format_, scales="one")
    assert torch.equal(round_floats(8 * x, one, None), 8 * x)
    beyond = torch.full((1, 1, 1, 16), 1e6)
    assert torch.equal(round_floats(beyond, one, None), torch.full_like(beyond, TOP[format_]))


@pytest.mark.parametrize(("format_", "step"), [("fp8_e4m3", 2**-4), ("fp8_e5m2", 2**-3)])
@pytest.mark.parametrize("granularity", ["tensor", "head", "token_head"])
def test_relative_errors_above_the_subnormals(format_: str, step: float, granularity: str) -> None:
    x = cache(64) + 3 * cache(64).sign()  # magnitudes of one order: far above the subnormals
    rounded = round_floats(x, scheme_of(granularity, format_), largest(x))
    assert float(((rounded - x) / x).abs().max()) <= step * 1.001
    assert not torch.equal(rounded, x)


def test_scales_per_head_round_no_worse_and_equal_one_scale_for_equal_heads() -> None:
    x = (
        cache(64) * torch.tensor([1e-5, 30.0, 1000.0])[:, None, None]
    )  # the first: subnormal beside the last
    errors = {
        granularity: (round_floats(x, scheme_of(granularity), largest(x)) - x).abs()
        for granularity in ("head", "tensor")
    }
    assert float(errors["head"].amax()) <= float(errors["tensor"].amax())
    assert float(errors["head"][:, 0].mean()) < float(errors["tensor"][:, 0].mean())
    alike = cache(64)
    alike[0, :, 0, 0] = 9.0
    for one_head in (alike, cache(64)[:, :1]):
        per_head, whole = (
            round_floats(one_head, scheme_of(granularity), largest(one_head))
            for granularity in ("head", "tensor")
        )
        assert torch.equal(per_head, whole)


def test_a_head_of_zeros_has_scale_one() -> None:
    x = cache()
    x[:, 1] = 0
    assert static_scale(largest(x), FP8).tolist()[1] == 1.0
    for granularity in ("head", "token_head"):
        rounded = round_floats(x, scheme_of(granularity), largest(x))
        assert not rounded[:, 1].any() and bool(rounded.isfinite().all())


@pytest.mark.parametrize("granularity", ["tensor", "head", "token_head"])
@pytest.mark.parametrize("residual", [0, 5])
@pytest.mark.parametrize("queries", [False, True])
def test_one_forward_in_floats_is_decoding_token_by_token(
    granularity: str, residual: int, queries: bool
) -> None:
    query, key, value = (3 * cache(tokens=20, seed=seed) for seed in range(3))
    scheme = scheme_of(granularity, residual=residual, queries=queries)
    module, steps = seen(query, key, value), []
    whole = attend(module, query, key, value, None, None, scheme)
    for t in range(20):
        rounded = [round_floats(x, scheme, largest(x)) for x in (query, key, value)]
        q, k, v = (x[:, :, : t + 1].clone() for x in (query, key, value))
        old = max(0, t - residual) if residual else t + 1
        k[:, :, :old], v[:, :, :old] = rounded[1][:, :, :old], rounded[2][:, :, :old]
        last = (rounded[0] if queries else q)[:, :, t : t + 1]
        steps.append((last @ k.transpose(2, 3) / 4).softmax(-1) @ v)
    torch.testing.assert_close(whole, torch.cat(steps, 2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_static_scales_come_from_calibration_or_not_at_all() -> None:
    query, key, value = (cache(seed=seed) for seed in range(3))
    with pytest.raises(MethodError, match="need calibration data"):
        attend(nn.Module(), query, key, value, None, None, FP8)
    module = seen(query, key, value)
    attend(module, query, key, 2 * value, None, None, FP8, observing=True)
    assert torch.equal(module.kv_magnitudes.value, 2 * largest(value))
    assert torch.equal(module.kv_magnitudes.key, largest(key))
    attend(module, query, 9 * key, value, None, None, FP8)
    assert torch.equal(module.kv_magnitudes.key, largest(key)), "fixed once they are used"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bits": 8}, "kv.bits 8 belongs to integers"),
        ({"group_size": 16}, "kv.group_size 16"),
        ({"key_axis": "token"}, "kv.key_axis token"),
        ({"value_axis": "channel"}, "kv.value_axis channel"),
        ({"granularity": "group"}, "has no groups"),
        ({"scales": "dynamic"}, "a dynamic scale per head"),
        ({"granularity": "token_head"}, "kv.scales=dynamic"),
        ({"residual": -1}, "negative"),
        ({"format": "int"}, "kv.granularity head belongs to 8-bit floats"),
    ],
)
def test_schemes_that_contradict_themselves_are_refused(
    fields: dict[str, Any], reason: str
) -> None:
    problems = check(dataclasses.replace(FP8, **fields), HEAD_DIM16)
    assert any(reason in problem for problem in problems), problems


@pytest.mark.parametrize("granularity", ["tensor", "head", "token_head"])
@pytest.mark.parametrize("residual", [0, 1, 32])
def test_schemes_in_floats_are_accepted(granularity: str, residual: int) -> None:
    assert check(scheme_of(granularity, residual=residual), HEAD_DIM16) == []


def test_bits_of_a_cached_element() -> None:
    assert cache_bits(FP8, 16) == 8 and cache_bits(scheme_of("token_head"), 64) == 8.25
    assert cache_bits(KVScheme(4, 32), 64) == 5


def fp8_cell(folder: Path, scheme: KVScheme, calibration: Calibration | None) -> Cell:
    model = Model("demo", "demo", digest="x")
    method = Method("activation_only", rounding=part("keep"))
    dense = WeightScheme("dense", 16)
    return Cell(model, method, Scheme("w16kv8fp", dense, kv=scheme), calibration)


def test_a_model_with_a_calibrated_cache(tmp_path: Path) -> None:
    """From the pass to the logits: two models of one process keep scales of their own, and a batch scores as its items do."""
    folder = model_folders.model_folder(Model("demo", "demo"))
    windows_of = Calibration("demo", "demo", samples=2, length=64)
    one = fp8_cell(folder, FP8, windows_of)
    assert not failures(quantize([one], folder, tmp_path))
    checkpoint = tmp_path / quantize_key(one)
    full, _ = load(baseline_of(one), folder, None)
    found, _ = load(one, folder, checkpoint)
    more = dataclasses.replace(
        one, calibration=dataclasses.replace(windows_of, samples=6), scheme=one.scheme
    )
    other, _ = load(more, folder, checkpoint)
    tokens = windows(3, 48, 200)
    with torch.no_grad():
        exact, rounded, again = (model(tokens).logits for model in (full, found, other))
        alone = torch.cat([found(window[None]).logits for window in tokens])
    assert 1e-6 < float((rounded - exact).norm() / exact.norm()) < 0.1
    torch.testing.assert_close(alone, rounded, rtol=1e-4, atol=1e-4)
    one_facts, other_facts = facts(found, FP8, 16), facts(other, FP8, 16)
    assert one_facts["bits"] == 8 and len(one_facts["largest_keys"]) == 4
    assert all(
        a <= b for a, b in zip(one_facts["largest_keys"], other_facts["largest_keys"], strict=True)
    ), "six windows, the first two among them"
    assert not torch.equal(rounded, again)
    with pytest.raises(MethodError, match="static scales need calibration data"):
        load(fp8_cell(folder, FP8, None), folder, checkpoint)


def test_damaged_keys_name_their_block(tiny_model: Any, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    one = cell(folder, Method("activation_only", rounding=part("keep")))
    one = dataclasses.replace(one, scheme=Scheme("w16", WeightScheme("dense", 16)))
    assert not failures(quantize([one], folder, tmp_path))
    model, _ = load(one, folder, tmp_path / quantize_key(one))
    observe(model, FP8)
    with torch.no_grad():
        projection = model.get_submodule("model.layers.1.self_attn.k_proj")
        projection.dense[0, 0] = torch.nan  # type: ignore[index]
        model(windows(1))
    with pytest.raises(MethodError, match="block 1, 2 hold NaN"):
        simulate(model, FP8)


def test_keys_of_older_schemes_are_what_they_were_and_calibration_counts_with_static_scales() -> (
    None
):
    folder = Path("demo")
    small, large = (Calibration("c", "demo", samples=n, digest="d") for n in (2, 6))
    assert cell_key(fp8_cell(folder, FP8, small)) != cell_key(fp8_cell(folder, FP8, large))
    by_token = scheme_of("token_head")
    assert cell_key(fp8_cell(folder, by_token, small)) == cell_key(
        fp8_cell(folder, by_token, large)
    )
    old = _execution(Scheme("s", kv=KVScheme()))["kv"]
    assert set(old) == {
        *("bits", "group_size", "residual", "key_axis", "value_axis", "hadamard", "residual_rule")
    }
    changes: tuple[dict[str, Any], ...] = (
        {"queries": True},
        {"granularity": "tensor"},
        {"format": "fp8_e5m2"},
        {"scales": "one"},
    )
    keys = {cell_key(fp8_cell(folder, dataclasses.replace(FP8, **c), small)) for c in changes}
    assert len(keys | {cell_key(fp8_cell(folder, FP8, small))}) == 5
