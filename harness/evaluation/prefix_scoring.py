"""Log-likelihoods of continuations with every shared prefix computed once.

A request is a path of tokens: context, then continuation. All requests together form a trie, and the choices of one question, the
few-shot examples of one subject, the twin sentences of one schema are its common stems. A *row* is a part of that trie laid out
as one sequence: every node is one token, its position is its depth, and it attends to its ancestors alone,

    mask[i, j] = node j lies on the path from the root to node i

so that the model's numbers for a path are those that it gives to the path alone, up to the order of floating-point sums.

How much of the trie goes into one row is a matter of cost. A row of n tokens costs about n (6 d + n) in units of 4 d
multiplications per layer (d the hidden size: 24 d² for the linears of a token, 4 d for each pair in attention), masked pairs
included. A path joins the row where that costs no more than a row of its own.

lm-eval's own model computes each path by itself, and shares logits only among choices of a single token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.evaluation.protocols import LOGITS_BYTES

Tokens = np.ndarray  # [tokens] int32
# log-likelihood of the continuation; whether greedy decoding would produce it
Answer = tuple[float, bool]

ROW_TOKENS = 4096  # most tokens in a row that more than one path shares
# tokens in one forward pass, padding included; on a CPU more than fits the caches
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
# costs twice as much per token
LEAST_FILLED = 0.75  # a row shorter than this share of the longest waits for the next batch
MASK_ELEMENTS = 2**24  # of the attention masks of one forward pass


@dataclass
class Row:
    """A part of the trie. Node i has token tokens[i] at depth positions[i]; its path's earlier nodes are paths of the requests."""

    tokens: list[Tokens] = field(default_factory=list)
    # start, end, nodes on the path before start
    spans: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    # request, nodes that predict it, its targets
    picks: list[tuple[int, np.ndarray, Tokens]] = field(default_factory=list)
    length: int = 0

    def add(self, request: int, path: np.ndarray, fresh: Tokens, targets: Tokens) -> np.ndarray:
        """Append the tokens that follow the nodes of `path`; returns the nodes of the whole path."""
        nodes = np.arange(self.length, self.length + len(fresh), dtype=np.int64)
        if len(fresh):
            self.tokens.append(fresh)
            self.spans.append((self.length, self.length + len(fresh), path))
            self.length += len(fresh)
        whole = np.concatenate([path, nodes])
        self.picks.append((request, whole[len(whole) - len(targets) :], targets))
        return whole


def unsupported(model: nn.Module) -> str | None:
    """Why a model cannot be given rows: its numbers depend on more than tokens, positions and the mask; None when it can."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        return f"its attention ({implementation}) takes no mask of its own"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position_ids"
    # Asked of the model: a config may hold rope settings that its class does not use (Falcon with ALiBi).
    if getattr(config, "alibi", False):
        return "its positions are ALiBi's, which it adds to a mask of its own"
    if not any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return "it has no rotary positions"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {
        str(part.get("rope_type", "default"))
        for part in (rope, *rope.values())
        if isinstance(part, dict)
    }
    if kinds & {"dynamic", "longrope"}:
        return f"its rotary positions ({', '.join(sorted(kinds))}) depend on the length of the sequence"
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        return f"its layers ({', '.join(sorted(layers))}) do not all attend to everything before"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"it attends to a window of {config.sliding_window} tokens"
    return None


def clip(context: Tokens, continuation: Tokens, context_length: int) -> tuple[Tokens, Tokens]:
    """The model's input for a request and its targets; contexts that do not fit lose their beginning, as in lm-eval."""
    whole = np.concatenate([context, continuation])[-(context_length + 1) :]
    return whole[:-1], continuation


