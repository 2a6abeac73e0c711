"""Text that a model writes after a prompt, greedily, one prompt after another as in arXiv 2402.16775. No evaluator by itself.

Logits that are not numbers choose no token: their largest would be token 0, and the text of a model that overflowed would be
scored like any other. Such a text counts as no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.core.errors import EvaluationError
from harness.evaluation.protocols import Subject


def prompt_tokens(subject: Subject, prompt: str, chat: bool) -> list[int]:
    """Tokens of a prompt. chat: inside the tokenizer's chat template, which must then exist."""
    tokenizer = subject.tokenizer
    if not chat:
        return [int(token) for token in tokenizer(prompt)["input_ids"]]
    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError(
            f"{subject.cell.title}: the tokenizer has no chat template; set chat=false"
        )
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


@dataclass(frozen=True)
class Completion:
    """text: None where a logit was no number; truncated: the beginning of the prompt did not fit and was left out."""

    text: str | None
    truncated: bool


class NumberWatch:
    """A logits processor of transformers' `generate` that remembers the sequences whose logits choose no token.

    These have NaN or infinity as their largest. Their logits become 0, so that sampling from them does not raise; others stay.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None  # [sequences] bool, on the model's device

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~scores.max(-1).values.isfinite()
        self._bad = bad if self._bad is None else self._bad | bad
        return torch.where(
            bad[:, None], torch.zeros((), dtype=scores.dtype, device=scores.device), scores
        )

    def lost(self, prompts: int) -> list[bool]:
        """Whether a sequence of each prompt had such logits; with beams a prompt has several."""
        if self._bad is None:
            return [False] * prompts
        return [bool(each) for each in self._bad.view(prompts, -1).any(1).tolist()]


@torch.inference_mode()
def complete(
    subject: Subject, prompt: str, new_tokens: int, chat: bool = False, stop: Sequence[str] = ()
) -> Completion:
    """The text after a prompt: greedy, at most new_tokens tokens, up to the first of the strings in `stop`.

    The beginning of a prompt that is too long for the model's context is left out.
    """
    tokens = prompt_tokens(subject, prompt, chat)
    context, truncated = subject.context_length(), False
    if context is not None:
        if new_tokens >= context:
            raise EvaluationError(
                f"{subject.cell.title}: {new_tokens} new tokens do not fit a context of {context}; lower new_tokens"
            )
        truncated = len(tokens) > context - new_tokens
        tokens = tokens[-(context - new_tokens) :]
    model: Any = subject.model
    ends = _end_tokens(subject)
    inputs = torch.tensor([tokens], device=subject.device)
    written: list[int] = []
    text, past = "", None
    for _ in range(new_tokens):
        output = model(input_ids=inputs, past_key_values=past, use_cache=True)
        past, logits = output.past_key_values, output.logits[0, -1]
        if not bool(logits.max().isfinite()):  # NaN is the largest of what it stands among
            return Completion(None, truncated)
        token = int(logits.argmax())
        if token in ends:
            break
        written.append(token)
        text = subject.tokenizer.decode(written, skip_special_tokens=True)
        if any(string in text for string in stop):
            break
        inputs = torch.tensor([[token]], device=subject.device)
    end = min((text.index(string) for string in stop if string in text), default=len(text))
    return Completion(text[:end], truncated)


def _end_tokens(subject: Subject) -> set[int]:
    configured = getattr(getattr(subject.model, "generation_config", None), "eos_token_id", None)
    named = configured if isinstance(configured, list) else [configured]
    return {
        int(token)
        for token in (*named, getattr(subject.tokenizer, "eos_token_id", None))
        if token is not None
    }
