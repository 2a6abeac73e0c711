"""Tools that reductions share: which blocks of a config can be dropped, the config without them, how much a block changes; target
shapes of Llama and models of its structure, and what is cut of their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.core.shapes import Shapes

# lists whose length has nothing to do with the number of blocks, or which name blocks
NOT_BY_BLOCK = ("_token_id", "_token_ids", "architectures", "plants", "mlp_only_layers")

# Llama and models of its structure: the linears and norms of a block, and the tensors outside the blocks
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT, DOWN = "self_attn.o_proj", "mlp.down_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
NORMS = {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}
EMBEDDINGS, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def check_blocks(config: Mapping[str, Any]) -> list[str]:
    """Reasons why no block can be dropped: fields that derive a pattern from the index of a block, which dropping would shift."""
    text = text_of(config)
    by_block = isinstance(text.get("layer_types"), list)
    reasons = []
    if (text.get("decoder_sparse_step") or 1) > 1:
        reasons.append(
            f"decoder_sparse_step {text['decoder_sparse_step']} says which blocks are mixtures by their index, which would shift"
        )
    if text.get("first_k_dense_replace"):
        reasons.append(
            f"first_k_dense_replace {text['first_k_dense_replace']} says which blocks are dense by their index, which would shift"
        )
    pattern = text.get("sliding_window_pattern") or text.get("layer_group_size")
    if isinstance(pattern, int) and pattern > 1 and not by_block:
        reasons.append(
            f"a pattern of windows that repeats every {pattern} blocks would shift, and config.json has no layer_types"
        )
    if text.get("use_sliding_window") and not by_block:
        reasons.append("max_window_layers says which blocks have a window by their index")
    return reasons


def without_blocks(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The config with the blocks `kept` alone, in order; lists with an entry per block, and lists of block numbers, are cut too."""
    new, text = dict(config), dict(text_of(config))
    count = text["num_hidden_layers"]
    for name, value in text.items():
        if isinstance(value, list) and len(value) == count and not name.endswith(NOT_BY_BLOCK):
            text[name] = [value[index] for index in kept]
    if text.get("mlp_only_layers"):
        text["mlp_only_layers"] = [
            number for number, index in enumerate(kept) if index in text["mlp_only_layers"]
        ]
    if isinstance(text.get("max_window_layers"), int):
        windows = text["max_window_layers"]
        text["max_window_layers"] = sum(index < windows for index in kept)
    text["num_hidden_layers"] = len(kept)
    return new | text if text_of(config) is config else {**new, "text_config": text}


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """The cosine of each pair of vectors [..., hidden], in float32; 0.5 where one of them is zero."""
    a, b = first.float(), second.float()
    return torch.nan_to_num((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)), nan=0.5)


def mean_cosine(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """The mean over all tokens of the cosine between a block's input and its output, one [1, length, hidden] per sequence."""
    total, tokens = 0.0, 0
    for given, made in zip(inputs, outputs, strict=True):
        found = cosines(given, made)
        total, tokens = total + float(found.double().sum()), tokens + found.numel()
    return total / tokens


@dataclass(frozen=True)
class TargetShape:
    """How many blocks, MLP channels, key-value heads (with their query heads) and channels of the residual stream are kept; 0: all.

    Raises ValueError for a negative number.
    """

    blocks: int = 0
    intermediate: int = 0
    kv_heads: int = 0
    hidden: int = 0

    def __post_init__(self) -> None:
        numbers = (self.blocks, self.intermediate, self.kv_heads, self.hidden)
        if any(number < 0 for number in numbers):
            raise ValueError(
                f"blocks, intermediate, kv_heads and hidden are numbers, not {numbers}"
            )

    def check(self, shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
        """Reasons why a model cannot be cut to this shape: another structure, nothing to cut, or more than it has."""
        if shapes.family != "llama":
            return [
                f'shapes are cut of Llama and models of its structure, not of family "{shapes.family}"'
            ]
        have = sizes(shapes, config)
        wanted = {name: getattr(self, name) for name in have}
        reasons = check_blocks(config) if self.blocks else []
        reasons += [
            f"{name} {wanted[name]}: this model has {have[name]}, and no more can be kept"
            for name in have
            if wanted[name] > have[name]
        ]
        if not any(0 < wanted[name] < have[name] for name in have):
            reasons.append(
                "nothing would be removed; set reduction.blocks, reduction.intermediate, reduction.kv_heads or reduction.hidden "
                "below what the model has"
            )
        return reasons

    def config(
        self, config: Mapping[str, Any], blocks: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """The config with this shape; head_dim is stated, since hidden_size no longer says it. blocks: those that are kept; None in
        a plan, which needs their number alone."""
        text = text_of(config)
        first = range(self.blocks or text["num_hidden_layers"])
        new = without_blocks(config, first if blocks is None else blocks)
        own = dict(text_of(new))
        heads = own["num_attention_heads"]
        kv_heads = own.get("num_key_value_heads") or heads
        own["head_dim"] = own.get("head_dim") or own["hidden_size"] // heads
        if self.kv_heads:
            own["num_attention_heads"] = heads // kv_heads * self.kv_heads
            own["num_key_value_heads"] = self.kv_heads
        own["intermediate_size"] = self.intermediate or own["intermediate_size"]
        own["hidden_size"] = self.hidden or own["hidden_size"]
        return own if text_of(new) is new else {**new, "text_config": own}


def sizes(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, int]:
    """What a model has of each dimension of a `TargetShape`."""
    return {
        "blocks": shapes.blocks,
        "intermediate": text_of(config)["intermediate_size"],
        "kv_heads": shapes.kv_heads,
        "hidden": shapes.hidden_size,
    }


def head_channels(kv_heads: Sequence[int], shapes: Shapes, *, queries: bool) -> list[int]:
    """The output channels of key-value heads, or those of their query heads."""
    width = shapes.head_dim * (shapes.heads // shapes.kv_heads if queries else 1)
    return [head * width + channel for head in kv_heads for channel in range(width)]


class Cut:
    """What is kept of one block's tensors: channels of the residual stream and of the MLP, key-value heads with their queries."""

    def __init__(
        self,
        hidden: Sequence[int],
        channels: Sequence[int],
        kv_heads: Sequence[int],
        shapes: Shapes,
    ) -> None:
        queries = head_channels(kv_heads, shapes, queries=True)
        keys = head_channels(kv_heads, shapes, queries=False)
        self._hidden = list(hidden)
        self._rows = {QKV[0]: queries, QKV[1]: keys, QKV[2]: keys}
        self._rows |= {name: list(channels) for name in GATE_UP}
        self._columns = {OUTPUT: queries, DOWN: list(channels)}

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """The kept part of a tensor, by its name within the block; a tensor along none of these dimensions stays whole."""
        owner, _, leaf = name.rpartition(".")
        if owner in NORMS:
            return tensor[self._hidden]
        if owner in self._rows:
            rows = tensor[self._rows[owner]]
            return rows[:, self._hidden] if leaf == "weight" else rows
        if owner in self._columns:
            kept = tensor[:, self._columns[owner]] if leaf == "weight" else tensor
            return kept[self._hidden]
        return tensor

    def end(self, name: str, tensor: Tensor) -> Tensor:
        """The kept part of a tensor outside the blocks."""
        if name in (EMBEDDINGS, HEAD):
            return tensor[:, self._hidden]
        return tensor[self._hidden] if name == FINAL_NORM else tensor
