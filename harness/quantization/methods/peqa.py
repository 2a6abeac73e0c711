"""PEQA: the integers of a quantized model stay as they are, and only its scales are fine-tuned.

Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization (arXiv 2305.14152).
Objective: min over Δs of the language-model loss with W = (s0 + Δs) (q - z), s0 and the integers q and z from rounding, Δs = 0 at
first; one scale per output channel, or per group where the scheme has groups. No rounding lies in the path: gradients are exact.
No official code was found; the published description is what is built. Tasks are switched by switching scales.

Where we differ: the paper tunes on instruction data; here the text is the cell's calibration windows, one window per step, with the
next token's cross-entropy on every position. Tuned scales are stored in float32 unless scale_dtype says otherwise, because a step
of the learning rate can be smaller than the spacing of float16.
"""

from __future__ import annotations

from collections.abc import Generator as Generating
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from harness.core.cell import Scheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_uniform
from harness.quantization.methods.protocols import Network
from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored
from harness.quantization.numerics.training import steps_of
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight


class Tuning:
    """Fine-tuning of scales."""

    version = 1
    needs = ("tokens",)
    stochastic = False
    activation_aware = False

    @dataclass(frozen=True)
    class Settings:
        """
        epochs       passes over the windows
        rate         learning rate of the scales; AdamW, no weight decay
        scale_dtype  in which tuned scales are stored: float16, bfloat16 or float32
        """

        epochs: int = 3
        rate: float = 0.00005
        scale_dtype: str = "float32"

        def __post_init__(self) -> None:
            if self.epochs < 0:
                raise ValueError(f"epochs is {self.epochs}; it must be 0 or more")
            if not self.rate > 0:
                raise ValueError(f"rate is {self.rate}; it must be above 0")
            if self.scale_dtype not in SCALE_DTYPES:
                raise ValueError(
                    f'no scale_dtype "{self.scale_dtype}"; known: {", ".join(SCALE_DTYPES)}'
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._linears: list[_Linear] = []

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Integer grids of 2 to 8 bits whose groups divide every layer."""
        return check_uniform(scheme, shapes)

    def linear(
        self, name: str, weight: QuantizedWeight, bias: Tensor | None, original: Tensor | None
    ) -> nn.Module:
        """A linear that trains its scales."""
        if not isinstance(weight, UniformWeight):
            raise MethodError(
                f'PEQA trains the scales of integer grids, not those of "{weight.kind}"; use rounding=rtn or gptq'
            )
        linear = _Linear(weight, bias, self.settings.scale_dtype)
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
        """Train on the windows; notes: the mean loss of every epoch, how many scales became negative (legal: signs flip)."""

        def loss_of(sample: int) -> Tensor:
            logits = student.logits(windows[sample : sample + 1])[0, :-1]
            return nn.functional.cross_entropy(logits, windows[sample, 1:].to(logits.device))

        groups = [{"params": list(parameters), "lr": self.settings.rate}]
        losses = yield from steps_of(
            loss_of, windows.shape[0], groups, self.settings.epochs, "fine-tuning of scales"
        )
        negative = sum(int((linear.scale() < 0).sum()) for linear in self._linears)
        return {"loss": losses, "negative_scales": negative}


class _Linear(nn.Module):
    """x W'ᵀ + b with W' = (s0 + Δs) (q - z)."""

    def __init__(self, weight: UniformWeight, bias: Tensor | None, scale_dtype: str) -> None:
        super().__init__()
        self.bits, self.scale_dtype = weight.bits, scale_dtype
        for name in ("codes", "zero", "column_group"):
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.register_buffer("start", weight.scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.change = nn.Parameter(torch.zeros_like(weight.scale))

    def scale(self) -> Tensor:
        """s0 + Δs, [out, groups]."""
        return self.get_buffer("start") + self.change

    def weight(self) -> Tensor:
        """W' [out, in] float32, differentiable in Δs."""
        return self._with(self.scale(), self.scale_dtype).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight().to(x.dtype), self.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def stored(self) -> UniformWeight:
        """The same integers with the scales as they stand."""
        return self._with(as_stored(self.scale(), self.scale_dtype), self.scale_dtype)

    def _with(self, scale: Tensor, scale_dtype: str) -> UniformWeight:
        zero, columns = self.zero, self.column_group
        assert not isinstance(zero, nn.Module) and not isinstance(columns, nn.Module)
        return UniformWeight(self.get_buffer("codes"), scale, zero, self.bits, scale_dtype, columns)
