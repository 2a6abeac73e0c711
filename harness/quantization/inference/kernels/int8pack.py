"""Weights of 8 bits, one scale per row, times bfloat16 inputs: torch's packed 8-bit product of the CPU.

    y = bfloat16(s · Σ_k x_k (q_k - 128))

torch does not check in_features: one that is no multiple of 16 would be read beyond its end, so it is refused here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme
from harness.quantization.inference.kernels.protocols import only_bfloat16, plain_uniform
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

COLUMNS = 16  # in_features must be a multiple


class Product:
    """torch._weight_int8pack_mm."""

    name = "int8pack"

    def available(self, device: torch.device) -> str:
        if device.type != "cpu":
            return "int8pack is of the CPU"
        has = hasattr(torch, "_weight_int8pack_mm")
        return "" if has else f"torch {torch.__version__} has no packed 8-bit product of the CPU"

    def reasons(
        self,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[str]:
        found = plain_uniform(weight, 8)
        if found:
            return found
        assert isinstance(weight, UniformWeight)
        if weight.zero is not None:
            found.append("weights with zero points; int8pack is for symmetric ones")
        if weight.scale.shape[1] != 1:
            found.append(f"groups of {weight.group_size}; int8pack has one scale per row")
        if weight.shape[1] % COLUMNS:
            found.append(f"int8pack needs in_features that are a multiple of {COLUMNS}")
        return found + only_bfloat16(weight, activation, dtype, self.name)

    def prepare(self, weight: QuantizedWeight, device: torch.device) -> dict[str, Tensor]:
        assert isinstance(weight, UniformWeight)
        codes = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        scale = weight.scale[:, 0].to(torch.bfloat16)
        return {"codes": codes.to(device).contiguous(), "scale": scale.to(device).contiguous()}

    def multiply(
        self, x: Tensor, buffers: dict[str, Tensor], activation: ActivationScheme | None
    ) -> Tensor:
        return torch._weight_int8pack_mm(x, buffers["codes"], buffers["scale"])

    def dequantize(self, buffers: dict[str, Tensor]) -> Tensor:
        return buffers["codes"].float() * buffers["scale"].float()[:, None]
