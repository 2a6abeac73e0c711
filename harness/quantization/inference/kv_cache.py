"""A key-value cache of few bits, simulated. KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv 2402.02750).

    x' = q s + lo,   s = (hi - lo) / (2^b - 1),   q = round((x - lo) / s)          float minimum, no integer zero point

Keys, after rotary embedding, are rounded in groups of group_size consecutive tokens of one channel; values in groups of group_size
consecutive channels of one token. With `residual` R the most recent tokens stay as they are: the query of token t sees key j
rounded when j < R floor(t / R), and value j rounded when j < t - R: a token attends first, and what is then too old is rounded for
those after it. R = 0 rounds everything, the token's own key and value too (QuaRot).

Where we differ from the authors' code: there the prefill attends to unrounded keys and values, so that perplexity and
log-likelihoods, which are one prefill, show no effect. Here every token sees the cache that it would see if the text had been
decoded token by token. A group with hi = lo is exact; in their code it is 0 / 0.

Limits: padding on the left would shift the groups of a batch's shorter texts, so texts are written one by one. A sliding-window
cache forgets tokens while decoding, so there groups begin at the window's first token; scoring a text in one forward does not
forget.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from harness.core.cell import KVScheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.numerics import hadamard
from harness.quantization.numerics.activations import Round
from harness.quantization.numerics.training import round_through

AXES = ("channel", "token")


def check(scheme: KVScheme, shapes: Shapes) -> list[str]:
    """Reasons why this scheme cannot be simulated on a model; empty when it can."""
    problems = []
    for name in ("key_axis", "value_axis"):
        if getattr(scheme, name) not in AXES:
            problems.append(f'kv.{name} "{getattr(scheme, name)}" is neither "channel" nor "token"')
    if not 1 <= scheme.bits <= 16:
        problems.append(f"kv.bits {scheme.bits}: 1 to 16 are possible")
    if scheme.group_size < 1:
        problems.append(f"kv.group_size {scheme.group_size} must be positive")
    elif "token" in (scheme.key_axis, scheme.value_axis) and shapes.head_dim % scheme.group_size:
        problems.append(
            f"kv.group_size {scheme.group_size} does not divide head_dim {shapes.head_dim}"
        )
    if (
        scheme.group_size > 0
        and "channel" in (scheme.key_axis, scheme.value_axis)
        and scheme.residual % scheme.group_size
    ):
        problems.append(
            f"kv.residual {scheme.residual} is no multiple of kv.group_size {scheme.group_size}"
        )
    if scheme.hadamard and not hadamard.exists(shapes.head_dim):
        problems.append(f"kv.hadamard: no Hadamard matrix is known for head_dim {shapes.head_dim}")
    if scheme.residual < 1 and "channel" in (scheme.key_axis, scheme.value_axis):
        problems.append(
            "kv.residual 0 with groups of tokens would round a token with ones that come after it; use axis token"
        )
    return problems


def round_cache(
    x: Tensor, bits: int, group_size: int, axis: str, to_integers: Round = torch.round
) -> Tensor:
    """x [batch, heads, tokens, head_dim] rounded. axis "channel": groups of tokens, the last may be short; "token": of channels.

    to_integers: torch.round, or a rounding that lets gradients through (`numerics.training.round_through`).
    """
    if axis == "token":
        return _round_groups(x.unflatten(-1, (-1, group_size)), bits, to_integers).flatten(-2)
    tokens = x.shape[2]
    whole = tokens - tokens % group_size
    parts = []
    if whole:
        groups = (
            x[:, :, :whole].unflatten(2, (-1, group_size)).transpose(-1, -2)
        )  # [batch, heads, groups, head_dim, g]
        parts.append(_round_groups(groups, bits, to_integers).transpose(-1, -2).flatten(2, 3))
    if whole < tokens:
        parts.append(
            _round_groups(x[:, :, whole:].transpose(-1, -2), bits, to_integers).transpose(-1, -2)
        )
    return torch.cat(parts, dim=2)


def simulate(model: PreTrainedModel, scheme: KVScheme, differentiable: bool = False) -> None:
    """Let every attention of the model read a rounded cache, in place. Raises MethodError for a model with its own attention.

    differentiable: gradients pass the rounding straight through; the numbers are the same.
    """
    name = f"harness_kv_{scheme.bits}_{scheme.group_size}_{scheme.residual}_{scheme.key_axis}_{scheme.value_axis}_{scheme.hadamard}"
    name, to_integers = (
        (f"{name}_learning", round_through) if differentiable else (name, torch.round)
    )

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **more: Any,
    ) -> tuple[Tensor, None]:
        return attend(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling,
            scheme,
            to_integers=to_integers,
            **more,
        ), None

    if not getattr(model, "_supports_attention_backend", False) and not getattr(
        model, "_supports_sdpa", False
    ):
        raise MethodError(
            f"{type(model).__name__} does not let its attention be replaced; a rounded KV cache cannot be simulated"
        )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    scheme: KVScheme,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    to_integers: Round = torch.round,
    **_: Any,
) -> Tensor:
    """Attention [batch, queries, heads, head_dim] over a rounded cache.

    query [batch, heads, queries, head_dim], key and value [batch, kv_heads, tokens, head_dim], the queries being the last tokens.
    """
    if s_aux is not None or position_bias is not None:
        raise MethodError(
            "a rounded KV cache is not simulated for attention with sinks or position biases; drop scheme.kv"
        )
    repeats = query.shape[1] // key.shape[1]
    if scheme.hadamard:  # orthogonal: scores stay, outlying key channels are spread
        query, key = hadamard.transform(query), hadamard.transform(key)
    rounded_key = round_cache(key, scheme.bits, scheme.group_size, scheme.key_axis, to_integers)
    rounded_value = round_cache(
        value, scheme.bits, scheme.group_size, scheme.value_axis, to_integers
    )
    key, rounded_key, value, rounded_value = (
        t.repeat_interleave(repeats, dim=1) for t in (key, rounded_key, value, rounded_value)
    )
    tokens, queries, residual = key.shape[2], query.shape[2], scheme.residual
    t = torch.arange(tokens - queries, tokens, device=query.device)[:, None]
    j = torch.arange(tokens, device=query.device)[None]
    by_block, by_token = (residual * (t // residual), t - residual) if residual else (t + 1, t + 1)
    old_key = j < (by_block if scheme.key_axis == "channel" else by_token)
    old_value = j < (by_block if scheme.value_axis == "channel" else by_token)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (
        torch.where(old_key, query @ rounded_key.transpose(2, 3), query @ key.transpose(2, 3))
        * scale
    )
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., :tokens]
    elif queries > 1:
        scores = scores.masked_fill(j > t, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = (
        weights.masked_fill(~old_value, 0) @ rounded_value
        + weights.masked_fill(old_value, 0) @ value
    )
    return mixed.transpose(1, 2).contiguous()


def _round_groups(groups: Tensor, bits: int, to_integers: Round) -> Tensor:
    """Each run of the last axis on its own asymmetric grid, in float32."""
    x = groups.float()
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (hi - lo) / (2**bits - 1)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = to_integers(((x - lo) / safe).clamp(0, 2**bits - 1))
    return torch.where(scale > 0, codes * safe + lo, x).to(groups.dtype)
