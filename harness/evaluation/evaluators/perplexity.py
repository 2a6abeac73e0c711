"""Perplexity per token, by the rule that the quantization papers share.

GPTQ (2210.17323), AWQ (2306.00978), OmniQuant (2308.13137), SmoothQuant (2211.10438) and the LLaMA3 study (2404.14047) agree on:
the text joined and tokenized once, windows of L tokens without overlap, the tail dropped, cross entropy averaged over the L - 1
targets of each window, and

    perplexity = exp(mean over windows of the window's mean loss)

The first token of a window is never a target. Over whole documents (`windows: documents`), whose lengths differ, the mean is
taken over all targets instead, and its standard error is that of a ratio. Where we differ: the loss is computed in float32 whatever
the model's dtype (GPTQ's code leaves float16 logits as they are, which moves the third decimal), and a limit divides by the windows
that were read.

lm-eval's tasks `wikitext` and `c4` are another metric (per word, rolling, over detokenized pages); never compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from harness.core.cell import Evaluation, Model
from harness.core.errors import EvaluationError
from harness.core.events import Progress
from harness.evaluation.protocols import Score, Subject, finite
from harness.evaluation.statistics import mean_error
from harness.evaluation.windows import WindowSettings, check_windows, read_windows, window_batches


class Evaluator:
    """Perplexity of one text."""

    version = 2
    # text:notes.txt is the perplexity of a file, in windows of the model's length
    without_yaml: ClassVar[dict[str, Any]] = {"text": ("source", {"length": 0})}
    metrics: ClassVar[dict[str, dict[str, Any]]] = {
        "perplexity": {"higher_is_better": False, "unit": "per token"}
    }

    @dataclass(frozen=True)
    class Settings(WindowSettings):
        """Those of the windows."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, evaluation: Evaluation, model: Model) -> list[str]:
        return check_windows(self.settings, model)

    def score(self, subject: Subject, evaluation: Evaluation) -> Iterator[Progress | Score]:
        windows = read_windows(self.settings, subject)[: evaluation.limit]
        losses = torch.full((len(windows),), math.nan, dtype=torch.float64)
        targets = torch.tensor([len(window) - 1 for window in windows], dtype=torch.float64)
        done = 0
        yield subject.progress(evaluation, 0, len(windows))
        for indices, ids in window_batches(windows, subject):
            losses[indices] = window_losses(
                subject.model, ids, [len(windows[index]) for index in indices]
            )
            done += len(indices)
            yield subject.progress(evaluation, done, len(windows))
        yield self._score(evaluation, windows, losses, targets)

    def _score(
        self, evaluation: Evaluation, windows: Sequence[Tensor], losses: Tensor, targets: Tensor
    ) -> Score:
        mean = float((losses * targets).sum() / targets.sum())
        perplexity = exponential(mean)
        name = f"{evaluation.name}/perplexity"
        spread = mean_error(losses.numpy(), targets.numpy())[1]
        details: dict[str, Any] = {
            "length": max(len(window) for window in windows),
            "windows": len(windows),
            "tokens": int(targets.sum()),
            "recipe": self.settings.windows,
            "mean_loss": finite(mean),
        }
        if not math.isfinite(perplexity):
            details["diverged"] = True
            details["diverged_windows"] = (~losses.isfinite()).nonzero().flatten().tolist()
        if evaluation.limit is not None:
            details["smoke"] = True
        items = {
            "id": list(range(len(windows))),
            "loss": losses.tolist(),
            "tokens": [int(count) for count in targets],
        }
        stderr = {name: perplexity * spread} if math.isfinite(perplexity * spread) else {}
        return Score({name: perplexity}, stderr, items, details)


@torch.inference_mode()
def window_losses(model: torch.nn.Module, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean loss over the targets of each window, [windows] float64, from ids [windows, length] padded on the right.

    Raises EvaluationError when the model's logits are not of that shape.
    """
    logits = model(input_ids=ids, use_cache=False).logits
    if logits.shape[:2] != ids.shape:
        raise EvaluationError(
            f"the model gave logits {list(logits.shape)} for token ids {list(ids.shape)}"
        )
    rows = []
    # row by row: one float32 copy of [length, vocabulary]
    for window, row, length in zip(ids, logits, lengths, strict=True):
        losses = functional.cross_entropy(
            row[: length - 1].float(), window[1:length], reduction="none"
        )
        rows.append(losses.double().mean())
    return torch.stack(rows).cpu()


def exponential(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
