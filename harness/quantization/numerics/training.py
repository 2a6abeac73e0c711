"""Training: gradients through rounded values, learned ranges of grids, and the loops of block-wise methods and of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.core.errors import MethodError
from harness.quantization.numerics.grids import Grid, from_range

STRETCHES = 20  # of the steps, for which a mean loss is reported


def through(value: Tensor, x: Tensor) -> Tensor:
    """value, exactly, with the gradient of x (straight-through estimator)."""
    return value.detach() + (x - x.detach())  # the second term is 0


def round_through(x: Tensor) -> Tensor:
    """Nearest integers, with the gradient of x itself."""
    return through(torch.round(x), x)


def nearest_through(values: Tensor, grid: Grid) -> Tensor:
    """grid.nearest(values), the same numbers, with gradients to values and to the grid's scale.

    Rounding is straight-through, clamping passes gradients inside the range only, the zero point has none.
    """
    codes = (round_through(values / grid.scale) + grid.zero).clamp(0, grid.top)
    return grid.dequantize(codes)


def nearest_between(
    values: Tensor, scale: Tensor, zero: Tensor, top: int, offset: Tensor | None = None
) -> Tensor:
    """scale · clamp(round(values / scale + offset), -zero, top - zero), differentiable in all five: codes 0 … top, less their zero.

    values, offset: [..., g]; scale, zero: [..., 1], zero integer-valued. Rounding is straight-through, clamping passes gradients
    to what is inside, and to the zero point of what is outside: the zero of a code inside cancels exactly.
    """
    codes = values / scale if offset is None else values / scale + offset
    return scale * torch.clamp(round_through(codes), -zero, top - zero)


def clipped_grid(
    values: Tensor,
    upper: Tensor,
    lower: Tensor,
    bits: int,
    symmetric: bool,
    convention: str,
    scale_dtype: str,
) -> Grid:
    """The grid of each row of values [..., g] over [sigmoid(lower) min, sigmoid(upper) max], differentiable in both strengths.

    upper, lower: [..., 1] logits; large ones leave the range as it is (OmniQuant's learnable weight clipping, eq. 2).
    """
    hi = torch.sigmoid(upper) * values.amax(-1, keepdim=True)
    lo = torch.sigmoid(lower) * values.amin(-1, keepdim=True)
    return from_range(lo, hi, bits, symmetric, convention, scale_dtype)


def steps_of(
    loss_of: Callable[[int], Tensor],
    samples: int,
    groups: Sequence[Mapping[str, Any]],
    epochs: int,
    what: str = "training",
    last_rate: float = 1.0,
    gradient_scale: float = 1.0,
) -> Generator[tuple[int, int], None, list[float]]:
    """AdamW without weight decay, one sample per step, in order. Yields (step, steps); returns the mean loss of each epoch.

    loss_of    sample number -> scalar loss, differentiable in the parameters
    groups     torch.optim groups: {"params": [...], "lr": ...}
    what       is trained, for the message
    last_rate  where the rates end on a cosine over all steps, as a share of where they begin; 1: they are constant
    gradient_scale  a power of two: losses are multiplied by it before the backward pass, gradients divided behind it, so that
               those within a model of float16 are not lost
    Raises MethodError when a loss is not finite; the parameters are then worth nothing.
    """
    trained = [parameter for group in groups for parameter in group["params"]]
    losses: list[float] = []
    if not trained or not samples:
        return losses
    optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.0)
    for epoch in range(epochs):
        total: Tensor | None = None
        for sample in range(samples):
            if last_rate != 1:
                done = (epoch * samples + sample) / (epochs * samples)
                share = last_rate + (1 - last_rate) * (1 + math.cos(math.pi * done)) / 2
                for group, given in zip(optimizer.param_groups, groups, strict=True):
                    group["lr"] = given["lr"] * share
            with torch.enable_grad():
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(sample)
                (loss * gradient_scale).backward(inputs=trained)
                for parameter in trained if gradient_scale != 1 else ():
                    if parameter.grad is not None:
                        parameter.grad /= gradient_scale
                optimizer.step()
            total = loss.detach() if total is None else total + loss.detach()
            yield epoch * samples + sample + 1, epochs * samples
        assert total is not None
        losses.append(float(total) / samples)
        # once per epoch: a check per step would wait for the device
        if not losses[-1] < float("inf"):
            raise MethodError(
                f"{what}: the loss of epoch {epoch + 1} is {losses[-1]}; lower the learning rate, "
                "or load the model in a wider dtype (model.dtype=float32)"
            )
    return losses


def train(
    loss_of: Callable[[int], Tensor],
    samples: int,
    groups: Sequence[Mapping[str, Any]],
    epochs: int,
    what: str = "training",
    last_rate: float = 1.0,
    gradient_scale: float = 1.0,
) -> list[float]:
    """`steps_of` to its end: the mean loss of each epoch."""
    walk = steps_of(loss_of, samples, groups, epochs, what, last_rate, gradient_scale)
    while True:
        try:
            next(walk)
        except StopIteration as end:
            losses: list[float] = end.value
            return losses


# ---- by the signs of gradients ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignDescent:
    """How `sign_steps` went. losses: of its batches, means of equal stretches, STRETCHES at most; first: of the first batch, before
    any step; kept: the iteration whose parameters are kept, and the number of iterations for those after the last step."""

    losses: list[float]
    first: float
    kept: int


def sign_steps(
    batch_loss: Callable[[Sequence[int]], Tensor],
    whole_loss: Callable[[], Tensor],
    samples: int,
    groups: Sequence[Mapping[str, Any]],
    *,
    iterations: int,
    batch: int,
    rng: torch.Generator,
    keep: str = "best",
    check_every: int = 10,
    what: str = "training",
) -> SignDescent:
    """Signed gradient descent with a rate that falls to 0: p ← p - rate (1 - t / iterations) sign(gradient), t = 0, 1, …

    batch_loss   sample numbers -> loss, scalar; adds its gradients to the .grad of the parameters
    whole_loss   the loss over all samples, without gradients; asked for with keep "best_of_all" alone
    groups       {"params": [...], "lr": rate}; "range": (lowest, highest) clamps the parameters before each iteration
    batch        samples per iteration, from a shuffled list that is shuffled again when fewer are left
    keep         the parameters that remain: "best", those with the lowest loss of a batch; "best_of_all", of every check_every
                 iterations, and after the last, those with the lowest loss over all samples; "last"
    Raises MethodError when a loss is not finite; the parameters are then worth nothing.
    """
    trained = [parameter for group in groups for parameter in group["params"]]
    assert trained and samples and iterations, "something is trained"
    draw = _batches(samples, min(batch, samples), rng)
    lowest, kept, saved = float("inf"), iterations, [p.detach().clone() for p in trained]
    every: list[float] = []

    def offer(loss: float, step: int) -> None:
        nonlocal lowest, kept
        if loss < lowest:
            lowest, kept = loss, step
            for copy, parameter in zip(saved, trained, strict=True):
                copy.copy_(parameter.detach())

    for step in range(iterations):
        _clamp(groups)
        for parameter in trained:
            parameter.grad = None
        with torch.enable_grad():
            every.append(float(batch_loss(next(draw))))
        if not abs(every[-1]) < float("inf"):
            raise MethodError(
                f"{what}: the loss of iteration {step + 1} is {every[-1]}; lower the rate, "
                "or load the model in a wider dtype (model.dtype=float32)"
            )
        if keep == "best":
            offer(every[-1], step)
        elif keep == "best_of_all" and step % check_every == 0:
            offer(float(whole_loss()), step)
        with torch.no_grad():
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(
                            parameter.grad.sign(), alpha=group["lr"] * (1 - step / iterations)
                        )
                        parameter.grad = None
    _clamp(groups)
    if keep == "best_of_all":
        offer(float(whole_loss()), iterations)
    if keep != "last":
        with torch.no_grad():
            for copy, parameter in zip(saved, trained, strict=True):
                parameter.copy_(copy)
    ends = sorted({iterations * n // STRETCHES for n in range(1, STRETCHES + 1)} - {0})
    stretches = [every[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    return SignDescent([sum(part) / len(part) for part in stretches], every[0], kept)


def _clamp(groups: Sequence[Mapping[str, Any]]) -> None:
    with torch.no_grad():
        for group in groups:
            for parameter in group["params"] if "range" in group else ():
                parameter.clamp_(*group["range"])


def _batches(count: int, size: int, rng: torch.Generator) -> Iterator[list[int]]:
    """Batches of numbers below count, in random order, without end; numbers that fill no batch wait for the next order."""
    while True:
        order = torch.randperm(count, generator=rng).tolist()
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


# ---- texts -----------------------------------------------------------------------------------------------------------

IGNORED = -100  # in place of a token that is not learned


@dataclass(frozen=True)
class Document:
    """A text to learn from. tokens [n] int64, of which the first `prompt` are read and not learned."""

    tokens: Tensor
    prompt: int = 0


def shorten(
    documents: Sequence[Document], prompt_length: int, answer_length: int
) -> list[Document]:
    """The first prompt_length tokens of each prompt with the first answer_length of its answer.

    Texts without a prompt are cut into pieces of both lengths together. What then holds no token to learn is left out.
    """
    found = []
    for document in documents:
        prompt, answer = document.tokens[: document.prompt], document.tokens[document.prompt :]
        if document.prompt:
            kept = torch.cat((prompt[:prompt_length], answer[:answer_length]))
            found.append(Document(kept, min(document.prompt, prompt_length)))
        else:
            found += [Document(piece) for piece in answer.split(prompt_length + answer_length)]
    return [document for document in found if _learned(document) > 0]


def _learned(document: Document) -> int:
    """Tokens that are predicted: those of the answer, or all but the first."""
    return document.tokens.numel() - max(1, document.prompt)


def fine_tune(
    logits: Callable[[Tensor], Tensor],
    parameters: Sequence[torch.nn.Parameter],
    documents: Sequence[Document],
    *,
    rate: float,
    steps: int,
    batch: int,
    micro_batch: int,
    clip: float,
    rng: torch.Generator,
    what: str = "fine-tuning",
) -> Generator[tuple[int, int], None, list[float]]:
    """AdamW without weight decay at a constant rate on the mean cross-entropy of the learned tokens of shuffled documents.

    Yields (step, steps); returns the mean losses of equal stretches of the steps, STRETCHES at most.
    logits       [documents, longest] tokens -> [documents, longest, vocabulary] float32, causal: padding follows a text
    micro_batch  documents of a step that are in memory at once; their gradients are added
    clip         largest norm of a step's gradient; 0: no limit
    Raises MethodError when a loss is not finite; the parameters are then worth nothing.
    """
    losses: list[float] = []
    if not parameters or not documents or not steps:
        return losses
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    draw = _shuffled(len(documents), rng)
    total, since = torch.zeros((), device=parameters[0].device), 0
    for step in range(1, steps + 1):
        chosen = sorted(
            (documents[next(draw)] for _ in range(batch)), key=lambda each: each.tokens.numel()
        )
        learned = sum(map(_learned, chosen))
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            for start in range(0, batch, micro_batch):
                loss = _summed_loss(logits, chosen[start : start + micro_batch]) / learned
                loss.backward(inputs=list(parameters))
                total += loss.detach()
            if clip > 0:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
        yield step, steps
        if step * STRETCHES // steps > (step - 1) * STRETCHES // steps:
            losses.append(float(total) / (step - since))
            total, since = torch.zeros_like(total), step
            # once per stretch: a check per step would wait for the device
            if not losses[-1] < float("inf"):
                raise MethodError(
                    f"{what}: the loss before step {step} of {steps} is {losses[-1]}; lower the learning rate, "
                    "or load the model in a wider dtype (model.dtype=float32)"
                )
    return losses


def _shuffled(count: int, rng: torch.Generator) -> Iterator[int]:
    """Numbers below count without end: each once, in random order, then each once more."""
    while True:
        yield from torch.randperm(count, generator=rng).tolist()


def _summed_loss(logits: Callable[[Tensor], Tensor], documents: Sequence[Document]) -> Tensor:
    """Sum of the cross-entropies of the learned tokens."""
    tokens = torch.nn.utils.rnn.pad_sequence(
        [document.tokens for document in documents], batch_first=True
    )
    places = torch.arange(tokens.shape[1])
    first = torch.tensor([[max(1, document.prompt)] for document in documents])
    last = torch.tensor([[document.tokens.numel()] for document in documents])
    targets = tokens.masked_fill((places < first) | (places >= last), IGNORED)[:, 1:]
    predicted = logits(tokens)[:, :-1]
    return torch.nn.functional.cross_entropy(
        predicted.flatten(0, 1),
        targets.flatten().to(predicted.device),
        ignore_index=IGNORED,
        reduction="sum",
    )
