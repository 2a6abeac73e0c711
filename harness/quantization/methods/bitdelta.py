"""BitDelta: a fine-tune as its base and the sign of their difference, one scale per matrix; the scales are then trained.

BitDelta: Your Fine-Tune May Only Be Worth One Bit (arXiv 2402.10193).

    Δ' = α sign(Δ)        α = mean |Δ| (eq. 1-2), which minimizes ||Δ - α S||² over α and all S of ±1: ||Δ||² - mn α² is left
    scale distillation    all α together minimize the mean squared difference of the logits from the fine-tune's (eq. 4)

As in the authors' code (FasterDecoding/BitDelta, Apache-2.0): sign(0) is +1, where the paper's formula gives -1; AdamW at a rate
that falls along a cosine. Where we differ: only the scales are trained and weight decay is 0 (the code hands every parameter to the
optimizer with a decay of 0.01, so that embeddings, norms and head are trained and stored too; `reference_parameters` does so);
gradients flow through the sign matrices into the layers below (the code's kernel passes none); no sequence is padded. Row scales
(`granularity: row`) are ours.
"""

from __future__ import annotations

import math
from collections.abc import Generator as Generating
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import refusals
from harness.quantization.methods.deltas import base_in, change_of, on_base
from harness.quantization.methods.protocols import Evidence, Network
from harness.quantization.numerics.deltas import DeltaWeight, SignWeight
from harness.quantization.numerics.training import STRETCHES
from harness.quantization.numerics.weights import QuantizedWeight

GRANULARITIES = ("tensor", "row")


def _reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
    if weight.format != "sign":
        yield f'one sign per weight is stored; use scheme=sign, not format "{weight.format}"'
    elif (weight.bits, weight.group_size, weight.symmetric) != (1, -1, True):
        yield "signs have 1 bit, no groups and no zero point; use scheme=sign as it is"


