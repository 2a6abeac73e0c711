"""Subjects for tests of evaluators: small real or random models without a sweep around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from harness.core.cell import Cell, Method, Model, Scheme
from harness.evaluation.protocols import Progress, Score, Subject


def stories(
    shared: Path, batch_size: int = 0, cache: Path | None = None, name: str = "stories260K"
) -> Subject:
    """One of the trained models beside the checkout."""
    folder = shared / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cell = Cell(Model(name, str(folder)), Method("none"), Scheme("full"))
    return Subject(
        cell, model, AutoTokenizer.from_pretrained(folder), "cpu", batch_size, {}, folder, cache
    )


def random_llama(vocabulary: int, context: int = 512, **changes: Any) -> LlamaForCausalLM:
    """A tiny Llama with random weights; the same every time."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=context, **settings)
    ).eval()


def last(events: Any) -> Score:
    """The score of an evaluation; its events before that are progress that ends complete."""
    *progress, score = list(events)
    assert all(isinstance(event, Progress) for event in progress) and isinstance(score, Score)
    if progress:
        assert progress[-1].step == progress[-1].steps > 0
    return score
