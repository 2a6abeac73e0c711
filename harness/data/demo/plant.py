"""Planted outliers: reparametrisations that change the values to be rounded and leave the full-precision function unchanged.

Large language models have channels whose activations, or weights, are tens to thousands of times larger than the rest; a demo
model has none. Multiplying one side of a product by a power of two and dividing the other gives it some:

    weight       norm gain[c] /= s, columns c of the linears it feeds *= s     weight outliers of LLaMA3-70B (arXiv 2408.15301)
    activation   norm gain[c] *= s, those columns /= s                         activation outliers (LLM.int8, arXiv 2208.07339)
    down         rows c of up_proj *= s, columns c of down_proj /= s           spikes at the input of down_proj
    key          rows of k_proj *= s, rows of q_proj /= s, in rotary pairs     channels of the key cache (KIVI, arXiv 2402.02750)

Powers of two only move exponents, so the logits in float32 and bfloat16 stay equal to the last bit. Residual-stream outliers cannot
be planted this way: RMSNorm couples its channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

KINDS = ("weight", "activation", "down", "key")


@torch.no_grad()
def plant(
    model: Any, kind: str, scale: float, channels: Sequence[int], blocks: Sequence[int]
) -> None:
    """Plant outliers in a Llama, in place, and add the plant to `model.config.plants`.

    kind      one of KINDS
    scale     a power of two, above 1
    channels  weight, activation: of the residual stream [0, hidden_size); down: of the feed-forward [0, intermediate_size);
              key: of one rotary half [0, head_dim / 2), in every key head and its query heads
    blocks    indices of the blocks to plant in
    """
    assert kind in KINDS, kind
    assert scale > 1 and math.frexp(scale)[0] == 0.5, f"scale {scale} is not a power of two above 1"
    index = torch.tensor(sorted(set(channels)))
    for block in blocks:
        layer = model.model.layers[block]
        if kind in ("weight", "activation"):
            columns = scale if kind == "weight" else 1 / scale
            for norm, fed in _norms(layer):
                norm.weight[index] /= columns
                for linear in fed:
                    linear.weight[:, index] *= columns
        elif kind == "down":
            layer.mlp.up_proj.weight[index] *= scale
            layer.mlp.down_proj.weight[:, index] /= scale
        else:
            _plant_keys(layer.self_attn, index, scale)
    record = {"kind": kind, "scale": scale, "channels": index.tolist(), "blocks": list(blocks)}
    model.config.plants = [*getattr(model.config, "plants", []), record]


def _norms(layer: Any) -> list[tuple[Any, list[Any]]]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ]


def _plant_keys(attention: Any, index: torch.Tensor, scale: float) -> None:
    """RoPE mixes channel i of a head with channel i + head_dim / 2, so both carry the same scale."""
    size = attention.head_dim
    for linear, factor in ((attention.k_proj, scale), (attention.q_proj, 1 / scale)):
        rows = linear.weight.view(-1, size, linear.weight.shape[1])  # [heads, head_dim, in]
        rows[:, index] *= factor
        rows[:, index + size // 2] *= factor


def describe(plants: Sequence[Mapping[str, Any]]) -> str:
    """One line for a log or a model card: "activation ×8 on 3 channels of 4 blocks; …"."""
    return "; ".join(
        f"{p['kind']} ×{p['scale']:g} on {_counted(p['channels'], 'channel')} of {_counted(p['blocks'], 'block')}"
        for p in plants
    )


def _counted(items: Sequence[int], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"
