"""LLM.int8(), its weights: one int8 code per weight, scaled by the largest magnitude of the output row.

LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (arXiv 2208.07339), §2.1 and §3.1 (vector-wise quantization):
q = round(127 w / a), w' = q a / 127 with a = max|w| of the row, after a cast of the weight to float16.
The run-time half of the method, columns of outlier activations multiplied in 16 bits, belongs to the activation scheme.

As in bitsandbytes: the cast to float16 (values above 65504 would overflow: the cell fails), a kept in float32 whatever
scale_dtype says, codes -127 … 127 without -128. Where we differ: a row of zeros gives codes 0 (there 127 / 0 · 0 is NaN); what is
stored is a / 127, one rounding away from a.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.errors import MethodError
from harness.methods.protocols import Evidence, LinearShape, Scheme, Shapes, WeightScheme, refusals
from harness.numerics.weights import QuantizedWeight, UniformWeight


class Rounding:
    """Row-wise absolute maximum in 8 bits."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """The weights' half has nothing to set."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """8 symmetric bits per output row."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.format != "int" or weight.bits != 8:
                yield f"LLM.int8() stores int8, not {weight.format} with {weight.bits:g} bits"
            if weight.group_size != -1:
                yield f"LLM.int8() has one scale per output row (group_size=-1), not group_size {weight.group_size}"
            if not weight.symmetric:
                yield "LLM.int8() has no zero point; use symmetric=true"

        return refusals(scheme, shapes, reasons)

    def round_layer(
        self, name: str, weight: Tensor, evidence: Evidence | None, scheme: WeightScheme, rng: Generator
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: two copies of weight. Raises MethodError beyond float16's range."""
        weight = weight.half().float()
        if not bool(torch.isfinite(weight).all()):
            raise MethodError(f"{name}: weights that float16 cannot hold (NaN, or beyond 65504); LLM.int8() is defined on float16")
        largest = weight.abs().amax(dim=1, keepdim=True)
        factor = torch.where(largest > 0, 127 / largest, 0.0)
        codes = (torch.round(weight * factor) + 128).to(torch.uint8)
        return UniformWeight(codes, largest / 127, None, 8, "float32")
