"""How far a model's predictions are from those of its full-precision source, token by token.

The cheapest and most sensitive signal: errors that cancel in an accuracy do not cancel here. Over the windows of a text,

    kl               mean over tokens of  sum_v p(v) (log p(v) - log q(v)),  natural logarithm, p full precision, q the subject
    top1_agreement   share of tokens whose most likely next token is the same
    delta_nll        mean over targets of  log p(target) - log q(target);  may be negative

Full precision is the source model in the cell's dtype, on the subject's device. Its log-probabilities are stored once for each
(model, text, length, top_k) below the subject's cache and read window by window by every later cell; while they are made, both
models are in memory. With `top_k`, only the k most likely tokens of p are kept and the rest counts as one symbol, so that kl is a
lower bound; a vocabulary of 128,000 in full is 1 GB for 2,048 tokens. Windows count by their tokens, or targets, in the standard
errors as in the means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.core.cell import Evaluation, Model, baseline_of, digest
from harness.core.errors import EvaluationError, ModelError
from harness.core.events import Progress
from harness.data import model_folders
from harness.evaluation.protocols import Score, Subject
from harness.evaluation.statistics import mean_error
from harness.evaluation.windows import (
    WindowSettings,
    check_windows,
    read_windows,
    tokenizer_digest,
    write_tensors,
)


class Evaluator:
    """Divergence from full precision over one text."""

    version = 2
    metrics: ClassVar[dict[str, dict[str, Any]]] = {
        "kl": {"higher_is_better": False, "unit": "nats per token"},
        "kl_median": {"higher_is_better": False, "unit": "nats per token"},
        "kl_p99": {"higher_is_better": False, "unit": "nats per token"},
        "kl_max": {"higher_is_better": False, "unit": "nats per token"},
        "top1_agreement": {"higher_is_better": True, "unit": "share of tokens"},
        "delta_nll": {"higher_is_better": False, "unit": "nats per token"},
    }

    @dataclass(frozen=True)
    class Settings(WindowSettings):
        """Those of the windows, and top_k: most likely tokens of the reference that are kept; 0: the whole vocabulary."""

        max_windows: int | None = 16
        top_k: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.top_k < 0:
                raise ValueError(f"top_k={self.top_k}: not negative (0: the whole vocabulary)")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, evaluation: Evaluation, model: Model) -> list[str]:
        return check_windows(self.settings, model)

    def score(self, subject: Subject, evaluation: Evaluation) -> Iterator[Progress | Score]:
        windows = read_windows(self.settings, subject)[: evaluation.limit]
        reference = Reference(subject, self.settings.top_k)
        kl, agree, delta = [], [], []
        yield subject.progress(evaluation, 0, len(windows))
        # one by one, so that the reference does not depend on a batch size
        for number, window in enumerate(windows):
            ids = window.to(subject.device)
            against = {
                name: tensor.to(subject.device) for name, tensor in reference.of(window).items()
            }
            log_q = log_probabilities(subject.model, ids)
            kl.append(divergences(against, log_q).cpu())
            agree.append(agreement(against, log_q).cpu())
            delta.append(
                (against["targets"].double() - target_log_probabilities(log_q, ids).double()).cpu()
            )
            yield subject.progress(evaluation, number + 1, len(windows))
        yield self._score(evaluation, kl, agree, delta)

    def _score(
        self, evaluation: Evaluation, kl: list[Tensor], agree: list[Tensor], delta: list[Tensor]
    ) -> Score:
        values = torch.cat(kl)  # sorted below, where NaN would stand behind the 99th percentile
        ordered = (
            values.sort().values
            if not bool(values.isnan().any())
            else torch.full_like(values, math.nan)
        )
        found = {
            "kl": float(values.mean()),
            "kl_median": float(values.median()),
            "kl_max": float(values.max()),
            "kl_p99": float(ordered[math.ceil(0.99 * len(values)) - 1]),
            "top1_agreement": float(torch.cat(agree).mean()),
            "delta_nll": float(torch.cat(delta).mean()),
        }
        details: dict[str, Any] = {
            "windows": len(kl),
            "tokens": len(values),
            "top_k": self.settings.top_k,
        }
        if not bool(values.isfinite().all()):
            details["diverged"] = True
        if evaluation.limit is not None:
            details["smoke"] = True
        items: dict[str, list[Any]] = {
            "id": list(range(len(kl))),
            "kl": [float(one.mean()) for one in kl],
            "top1_agreement": [float(one.mean()) for one in agree],
            "delta_nll": [float(one.mean()) for one in delta],
            "tokens": [len(one) for one in kl],
            "targets": [len(one) for one in delta],
        }
        stderr = {}
        for name, weights in (
            ("kl", "tokens"),
            ("top1_agreement", "tokens"),
            ("delta_nll", "targets"),
        ):
            spread = mean_error(items[name], items[weights])[1]
            if math.isfinite(spread):
                stderr[f"{evaluation.name}/{name}"] = spread
        return Score(
            {f"{evaluation.name}/{name}": value for name, value in found.items()},
            stderr,
            items,
            details,
        )


class Reference:
    """Log-probabilities of the full-precision model for one window after another, from the cache where they are.

    A window's tensors: "top" [length], the most likely token; "targets" [length - 1], log-probability of the token that follows;
    and "log_p" [length, vocabulary], or with top_k "log_p" [length, k] of the tokens "tokens" [length, k].
    """

    def __init__(self, subject: Subject, top_k: int) -> None:
        self.subject = subject
        self.top_k = top_k
        self._model: nn.Module | None = None
        self._folder = subject.cache / "reference" / self._key() if subject.cache else None

    def of(self, window: Tensor) -> dict[str, Tensor]:
        file = self._file(window)
        if file is not None and file.is_file():
            return load_file(file)
        ids = window.to(self.subject.device)
        log_p = log_probabilities(self._full_precision(), ids)
        found = {
            "top": log_p.argmax(-1),
            "targets": target_log_probabilities(log_p, ids),
            "log_p": log_p,
        }
        if self.top_k:
            kept = log_p.topk(min(self.top_k, log_p.shape[-1]), dim=-1)
            found |= {"log_p": kept.values, "tokens": kept.indices}
        if file is not None:
            write_tensors(file, {name: tensor.contiguous().cpu() for name, tensor in found.items()})
        return found

    def _file(self, window: Tensor) -> Path | None:
        return self._folder / f"{digest(window.tolist())}.safetensors" if self._folder else None

    def _key(self) -> str:
        model = self.subject.cell.model
        weights = model.digest or model_folders.model_digest(str(self.subject.model_folder))
        return digest(
            [weights, model.dtype, tokenizer_digest(self.subject.model_folder), self.top_k]
        )

    def _full_precision(self) -> nn.Module:
        cell = self.subject.cell
        if cell.method.is_baseline and cell.scheme.activation is None and cell.scheme.kv is None:
            return self.subject.model
        if self._model is None:
            from harness.quantization.inference import load, placement

            try:  # the baseline's own loader, so that the reference is the model that tables call full precision
                loaded, _ = load.load(baseline_of(cell), self.subject.model_folder, None)
            except ModelError as error:
                raise EvaluationError(
                    f"{cell.model.name}: the full-precision reference cannot be loaded: {error}"
                ) from error
            placed = getattr(self.subject.model, "hf_device_map", None)
            if placed:
                placement.spread(loaded, placed)
            self._model = (loaded if placed else loaded.to(self.subject.device)).eval()
        return self._model


@torch.inference_mode()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities of the next token at every position of one window, [length, vocabulary] float32."""
    return model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)


