"""A base's matrix with a difference of low rank beside it: two thin products instead of a sum of matrices.

    y = x W_baseᵀ + ((x R) ∘ s) Lᵀ

The base's product is the same for all fine-tunes of one base, so that a server computes it once for a batch of them; only the thin
ones differ. The base is held in the narrowest type that is exact for it, factors dequantized in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.core.cell import ActivationScheme
from harness.quantization.numerics.deltas import DeltaWeight, LowRankWeight
from harness.quantization.numerics.weights import QuantizedWeight

HALVES = (torch.bfloat16, torch.float16)


class Product:
    """Dense product of the base, and thin products of the difference."""

    name = "thin_products"

    def available(self, device: torch.device) -> str:
        return ""

    def reasons(
        self,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[str]:
        found = []
        if not isinstance(weight, DeltaWeight) or not isinstance(weight.change, LowRankWeight):
            found.append("it is no difference of low rank from a base")
        elif weight.base is None:
            found.append("the base is not there")
        if activation is not None:
            found.append("inputs are rounded, and this kernel multiplies them as they are")
        return found

    def prepare(self, weight: QuantizedWeight, device: torch.device) -> dict[str, Tensor]:
        assert isinstance(weight, DeltaWeight) and isinstance(weight.change, LowRankWeight)
        assert weight.base is not None, "refused by `reasons`"
        left, right = weight.change.factors()
        base = next(
            (
                half
                for each in HALVES
                if torch.equal((half := weight.base.to(each)).float(), weight.base)
            ),
            weight.base,
        )
        return {
            name: t.to(device) for name, t in (("base", base), ("left", left), ("right", right))
        }

    def multiply(
        self, x: Tensor, buffers: dict[str, Tensor], activation: ActivationScheme | None
    ) -> Tensor:
        base, left, right = (buffers[name].to(x.dtype) for name in ("base", "left", "right"))
        y = nn.functional.linear(x, base)
        return y + nn.functional.linear(nn.functional.linear(x, right), left)

    def dequantize(self, buffers: dict[str, Tensor]) -> Tensor:
        return buffers["base"].float() + buffers["left"] @ buffers["right"]
