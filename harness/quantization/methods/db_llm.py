"""DB-LLM: 2-bit weights as two binary matrices whose scales are trained by distillation from the full-precision model.

DB-LLM: Accurate Dual-Binarization for Efficient LLMs (arXiv 2402.11960). The authors published no code: what the paper's public
descriptions leave open is this project's definition, marked [P] below, and results are not a reproduction.

Rounding (flexible dual binarization): per group w' = a1 b1 + a2 b2 with b1, b2 of {0, 1}; a1 = 2s, a2 = -s, levels -s, 0, s, 2s;
s = max|w| / 2 [P]. b1 = 1 where w >= (a1 + a2) / 2, b2 = 1 where w <= a1 b1 + a2 / 2.
Tuning (deviation-aware distillation): min over all a1, a2 of the mean over tokens t of λ_t CE(teacher_t, student_t), the soft
cross-entropy of the student against the full-precision model; λ_t = (H_t / mean H)^γ with H_t the mean of both predictions'
entropies, a constant to the gradient, γ = 0.1 [P]; γ = 0 is plain distillation. The weights under the codes stay [P], scales
are trained as logarithms of their growth by AdamW [P], on text that the full-precision model writes itself: a random first token,
then sampling, as many sequences of the length of the calibration windows [P].
"""

from __future__ import annotations

from collections.abc import Generator as Generating
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_uniform, require_finite
from harness.quantization.methods.protocols import Evidence, Network
from harness.quantization.numerics.dual_binary import (
    LEVELS,
    DualBinaryWeight,
    TrainedScales,
    assemble,
    initial_step,
)
from harness.quantization.numerics.grids import as_stored
from harness.quantization.numerics.training import steps_of
from harness.quantization.numerics.weights import QuantizedWeight


class Rounding:
    """Dual binarization with untrained scales."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """range_search: shrink each group's step to its least squared error."""

        range_search: bool = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """2 bits, in groups that divide every layer."""
        return _check(scheme, shapes)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: three copies of weight, five with range_search."""
        require_finite(weight)
        size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
        groups = weight.reshape(weight.shape[0], -1, size)
        step = as_stored(initial_step(groups, self.settings.range_search), scheme.scale_dtype)
        return assemble(groups, as_stored(2 * step, scheme.scale_dtype), -step, scheme.scale_dtype)


class Tuning:
    """Deviation-aware distillation of the whole model."""

    version = 1
    needs = ("tokens", "teacher")
    stochastic = True
    activation_aware = False

    @dataclass(frozen=True)
    class Settings:
        """
        epochs              passes over the sequences
        rate                learning rate of the logarithms of the scales' growth
        gamma               power of a token's ambiguity in its weight; 0: plain distillation
        generated           train on text by the full-precision model; false: on the calibration windows
        through_thresholds  scales also feel the codes that they move (straight-through)
        """

        epochs: int = 1
        rate: float = 0.001
        gamma: float = 0.1
        generated: bool = True
        through_thresholds: bool = False

        def __post_init__(self) -> None:
            if self.epochs < 0:
                raise ValueError(f"epochs is {self.epochs}; it must be 0 or more")
            if not self.rate > 0:
                raise ValueError(f"rate is {self.rate}; it must be above 0")
            if not self.gamma >= 0:
                raise ValueError(f"gamma is {self.gamma}; it must not be negative")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """As the rounding: 2 bits, in groups that divide every layer."""
        return _check(scheme, shapes)

    def linear(
        self, name: str, weight: QuantizedWeight, bias: Tensor | None, original: Tensor | None
    ) -> nn.Module:
        """A linear that trains its two scales per group."""
        if not isinstance(weight, DualBinaryWeight):
            raise MethodError(
                f'DB-LLM trains the scales of its own rounding, not those of "{weight.kind}"; use rounding=db_llm'
            )
        if original is None:
            raise MethodError(
                "DB-LLM needs the weights before rounding, and a transform changed them; use no transform"
            )
        return _Linear(weight, bias, original, self.settings.through_thresholds)

    def tune(
        self,
        student: Network,
        teacher: Network | None,
        parameters: Sequence[nn.Parameter],
        windows: Tensor,
        rng: Generator,
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """Distil the teacher; notes: the mean loss of every epoch."""
        assert teacher is not None, "needs the teacher"
        settings = self.settings
        tokens = windows
        if settings.generated and settings.epochs:
            vocabulary = teacher.logits(windows[:1, :1]).shape[-1]
            first = torch.randint(0, vocabulary, (windows.shape[0],), generator=rng)
            tokens = teacher.sample(first, windows.shape[1], rng)

        def loss_of(sample: int) -> Tensor:
            sequence = tokens[sample : sample + 1]
            return distillation_loss(
                student.logits(sequence), teacher.logits(sequence), settings.gamma
            )

        groups = [{"params": list(parameters), "lr": settings.rate}]
        losses = yield from steps_of(
            loss_of, tokens.shape[0], groups, settings.epochs, "distillation"
        )
        return {"loss": losses}


class _Linear(nn.Module):
    """x W'ᵀ + b with W' = a1 b1 + a2 b2 as the scales stand."""

    def __init__(
        self,
        weight: DualBinaryWeight,
        bias: Tensor | None,
        original: Tensor,
        through_thresholds: bool,
    ) -> None:
        super().__init__()
        self.trained = TrainedScales(
            original, weight.first_scale, weight.second_scale, through_thresholds
        )
        self.scale_dtype = weight.scale_dtype
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.trained.weight().to(x.dtype), self.bias)  # type: ignore[arg-type]

    def stored(self) -> DualBinaryWeight:
        return self.trained.stored(self.scale_dtype)


def distillation_loss(student: Tensor, teacher: Tensor, gamma: float) -> Tensor:
    """Mean over tokens of λ_t CE(teacher_t, student_t), λ_t = (H_t / mean H)^γ; logits [..., vocabulary]."""
    log_student, log_teacher = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    taught = log_teacher.exp()
    loss = -(taught * log_student).sum(-1)
    if gamma == 0:
        return loss.mean()
    with torch.no_grad():
        ambiguity = -(taught * log_teacher + log_student.exp() * log_student).sum(-1) / 2
        weight = (ambiguity / ambiguity.mean().clamp(min=torch.finfo(torch.float32).tiny)).pow(
            gamma
        )
    return (weight * loss).mean()


def _check(scheme: Scheme, shapes: Shapes) -> list[str]:
    return check_uniform(scheme, shapes, bits=(2,), never_symmetric=LEVELS)
