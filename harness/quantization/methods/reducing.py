"""Tools that reductions share: which blocks of a config can be dropped, the config without them, how much a block changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# lists whose length has nothing to do with the number of blocks, or which name blocks
NOT_BY_BLOCK = ("_token_id", "_token_ids", "architectures", "plants", "mlp_only_layers")


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
