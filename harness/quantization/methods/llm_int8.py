"""LLM.int8(), its weights: one int8 code per weight, scaled by the largest magnitude of the output row.

LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (arXiv 2208.07339), §2.1 and §3.1 (vector-wise quantization):
q = round(127 w / a), w' = q a / 127 with a = max|w| of the row, after a cast of the weight to float16.
The run-time half of the method, columns of outlier activations multiplied in 16 bits, belongs to the activation scheme.
outlier_weights says what these columns multiply: "int8", the dequantized codes, as bitsandbytes does with a model loaded in 8 bits;
or "fp16", the matrix before rounding, as in the paper. Which columns they are is known only at run time, so all of the matrix is
then kept in float16, its codes are computed from it, and a weight takes 16 bits.

As in bitsandbytes: the cast to float16 (values above 65504 would overflow: the cell fails), a kept in float32 whatever
scale_dtype says, codes -127 … 127 without -128. Where we differ: a row of zeros gives codes 0 (there 127 / 0 · 0 is NaN); what is
stored is a / 127, one rounding away from a.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import refusals
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

OUTLIER_WEIGHTS = ("int8", "fp16")


class Rounding:
    """Row-wise absolute maximum in 8 bits."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """outlier_weights: what outlier channels of activations multiply, int8 or fp16."""

        outlier_weights: str = "int8"

        def __post_init__(self) -> None:
            if self.outlier_weights not in OUTLIER_WEIGHTS:
                raise ValueError(
                    f'no outlier_weights "{self.outlier_weights}"; known: {", ".join(OUTLIER_WEIGHTS)}'
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """8 symmetric bits per output row; with float16 outlier weights, an activation scheme with outliers."""
        sixteen, refused = self.settings.outlier_weights == "fp16", []
        activations = [
            activation
            for linear in shapes.linears
            if (activation := scheme.activation_for(0, linear.name)) is not None
        ]
        if sixteen and not any(activation.outlier_threshold for activation in activations):
            refused.append(
                "outlier_weights=fp16 needs outliers: set scheme.activation.outlier_threshold, as w8a8_llm_int8 does"
            )
        fused = [linear.name for linear in shapes.linears if linear.fused]
        if sixteen and fused:
            refused.append(
                f"outlier_weights=fp16 needs linears of their own; fused here: {', '.join(dict.fromkeys(fused))}"
            )

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.format != "int" or weight.bits != 8:
                yield f"LLM.int8() stores int8, not {weight.format} with {weight.bits:g} bits"
            if weight.group_size != -1:
                yield f"LLM.int8() has one scale per output row (group_size=-1), not group_size {weight.group_size}"
            if not weight.symmetric:
                yield "LLM.int8() has no zero point; use symmetric=true"

        return refused + refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: two copies of weight. Raises MethodError beyond float16's range."""
        half = weight.half()
        if not bool(torch.isfinite(half).all()):
            raise MethodError(
                "weights that float16 cannot hold (NaN, or beyond 65504); LLM.int8() is defined on float16"
            )
        return Int8OfFloat16(half) if self.settings.outlier_weights == "fp16" else _rounded(half)


@dataclass(frozen=True)
class Int8OfFloat16(QuantizedWeight):
    """A float16 matrix whose int8 codes are computed when it is used. values: [out, in] float16."""

    kind = "int8_of_float16"
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> Tensor:
        return _rounded(self.values).dequantize()

    def beside_outliers(self) -> Tensor | None:
        return self.values.float()

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"values": self.values.contiguous()}, {}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        return cls(tensors["values"])


def _rounded(values: Tensor) -> UniformWeight:
    """int8 by the largest magnitude of each row of values [out, in] float16."""
    weight = values.float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    factor = torch.where(largest > 0, 127 / largest, 0.0)
    codes = (torch.round(weight * factor) + 128).to(torch.uint8)
    return UniformWeight(codes, largest / 127, None, 8, "float32")
