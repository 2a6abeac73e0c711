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

Formats fp8_e4m3 and fp8_e5m2 (vLLM's and llm-compressor's caches), with F = 448 or 57344 and E rounding to the format:

    x' = s E(clamp(x / s, -F, F))

s is one number for the keys and one for the values of a block ("tensor"), one per key-value head ("head"), or one per token and
head, in 16 bits ("token_head"). Static scales are max|x| / F over the calibration windows, which run through the model with
rounded weights and nothing else rounded; scale 1 is what an engine does without calibration. Key j is rounded for token t when
j < t - R, as values are. Queries are rounded on request, with a scale of their own; products are computed in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from harness.core.cell import KVScheme, to_json
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.numerics import hadamard
from harness.quantization.numerics.activations import FLOATS, Round
from harness.quantization.numerics.training import round_through

AXES = ("channel", "token")
OF_INTEGERS = ("bits", "group_size", "key_axis", "value_axis")
SMALLEST_SCALE = 2.0**-24  # of float16, in which scales per token and head are stored


def check(scheme: KVScheme, shapes: Shapes) -> list[str]:
    """Reasons why this scheme cannot be simulated on a model; empty when it can."""
    problems = _check_floats(scheme) if scheme.format != "int" else _check_integers(scheme, shapes)
    if scheme.hadamard and not hadamard.exists(shapes.head_dim):
        problems.append(f"kv.hadamard: no Hadamard matrix is known for head_dim {shapes.head_dim}")
    return problems


def _check_integers(scheme: KVScheme, shapes: Shapes) -> list[str]:
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
    if scheme.residual < 1 and "channel" in (scheme.key_axis, scheme.value_axis):
        problems.append(
            "kv.residual 0 with groups of tokens would round a token with ones that come after it; use axis token"
        )
    plain = KVScheme()
    for name in ("granularity", "scales", "queries"):
        if getattr(scheme, name) != getattr(plain, name):
            problems.append(
                f"kv.{name} {getattr(scheme, name)} belongs to 8-bit floats; leave it out, or use kv.format=fp8_e4m3"
            )
    return problems


def _check_floats(scheme: KVScheme) -> list[str]:
    plain, problems = KVScheme(), []
    for name in OF_INTEGERS:
        if getattr(scheme, name) != getattr(plain, name):
            problems.append(
                f"kv.{name} {getattr(scheme, name)} belongs to integers; leave it out with kv.format {scheme.format}"
            )
    if scheme.residual < 0:
        problems.append(f"kv.residual {scheme.residual} is negative")
    if scheme.granularity == "group":
        problems.append(
            f"kv.format {scheme.format} has no groups; use kv.granularity=tensor, head or token_head"
        )
    elif scheme.granularity == "token_head" and scheme.scales != "dynamic":
        problems.append(
            f"scales per token and head are those of the token itself, not {scheme.scales}; use kv.scales=dynamic"
        )
    elif scheme.granularity != "token_head" and scheme.scales == "dynamic":
        problems.append(
            f"a dynamic scale per {scheme.granularity} would round a token with ones that come after it; use "
            "kv.scales=static or one, or kv.granularity=token_head"
        )
    return problems


def cache_bits(scheme: KVScheme, head_dim: int) -> float:
    """Bits per cached element behind the residual window: a code and its share of the scales, and minima, in 16 bits."""
    if scheme.format == "int":
        return scheme.bits + 32 / scheme.group_size
    return 8 + (16 / head_dim if scheme.granularity == "token_head" else 0)


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
        # [batch, heads, groups, head_dim, g]
        groups = x[:, :, :whole].unflatten(2, (-1, group_size)).transpose(-1, -2)
        parts.append(_round_groups(groups, bits, to_integers).transpose(-1, -2).flatten(2, 3))
    if whole < tokens:
        parts.append(
            _round_groups(x[:, :, whole:].transpose(-1, -2), bits, to_integers).transpose(-1, -2)
        )
    return torch.cat(parts, dim=2)


