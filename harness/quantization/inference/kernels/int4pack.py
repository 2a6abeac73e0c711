"""Weights of 4 bits in groups times bfloat16 inputs: torch's packed 4-bit product of the CPU.

    y = bfloat16(Σ_k x_k · ((q_k - 8) · s + o)),   o = (8 - z) · s

Sums are in float32 and the weight is not rounded, so the product is nearer to the codes than a dequantized bfloat16 matrix is. The
offset o is bfloat16: it is exact for symmetric weights and for zero points near 8, and off by at most s/32 otherwise.
The packed bytes depend on the processor: they are made when a model is loaded and never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme
from harness.quantization.inference.kernels.protocols import only_bfloat16, plain_uniform
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

GROUPS = (32, 64, 128, 256)
ROWS = 16  # out_features must be a multiple
MIDDLE = 8


class Product:
    """torch.ops.aten._weight_int4pack_mm_for_cpu."""

    name = "int4pack"

    def available(self, device: torch.device) -> str:
        if device.type != "cpu":
            return "int4pack is of the CPU"
        has = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        return "" if has else f"torch {torch.__version__} has no packed 4-bit product of the CPU"

    def reasons(
        self,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[str]:
        found = plain_uniform(weight, 4)
        if found:
            return found
        assert isinstance(weight, UniformWeight)
        rows, columns = weight.shape
        if weight.group_size not in GROUPS or columns % weight.group_size:
            found.append(
                f"groups of {weight.group_size}; int4pack has groups of {', '.join(map(str, GROUPS))}"
            )
        if rows % ROWS:
            found.append(f"out_features {rows} is no multiple of {ROWS}")
        return found + only_bfloat16(weight, activation, dtype, self.name)

    def prepare(self, weight: QuantizedWeight, device: torch.device) -> dict[str, Tensor]:
        assert isinstance(weight, UniformWeight)
        codes = weight.codes.to(device, torch.int32).contiguous()
        # torch masks nothing: a code of 16 would spill into its neighbour
        assert int(codes.min()) >= 0 and int(codes.max()) <= 15, "codes of 4 bits"
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale = weight.scale.to(device)
        offset = (
            torch.zeros_like(scale)
            if weight.zero is None
            else (MIDDLE - weight.zero.to(device)) * scale
        )
        # torch reads this without a look at its shape or strides
        scales_offsets = torch.stack((scale.T, offset.T), -1).to(torch.bfloat16).contiguous()
        assert scales_offsets.shape == (weight.scale.shape[1], weight.shape[0], 2)
        return {"packed": packed, "scales_offsets": scales_offsets}

    def multiply(
        self, x: Tensor, buffers: dict[str, Tensor], activation: ActivationScheme | None
    ) -> Tensor:
        scales_offsets = buffers["scales_offsets"]
        group = x.shape[1] // scales_offsets.shape[0]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, buffers["packed"], group, scales_offsets
        )

    def dequantize(self, buffers: dict[str, Tensor]) -> Tensor:
        """The packed codes are read by multiplying the unit matrix, which is exact: each sum has one term."""
        scales_offsets = buffers["scales_offsets"]
        groups, rows, _ = scales_offsets.shape
        columns = buffers["packed"].shape[1] * 2
        unit = torch.ones_like(scales_offsets)
        unit[..., 1] = 0
        eye = torch.eye(columns, dtype=torch.bfloat16, device=scales_offsets.device)
        centred = torch.ops.aten._weight_int4pack_mm_for_cpu(
            eye, buffers["packed"], columns // groups, unit
        )
        scale, offset = scales_offsets.float().unbind(-1)  # [groups, rows]
        values = centred.T.float().reshape(rows, groups, -1)
        return (values * scale.T[..., None] + offset.T[..., None]).reshape(rows, columns)