def target_log_probabilities(log_q: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token that follows, [length - 1]."""
    return log_q[:-1].gather(1, ids[1:, None])[:, 0]


def divergences(reference: dict[str, Tensor], log_q: Tensor) -> Tensor:
    """KL from the reference to q at every position, [length] float64; a lower bound where only top_k tokens are known."""
    log_p = reference["log_p"].double()
    known = log_q.gather(1, reference["tokens"]) if "tokens" in reference else log_q
    known = known.double()
    p = log_p.exp()
    kl = torch.where(p == 0, 0.0, p * (log_p - known)).sum(-1)  # NaN is not 0 and stays NaN
    if "tokens" not in reference or log_p.shape[-1] == log_q.shape[-1]:
        return kl
    rest_p = (1 - p.sum(-1)).clamp_min(0)
    rest_q = (1 - known.exp().sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    return kl + torch.where(
        rest_p == 0, 0.0, rest_p * (rest_p.clamp_min(1e-300).log() - rest_q.log())
    )


def agreement(reference: dict[str, Tensor], log_q: Tensor) -> Tensor:
    """1 where the most likely token is the reference's, else 0, NaN where logits are not numbers; [length] float64."""
    same = (reference["top"] == log_q.argmax(-1)).double()
    nowhere = log_q.isnan().any(-1) | reference["log_p"].isnan().any(-1)
    return same.masked_fill(nowhere, math.nan)
