"""INT8 codes times INT8 codes with exact integer sums: torch._int_mm.

    y = (codes_x codes_Wᵀ) · scale_x · scale_W

Weights are symmetric with one scale per output channel, inputs symmetric with one per token. Simulation rounds the same codes and
multiplies in the model's dtype, so the two differ by the order of a sum: in float32 by less than 1e-5 of the largest output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme
from harness.quantization.inference.kernels.protocols import plain_uniform
from harness.quantization.numerics.activations import codes_per_token
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

CUDA_ROWS, CUDA_MULTIPLE = 32, 16  # on CUDA: more than 16 rows, and sizes that are multiples
LONGEST = 131_071  # in_features: 127 · 127 · n stays below 2^31


class Product:
    """torch._int_mm."""

    name = "int_mm"

    def available(self, device: torch.device) -> str:
        return "" if device.type in ("cpu", "cuda") else f"int_mm is not of {device.type}"

    def reasons(
        self,
        weight: QuantizedWeight,
        activation: ActivationScheme | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[str]:
        found = dynamic_per_token(activation, "int")
        if activation is not None and (activation.bits != 8 or not activation.symmetric):
            found.append("inputs are not symmetric integers of 8 bits (scheme w8syma8)")
        if why := plain_uniform(weight, 8):
            return found + why
        assert isinstance(weight, UniformWeight)
        if weight.zero is not None or weight.scale.shape[1] != 1:
            found.append(
                "INT8 products need symmetric 8-bit weights with one scale per output channel"
            )
        if weight.shape[1] > LONGEST:
            found.append(f"in_features {weight.shape[1]}: sums of more than {LONGEST} may overflow")
        return found + multiples(weight, device)

    def prepare(self, weight: QuantizedWeight, device: torch.device) -> dict[str, Tensor]:
        assert isinstance(weight, UniformWeight)
        codes = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        return {"codes": codes.to(device), "scale": weight.scale[:, 0].float().to(device)}

    def multiply(
        self, x: Tensor, buffers: dict[str, Tensor], activation: ActivationScheme | None
    ) -> Tensor:
        assert activation is not None, "refused by reasons"
        tokens, token_scale = codes_per_token(x, activation)
        rows = tokens.shape[0]
        product = torch._int_mm(enough_rows(tokens), buffers["codes"].T)[:rows].float()
        return (product * token_scale.float() * buffers["scale"]).to(x.dtype)

    def dequantize(self, buffers: dict[str, Tensor]) -> Tensor:
        return buffers["codes"].float() * buffers["scale"][:, None]


def dynamic_per_token(activation: ActivationScheme | None, format_: str) -> list[str]:
    """Reasons why inputs have no codes of a format with one dynamic scale per token."""
    if activation is None:
        return ["inputs are not rounded, and this kernel multiplies codes with codes"]
    found = []
    if activation.format != format_:
        found.append(f"inputs are {activation.format}")
    if not activation.dynamic or activation.granularity != "token":
        found.append("products of codes need activations with dynamic scales per token")
    if activation.outlier_threshold:
        found.append("outlier channels are kept apart")
    return found


def multiples(weight: QuantizedWeight, device: torch.device) -> list[str]:
    """What CUDA asks of a matrix's sizes."""
    if device.type == "cuda" and any(size % CUDA_MULTIPLE for size in weight.shape):
        return [f"on CUDA sizes must be multiples of {CUDA_MULTIPLE}, not {list(weight.shape)}"]
    return []


def enough_rows(tokens: Tensor) -> Tensor:
    """The rows, and rows of zeros up to what CUDA asks for."""
    missing = CUDA_ROWS - tokens.shape[0]
    if not tokens.is_cuda or missing <= 0:
        return tokens
    return torch.cat((tokens, tokens.new_zeros(missing, tokens.shape[1])))
