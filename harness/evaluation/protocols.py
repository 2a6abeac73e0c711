"""What an evaluator is given and what it returns.

An evaluator file (`harness/evaluation/evaluators/<name>.py`) defines a class `Evaluator` with a nested frozen dataclass
`Settings`, whose fields and defaults are those of `conf/evaluation/*.yaml`, and states its facts as literals, which
`harness.core.plugins` reads without importing the file:

    class Evaluator:
        version = 1                     # raised when its numbers change; part of every score's key
        metrics = {"perplexity": {"higher_is_better": False, "unit": "per token"}}

A metric's full name is "<evaluation>/<metric>": "wikitext2/perplexity", "arc_easy/acc_norm".
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from harness.core.cell import Cell, Evaluation, Model, cell_key
from harness.core.errors import HarnessError
from harness.core.events import Progress
from harness.data import folder_check, model_folders

# of the logits of one batch in float32; what bounds an automatic batch size
LOGITS_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Subject:
    """A quantized (or full-precision) model that is ready to run.

    model         in eval mode, on `device`
    batch_size    sequences per forward pass; 0: chosen by the evaluator
    manifest      of the checkpoint
    model_folder  config, tokenizer and weights of the source model
    cache         folder for what cells share: token windows, the full-precision model's predictions; None: kept in memory only
    load_as       the same model in another mode of `inference.load`, "native" or "native:int4pack"; None where it cannot be had
    """

    cell: Cell
    model: nn.Module
    tokenizer: Any
    device: str
    batch_size: int
    manifest: dict[str, Any]
    model_folder: Path
    cache: Path | None = None
    load_as: Callable[[str], nn.Module] | None = None

    def progress(self, evaluation: Evaluation, step: int, steps: int) -> Progress:
        """The event that says how far an evaluation of this subject is."""
        return Progress(
            time=time.time(),
            cell_keys=(cell_key(self.cell),),
            stage=evaluation.name,
            step=step,
            steps=steps,
        )

    def batch_for(self, length: int) -> int:
        """Sequences of `length` tokens per forward pass: batch_size, or what keeps the logits within LOGITS_BYTES (at most 64).

        Always 1 where activations are rounded by the range of the whole tensor: there a sequence's numbers depend on its company.
        """
        if depends_on_company(self.cell):
            return 1
        if self.batch_size > 0:
            return self.batch_size
        vocabulary = int(getattr(self.model.config, "vocab_size", 32000))
        return max(1, min(64, LOGITS_BYTES // (4 * vocabulary * max(length, 1))))

    def context_length(self) -> int | None:
        """Positions that the model was made for; None where its config does not say."""
        config: Any = self.model.config
        return folder_check.context_length(config.to_dict())


@dataclass(frozen=True)
class Score:
    """The result of one evaluation.

    metrics  full name -> value; infinite or NaN where the model diverged
    stderr   full name -> standard error, for the metrics that have one
    items    per-item columns of equal length, with "id": what paired comparisons between cells read
    details  how the numbers came about: window length, counts, versions; "smoke": True where a limit cut the data
    problems what a reader must know of the numbers, empty when all is well: "unscored", the number of items without a score of
             their own, and "sentences", each of which says how many items, which, and what to do; no key holds them
    """

    metrics: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    items: dict[str, list[Any]] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, Any] = field(default_factory=dict)


class Evaluator(Protocol):
    """Scores a subject."""

    version: int
    metrics: dict[str, dict[str, Any]]

    def check(self, evaluation: Evaluation, model: Model) -> list[str]:
        """Reasons why it cannot run on this model, known before any work: missing data, unknown task, too short a context."""
        ...

    def score(self, subject: Subject, evaluation: Evaluation) -> Iterator[Progress | Score]:
        """Progress events, then one Score. Raises EvaluationError, or DataError where the data is at fault."""
        ...


def depends_on_company(cell: Cell) -> bool:
    """True where a sequence's numbers depend on what shares it: dynamic activation ranges, or outlier channels, of all of it."""
    if cell.scheme.activation is None:
        return False
    schemes = {cell.scheme.activation}
    # each may meet a linear that any of those before it met, or not
    for override in cell.scheme.overrides:
        schemes |= {dataclasses.replace(scheme, **dict(override.activation)) for scheme in schemes}
    return any(
        scheme.dynamic
        and (
            scheme.granularity == "tensor"
            or scheme.outlier_threshold > 0
            or scheme.format == "nvfp4"  # one of its scales is the sequence's
        )
        for scheme in schemes
    )


def model_context_length(model: Model) -> int | None:
    """Positions that a model was made for, from its config.json alone; None where that is not on this machine or does not say."""
    try:
        folder = model_folders.config_folder(model)
        return folder_check.context_length(folder_check.read_config(folder))
    except HarnessError:
        return None  # a model that cannot be read is refused under its own name, not here


def no_answers(task: str, lost: int, items: int) -> dict[str, Any]:
    """The problems of a score in which some items have no answer; empty where all have one."""
    if not lost:
        return {}
    sentence = (
        f"{task}: {lost} of {items} items {'has' if lost == 1 else 'have'} no answer, because the model's logits are not numbers; "
        "its metrics have no value"
    )
    return {"unscored": lost, "sentences": [sentence]}


def finite(value: float) -> float | None:
    """The value, or None where it is infinite or NaN: what details may hold as JSON."""
    return value if math.isfinite(value) else None