@dataclass
class Magnitudes:
    """Largest magnitudes that one attention has seen, [kv_heads] of keys and values and [heads] of queries, float32.

    Keys and queries after rotary embedding, and after the rotation where the scheme has one.
    """

    key: Tensor
    value: Tensor
    query: Tensor

    def widen(self, other: Magnitudes) -> None:
        """The larger of both; NaN stays."""
        for name in ("key", "value", "query"):
            own = getattr(self, name)
            setattr(self, name, torch.maximum(own, getattr(other, name).to(own.device)))


def round_floats(x: Tensor, scheme: KVScheme, largest: Tensor | None) -> Tensor:
    """x [batch, heads, tokens, head_dim] in an 8-bit float format, in x's dtype; computed in float32.

    largest: magnitudes [heads] of static scales.
    """
    target = FLOATS[scheme.format]
    top, wide = torch.finfo(target).max, x.float()
    scale: Tensor | float = 1.0
    if scheme.scales == "static":
        assert largest is not None
        scale = static_scale(largest.to(x.device), scheme)[:, None, None]
    elif scheme.scales == "dynamic":
        found = wide.abs().amax(-1, keepdim=True)
        stored = (found / top).clamp(min=SMALLEST_SCALE).half().float()
        scale = torch.where(found > 0, stored, 1.0)
    return ((wide / scale).clamp(-top, top).to(target).float() * scale).to(x.dtype)


def static_scale(largest: Tensor, scheme: KVScheme) -> Tensor:
    """Scales [heads] of largest magnitudes [heads]: 1 where that is 0, the same for all heads with granularity tensor."""
    if scheme.granularity == "tensor":
        largest = largest.amax().expand_as(largest)
    return torch.where(largest > 0, largest / torch.finfo(FLOATS[scheme.format]).max, 1.0)


def simulate(model: PreTrainedModel, scheme: KVScheme, differentiable: bool = False) -> None:
    """Let every attention of the model read a rounded cache, in place. Raises MethodError for a model with its own attention,
    and for static scales where `observe` has not seen calibration data, or these are not finite.

    differentiable: gradients pass the rounding of integers straight through; the numbers are the same.
    """
    if scheme.scales == "static":
        _require_magnitudes(model)
    if differentiable:
        _implement(model, scheme, "learning", to_integers=round_through)
    else:
        _implement(model, scheme, "rounded")


def observe(model: PreTrainedModel, scheme: KVScheme) -> None:
    """Let every attention of the model read its cache as it is, and keep the largest magnitudes for static scales, in place."""
    for module in model.modules():
        if hasattr(module, "kv_magnitudes"):
            del module.kv_magnitudes

    _implement(model, scheme, "observing", observing=True)


def _implement(model: PreTrainedModel, scheme: KVScheme, use: str, **options: Any) -> None:
    """Make `attend` with these options the attention of a model. All models of the process find it under its name, which says
    scheme and use; what is of one model stays in its modules."""

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
            module, query, key, value, attention_mask, scaling, scheme, **options, **more
        ), None

    if not getattr(model, "_supports_attention_backend", False) and not getattr(
        model, "_supports_sdpa", False
    ):
        raise MethodError(
            f"{type(model).__name__} does not let its attention be replaced; a rounded KV cache cannot be simulated"
        )
    name = "_".join(["harness_kv", *map(str, to_json(scheme).values()), use])
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)


def _observed(model: nn.Module) -> Iterator[Magnitudes]:
    """What the attentions of a model have seen, in the order of the blocks."""
    for module in model.modules():
        found = getattr(module, "kv_magnitudes", None)
        if isinstance(found, Magnitudes):
            yield found


def _require_magnitudes(model: nn.Module) -> None:
    seen = list(_observed(model))
    if not seen:
        raise MethodError("static KV scales need calibration data before the model runs")
    broken = [
        str(block)
        for block, found in enumerate(seen)
        if not all(bool(t.isfinite().all()) for t in (found.key, found.value, found.query))
    ]
    if broken:
        raise MethodError(
            f"keys, values or queries of block {', '.join(broken)} hold NaN or infinity on the calibration data; load the model "
            "in a wider dtype (model.dtype=float32), or use more bits for its weights"
        )