class Rounding:
    """Signs of the difference times its mean magnitude."""

    version = 1
    needs = ("base_weight",)
    stochastic = False
    activation_aware = False
    sequential = False
    no_adapter = "a sign matrix is of full rank and no adapter"

    @dataclass(frozen=True)
    class Settings:
        """granularity: one scale per matrix (tensor), or per output row (row; ours)."""

        granularity: str = "tensor"

        def __post_init__(self) -> None:
            if self.granularity not in GRANULARITIES:
                raise ValueError(
                    f'no granularity "{self.granularity}"; known: {", ".join(GRANULARITIES)}'
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """The scheme `sign` alone."""
        return refusals(scheme, shapes, _reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """The base and the signs of weight [out, in] less it. Peak memory: three copies of weight."""
        base = base_in(evidence)
        change = change_of(weight, base)
        over = 1 if self.settings.granularity == "row" else (0, 1)
        alpha = change.abs().double().mean(dim=over).float().reshape(-1)
        return on_base(SignWeight(change >= 0, alpha), base)


class Tuning:
    """Scale distillation: the scales are trained so that logits match those of the fine-tune."""

    version = 1
    needs = ("tokens", "teacher")
    # of a fine-tune from its base; the plan refuses other tunings of such cells
    trains_differences = True

    @dataclass(frozen=True)
    class Settings:
        """
        steps   optimizer steps
        batch   sequences per step
        length  tokens per sequence; the calibration's windows are cut into such pieces, each used once
        rate    learning rate of AdamW, falling to 0 along a cosine; no weight decay
        reference_parameters  as in the authors' code, embeddings, norms and head are trained too and stored in full, and all
                decays by 0.01
        """

        steps: int = 200
        batch: int = 4
        length: int = 128
        rate: float = 0.0001
        reference_parameters: bool = False

        def __post_init__(self) -> None:
            for name, least in (("steps", 0), ("batch", 1), ("length", 2)):
                if getattr(self, name) < least:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; it must be at least {least}"
                    )
            if not self.rate > 0:
                raise ValueError(f"rate is {self.rate}; it must be above 0")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._linears: list[_Linear] = []

    @property
    def trains_others(self) -> bool:
        """Whether parameters outside the matrices are trained and stored too."""
        return self.settings.reference_parameters

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """The scheme `sign` alone."""
        return refusals(scheme, shapes, _reasons)

    def linear(
        self, name: str, weight: QuantizedWeight, bias: Tensor | None, original: Tensor | None
    ) -> nn.Module:
        """A linear that trains its scales."""
        if not (isinstance(weight, DeltaWeight) and isinstance(weight.change, SignWeight)):
            raise MethodError(
                f'BitDelta trains the scales of signs, not those of "{weight.kind}"; use rounding=bitdelta'
            )
        linear = _Linear(weight, bias)
        self._linears.append(linear)
        return linear

    def tune(
        self,
        student: Network,
        teacher: Network | None,
        parameters: Sequence[nn.Parameter],
        windows: Tensor,
        rng: Generator,
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """Train; notes: mean losses of equal stretches of the steps, and how many scales became negative (legal: signs flip)."""
        assert teacher is not None, "a tuning that needs the teacher is given it"
        own = self.settings
        pieces = self._pieces(windows)
        losses: list[float] = []
        decay = 0.01 if own.reference_parameters else 0.0
        optimizer = torch.optim.AdamW(parameters, lr=own.rate, weight_decay=decay)
        since, total = 0, 0.0
        for step in range(1, own.steps + 1):
            tokens = pieces[(step - 1) * own.batch : step * own.batch]
            for group in optimizer.param_groups:
                group["lr"] = own.rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / own.steps))
            optimizer.zero_grad(set_to_none=True)
            loss = (student.logits(tokens) - teacher.logits(tokens)).square().mean()
            loss.backward(inputs=list(parameters))
            optimizer.step()
            total += float(loss.detach())
            if not math.isfinite(total):
                raise MethodError(
                    f"scale distillation: the loss of step {step} is not finite; lower tuning.rate, "
                    "or load the model in a wider dtype (model.dtype=float32)"
                )
            yield step, own.steps
            if step * STRETCHES // own.steps > (step - 1) * STRETCHES // own.steps:
                losses.append(total / (step - since))
                since, total = step, 0.0
        negative = sum(int((linear.alpha < 0).sum()) for linear in self._linears)
        return {"loss": losses, "negative_scales": negative}

    def _pieces(self, windows: Tensor) -> Tensor:
        """The calibration's tokens [samples, length] as [steps · batch, length of the settings]."""
        own = self.settings
        wanted = own.steps * own.batch
        if own.length > windows.shape[1]:
            raise MethodError(
                f"sequences of {own.length} tokens, but the calibration's windows have {windows.shape[1]}; "
                "lower tuning.length or raise calibration.length"
            )
        pieces = torch.cat(
            [window[: window.numel() // own.length * own.length] for window in windows]
        ).reshape(-1, own.length)
        if pieces.shape[0] < wanted:
            raise MethodError(
                f"{own.steps} steps of {own.batch} sequences need {wanted} pieces of {own.length} tokens, and the calibration has "
                f"{pieces.shape[0]}; raise calibration.samples or lower tuning.steps"
            )
        return pieces


class _Linear(nn.Module):
    """x (W_base + α S)ᵀ + b, differentiable in α and x."""

    def __init__(self, weight: DeltaWeight, bias: Tensor | None) -> None:
        super().__init__()
        assert isinstance(weight.change, SignWeight) and weight.base is not None
        self.register_buffer("base", weight.base, persistent=False)
        self.register_buffer("signs", weight.change.signs, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.alpha = nn.Parameter(weight.change.alpha.clone())

    def weight(self) -> Tensor:
        """W_base + α S [out, in] float32, differentiable in α."""
        alpha = self.alpha[:, None]
        return self.get_buffer("base") + torch.where(self.get_buffer("signs"), alpha, -alpha)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight().to(x.dtype), self.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def stored(self) -> DeltaWeight:
        """The same signs with the scales as they stand."""
        change = SignWeight(self.get_buffer("signs"), self.alpha.detach().clone())
        return DeltaWeight(change, self.get_buffer("base"))
