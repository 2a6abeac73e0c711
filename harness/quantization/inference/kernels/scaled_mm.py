"""FP8 codes (E4M3) times FP8 codes, one scale per row and per token: torch._scaled_mm.

    y = (codes_x codes_Wᵀ) · scale_x · scale_W

Sums are in float32; on CUDA the result is bfloat16. In float32 on a CPU it differs from simulation by less than 1e-4 of the largest
output. On a CPU it is a reference and slower than a dequantized matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme
from harness.quantization.inference.kernels.int_mm import dynamic_per_token, enough_rows, multiples
from harness.quantization.numerics.activations import codes_per_token
from harness.quantization.numerics.weights import QuantizedWeight

FLOAT8 = "fp8_e4m3"
LARGEST = 448.0


class Product:
    """torch._scaled_mm."""

    name = "scaled_mm"

    def available(self, device: torch.device) -> str:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "FP8 products need a card of compute capability 8.9"
        return "" if device.type in ("cpu", "cuda") else f"scaled_mm is not of {device.type}"

    def reasons(
        self,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[str]:
        found = dynamic_per_token(activation, FLOAT8)
        if _codes(weight) is None:
            found.append(
                "FP8 products need E4M3 weights with one scale per output channel (scheme w8a8_fp8)"
            )
        return found + multiples(weight, device)

    def prepare(self, weight: QuantizedWeight, device: torch.device) -> dict[str, Tensor]:
        found = _codes(weight)
        assert found is not None, "refused by reasons"
        codes, scale = found
        return {"codes": codes.to(device), "scale": scale.to(device)}

    def multiply(
        self, x: Tensor, buffers: dict[str, Tensor], activation: ActivationScheme | None
    ) -> Tensor:
        assert activation is not None, "refused by reasons"
        tokens, token_scale = codes_per_token(x, activation)
        rows = tokens.shape[0]
        tokens = enough_rows(tokens)
        scales = torch.ones(tokens.shape[0], 1, device=x.device)
        scales[:rows] = token_scale.float()
        out = torch.bfloat16 if tokens.is_cuda else torch.float32
        product = torch._scaled_mm(
            tokens,
            buffers["codes"].T,
            scale_a=scales,
            scale_b=buffers["scale"][None],
            out_dtype=out,
        )
        return product[:rows].to(x.dtype)

    def dequantize(self, buffers: dict[str, Tensor]) -> Tensor:
        return buffers["codes"].float() * buffers["scale"][:, None]


def _codes(weight: QuantizedWeight) -> tuple[Tensor, Tensor] | None:
    """Codes [out, in] float8 and scale [out] float32; None where the matrix is not exactly that."""
    scale = getattr(weight, "scale", None)
    if scale is None or scale.shape != (weight.shape[0], 1):
        return None
    values = weight.dequantize()
    codes = (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (codes, scale[:, 0].float()) if torch.equal(codes.float() * scale, values) else None
