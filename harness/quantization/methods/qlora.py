"""QLoRA: low-rank adapters in 16 bits are trained beside a frozen quantized model.

QLoRA: Efficient Finetuning of Quantized LLMs (arXiv 2305.14314), eqs. 5 and 6.
Objective: min over A, B of the cross-entropy of answers to instructions with y = x W'ᵀ + α/r · (x Aᵀ) Bᵀ, W' the quantized matrix:
NF4 in blocks of 64 with double quantization in `method: qlora`, any other rounding by choice. A is drawn uniformly within 1 / √in,
B is 0 at first: training starts at the quantized model. The adapter is not merged into W', neither stored nor run.

Defaults are those of the authors' code (artidoro/qlora): rank 64, α 16, all linears of the blocks, AdamW at a constant 2e-4, norm
of gradients at most 0.3, 10,000 steps of 16 texts, 384 tokens of a prompt and 128 of its answer, loss on answers only. Their
Guanaco scripts use a dropout of 0.05; 33B and 65B a rate of 1e-4.

Where we differ: factors are trained in float32 and rounded to adapter_dtype when stored (theirs are in the compute dtype all
along); the loss is the mean over all learned tokens of a step, theirs the mean of means where gradients are accumulated; texts are
drawn without replacement in random order, theirs in groups of like length; a prompt ends in a newline where theirs ends in a space;
no paged optimizer and no gradient checkpointing, which change no numbers. Texts without prompts are learned whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from harness.core.cell import Scheme
from harness.core.shapes import Shapes
from harness.quantization.numerics.adapters import AdapterTuning, LowRankLinear, StoredSettings
from harness.quantization.numerics.weights import QuantizedWeight


class Tuning(AdapterTuning):
    """Fine-tuning of low-rank adapters."""

    version = 1
    needs = ("documents",)
    stochastic = True
    activation_aware = False
    keeps_zeros = True  # of a pruned matrix: adapters lie beside it
    settings: Settings

    @dataclass(frozen=True)
    class Settings(StoredSettings):
        """The settings of adapters that are not merged."""

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Any weights; `linears` must name linears of the model."""
        return self.unknown_linears([linear.name for linear in shapes.linears])

    def adapted(self, weight: QuantizedWeight, bias: Tensor | None) -> LowRankLinear:
        """Factors as wide as the matrix."""
        return LowRankLinear(
            weight, bias, self.settings, weight.shape[1], self.settings.adapter_dtype
        )
