"""What a kernel says of itself and does. `inference/kernels/<name>.py` defines `class Product`.

A kernel sees one matrix and inputs of two dimensions. Reshaping, an empty input, bias, adapters and input transforms are
`QuantizedLinear`'s.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight


class Kernel(Protocol):
    """One product. name: what `efficiency` prints after "real:"."""

    name: str

    def available(self, device: torch.device) -> str:
        """Why it cannot run on this device at all; "" where it can."""
        ...

    def reasons(
        self,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[str]:
        """Why it cannot hold this matrix exactly, or not round inputs as the scheme says; empty where it can."""
        ...

    def prepare(self, weight: QuantizedWeight, device: torch.device) -> dict[str, Tensor]:
        """The buffers that a product reads; nothing else of the weight is kept."""
        ...

    def multiply(
        self, x: Tensor, buffers: dict[str, Tensor], activation: ActivationScheme | None
    ) -> Tensor:
        """x [rows, in], contiguous, at least one row -> [rows, out] in x's dtype."""
        ...

    def dequantize(self, buffers: dict[str, Tensor]) -> Tensor:
        """The matrix that it multiplies by, [out, in] float32, from the buffers alone."""
        ...


def plain_uniform(weight: QuantizedWeight, bits: int) -> list[str]:
    """Reasons why a matrix is not uniform codes of these bits in consecutive groups, each with one scale."""
    if not isinstance(weight, UniformWeight):
        return [f"the layout is {weight.kind}, not uniform integers"]
    found = []
    if weight.bits != bits:
        found.append(f"the codes have {weight.bits} bits, not {bits}")
    if weight.column_group is not None:
        found.append(
            "groups in the order of activations (act_order) are not contiguous; use static_groups=true"
        )
    if weight.tensor_scale is not None:
        found.append("scales are float8 numbers times one of the matrix")
    return found


def only_bfloat16(
    weight: UniformWeight, activation: ActivationScheme | None, dtype: torch.dtype, name: str
) -> list[str]:
    """Reasons of the kernels for weights alone: inputs that are rounded, another dtype, scales that bfloat16 rounds."""
    found = []
    if activation is not None:
        found.append("inputs are rounded, and this kernel multiplies them as they are")
    if dtype != torch.bfloat16:
        found.append(f"{name} is fast in bfloat16 alone; use model.dtype=bfloat16")
    if not torch.equal(weight.scale.to(torch.bfloat16).float(), weight.scale):
        found.append(
            f"{weight.scale_dtype} scales are not exact in bfloat16; use scheme.weight.scale_dtype=bfloat16"
        )
    return found
