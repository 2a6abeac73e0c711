"""Text that a model writes after a prompt, greedily, one prompt after another as in arXiv 2402.16775. No evaluator by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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


@torch.inference_mode()
def complete(
    subject: Subject, prompt: str, new_tokens: int, chat: bool = False, stop: Sequence[str] = ()
) -> str:
    """The text after a prompt: greedy, at most new_tokens tokens, up to the first of the strings in `stop`.

    The beginning of a prompt that is too long for the model's context is left out.
    """
    tokens = prompt_tokens(subject, prompt, chat)
    context = subject.context_length()
    if context is not None:
        if new_tokens >= context:
            raise EvaluationError(
                f"{subject.cell.title}: {new_tokens} new tokens do not fit a context of {context}"
            )
        tokens = tokens[-(context - new_tokens) :]
    model: Any = subject.model
    ends = _end_tokens(subject)
    inputs = torch.tensor([tokens], device=subject.device)
    written: list[int] = []
    text, past = "", None
    for _ in range(new_tokens):
        output = model(input_ids=inputs, past_key_values=past, use_cache=True)
        past, token = output.past_key_values, int(output.logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        text = subject.tokenizer.decode(written, skip_special_tokens=True)
        if any(string in text for string in stop):
            break
        inputs = torch.tensor([[token]], device=subject.device)
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def _end_tokens(subject: Subject) -> set[int]:
    configured = getattr(getattr(subject.model, "generation_config", None), "eos_token_id", None)
    named = configured if isinstance(configured, list) else [configured]
    return {
        int(token)
        for token in (*named, getattr(subject.tokenizer, "eos_token_id", None))
        if token is not None
    }