def facts(model: nn.Module, scheme: KVScheme, head_dim: int) -> dict[str, Any]:
    """What the record says of a rounded cache: bits per element, and for 8-bit floats max|x| / F of each block's keys and values.

    With static scales these are of the calibration windows, and the largest scales; else of what the model has read so far.
    """
    found: dict[str, Any] = {"bits": cache_bits(scheme, head_dim)}
    seen = list(_observed(model))
    if scheme.format == "int" or not seen:
        return found
    top = torch.finfo(FLOATS[scheme.format]).max
    for name in ("key", "value"):
        found[f"largest_{name}s"] = [float(getattr(block, name).amax()) / top for block in seen]
    return found


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
    observing: bool = False,
    **_: Any,
) -> Tensor:
    """Attention [batch, queries, heads, head_dim] over a rounded cache.

    query [batch, heads, queries, head_dim], key and value [batch, kv_heads, tokens, head_dim], the queries being the last tokens.
    observing: nothing is rounded, and the largest magnitudes are kept in the module.
    """
    if s_aux is not None or position_bias is not None:
        raise MethodError(
            "a rounded KV cache is not simulated for attention with sinks or position biases; drop scheme.kv"
        )
    repeats = query.shape[1] // key.shape[1]
    if scheme.hadamard:  # orthogonal: scores stay, outlying key channels are spread
        query, key = hadamard.transform(query), hadamard.transform(key)
    if scheme.format == "int":
        rounded_key = round_cache(key, scheme.bits, scheme.group_size, scheme.key_axis, to_integers)
        rounded_value = round_cache(
            value, scheme.bits, scheme.group_size, scheme.value_axis, to_integers
        )
    else:
        query, rounded_key, rounded_value = _in_floats(module, query, key, value, scheme, observing)
    key, rounded_key, value, rounded_value = (
        t.repeat_interleave(repeats, dim=1) for t in (key, rounded_key, value, rounded_value)
    )
    tokens, queries, residual = key.shape[2], query.shape[2], scheme.residual
    t = torch.arange(tokens - queries, tokens, device=query.device)[:, None]
    j = torch.arange(tokens, device=query.device)[None]
    by_block, by_token = (residual * (t // residual), t - residual) if residual else (t + 1, t + 1)
    by_groups = scheme.format == "int"
    old_key = j < (by_block if by_groups and scheme.key_axis == "channel" else by_token)
    old_value = j < (by_block if by_groups and scheme.value_axis == "channel" else by_token)
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


def _in_floats(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scheme: KVScheme, observing: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in an 8-bit float format; as they are while observing. Keeps their magnitudes where no scale is
    fixed."""
    seen: Magnitudes | None = getattr(module, "kv_magnitudes", None)
    if observing or scheme.scales != "static":
        largest = [x.detach().float().abs().amax((0, 2, 3)) for x in (key, value, query)]
        if seen is None:
            module.kv_magnitudes = Magnitudes(*largest)  # type: ignore[assignment]
        else:
            seen.widen(Magnitudes(*largest))
    if observing:
        return query, key, value
    fixed: tuple[Tensor | None, ...] = (None, None, None)
    if scheme.scales == "static":
        if seen is None:
            raise MethodError("static KV scales need calibration data before the model runs")
        fixed = (seen.query, seen.key, seen.value)
    if scheme.queries:
        query = round_floats(query, scheme, fixed[0])
    return query, round_floats(key, scheme, fixed[1]), round_floats(value, scheme, fixed[2])


def _round_groups(groups: Tensor, bits: int, to_integers: Round) -> Tensor:
    """Each run of the last axis on its own asymmetric grid, in float32."""
    x = groups.float()
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (hi - lo) / (2**bits - 1)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = to_integers(((x - lo) / safe).clamp(0, 2**bits - 1))
    return torch.where(scale > 0, codes * safe + lo, x).to(groups.dtype)
