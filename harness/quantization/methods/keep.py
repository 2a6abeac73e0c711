"""Weights stay as they are: this measures the cost of rounding only the activations, or only the KV cache.

No paper of its own; the W16A8 and KV-only rows of studies that ask which side of a product the damage comes from (arXiv 2408.15301:
LLaMA3-70B breaks with 8-bit weights and unrounded activations, and hardly the other way round). Weights keep the model's numbers in
float16, bfloat16 or float32, as scheme.weight.scale_dtype says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import dense_reasons, refusals
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.grids import SCALE_DTYPES
from harness.quantization.numerics.weights import DenseWeight, QuantizedWeight


class Rounding:
    """No rounding of weights."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """Nothing to set."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Dense weights, of the width of their type."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.format != "dense":
                yield f'weights stay dense: use scheme.weight.format=dense (scheme w16a8, w16kv4, …), not "{weight.format}"'
            else:
                yield from dense_reasons(weight)

        return refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """The weight [out, in] in scheme.scale_dtype. Raises MethodError where that cannot hold it."""
        kept = weight.to(SCALE_DTYPES[scheme.scale_dtype])
        if not bool(torch.isfinite(kept).all()):
            raise MethodError(
                f"weights that {scheme.scale_dtype} cannot hold (NaN, or too large); use bfloat16 or float32"
            )
        return DenseWeight(kept)
