"""KIVI's rounding of keys per channel and values per token: what each is blind to, and where it changes nothing."""

from __future__ import annotations

import torch
from torch import nn

from harness.core.cell import KVScheme
from harness.core.shapes import Shapes
from harness.quantization.inference.kv_cache import attend, check, round_cache


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