def plan_rows(
    requests: Sequence[tuple[Tokens, Tokens]], hidden_size: int, most_picks: int
) -> list[Row]:
    """Rows that cover all requests (input, targets). most_picks: most predictions per row, bounded by the memory of logits."""
    # Big-endian bytes sort as the tokens do, at the speed of memcmp.
    order = sorted(
        range(len(requests)), key=lambda index: requests[index][0].astype(">i4").tobytes()
    )
    rows: list[Row] = []
    row = Row()
    path = np.empty(0, np.int64)
    before = np.empty(0, np.int32)
    picks = 0
    for index in order:
        inputs, targets = requests[index]
        shared = _common(before, inputs)
        fresh = len(inputs) - shared
        joined = fresh * (6 * hidden_size + 2 * row.length + fresh)
        alone = len(inputs) * (6 * hidden_size + len(inputs))
        fits = (
            row.length + fresh <= max(ROW_TOKENS, len(inputs))
            and picks + len(targets) <= most_picks
        )
        if row.length and (joined > alone or not fits):
            rows.append(row)
            row, path, shared, picks = Row(), path[:0], 0, 0
        path = row.add(index, path[:shared], inputs[shared:], targets)
        before = inputs
        picks += len(targets)
    return [*rows, row] if row.length else rows


@torch.inference_mode()
def scores(
    model: nn.Module, requests: Sequence[tuple[Tokens, Tokens]], device: str, batch_tokens: int = 0
) -> Iterator[dict[int, Answer]]:
    """Answers by request, batch after batch; logits are read in float32.

    requests: (input, targets) from `clip`.   batch_tokens: per forward pass, 0 is BATCH_TOKENS of the device.
    """
    batch_tokens = batch_tokens or BATCH_TOKENS.get(torch.device(device).type, BATCH_TOKENS["cuda"])
    config: Any = model.config
    config = getattr(config, "text_config", None) or config
    rows = plan_rows(
        requests, int(config.hidden_size), max(1, LOGITS_BYTES // (4 * int(config.vocab_size)))
    )
    rows.sort(key=lambda row: -row.length)
    start = 0
    while start < len(rows):
        longest = rows[start].length
        most = max(1, min(batch_tokens // longest, MASK_ELEMENTS // longest**2))
        batch = [row for row in rows[start : start + most] if row.length >= LEAST_FILLED * longest]
        yield _answers(model, batch, device)
        start += len(batch)


def _answers(model: nn.Module, rows: Sequence[Row], device: str) -> dict[int, Answer]:
    longest = max(row.length for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.zeros(len(rows), longest, dtype=torch.int64)
    sees = torch.zeros(len(rows), longest, longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : row.length] = torch.from_numpy(np.concatenate(row.tokens).astype(np.int64))
        for start, end, path in row.spans:
            positions[number, start:end] = torch.arange(len(path), len(path) + end - start)
            sees[number, start:end, torch.from_numpy(path)] = True
            sees[number, start:end, start:end] = torch.ones(
                end - start, end - start, dtype=torch.bool
            ).tril()
        sees[number, row.length :, 0] = True  # padding must see something, or its softmax is NaN
    places = [
        picked + number * longest for number, row in enumerate(rows) for _, picked, _ in row.picks
    ]
    nodes = torch.from_numpy(np.concatenate(places))
    targets = torch.cat(
        [torch.from_numpy(wanted.astype(np.int64)) for row in rows for _, _, wanted in row.picks]
    ).to(device)
    unique, place = nodes.unique(return_inverse=True)
    logits = _logits_at(
        model, ids.to(device), positions.to(device), sees.to(device), unique.to(device)
    ).float()
    place = place.to(device)
    likelihoods = (logits[place, targets].double() - logits.logsumexp(-1).double()[place]).cpu()
    greedy = (logits.argmax(-1)[place] == targets).cpu()
    answers, start = {}, 0
    for row in rows:
        for request, picked, _ in row.picks:
            end = start + len(picked)
            answers[request] = (float(likelihoods[start:end].sum()), bool(greedy[start:end].all()))
            start = end
    return answers


def _logits_at(model: Any, ids: Tensor, positions: Tensor, sees: Tensor, nodes: Tensor) -> Tensor:
    """Logits [nodes, vocabulary] at flat places of the batch; the head never sees the others."""
    mask = sees[:, None]
    if model.config._attn_implementation == "eager":  # adds its mask to the scores
        dtype = next(
            parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()
        )
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(dtype).min
        )

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = arguments[0]
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, nodes.to(hidden.device)], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        return model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits[0]
    finally:
        handle.remove()


def _common(left: Tokens, right: Tokens) -> int:
    """Length of the common prefix."""
    length = min(len(left), len(right))
    differs = np.nonzero(left[:length] != right[:length])[0]
    return int(differs[0]) if len(differs) else length
