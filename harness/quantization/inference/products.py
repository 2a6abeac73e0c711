"""Products of codes with codes, as hardware computes them: INT8 with exact integer sums, FP8 with scales per row and token.

    y = (codes_x codes_Wᵀ) · scale_x · scale_W

INT8: symmetric 8-bit weights with one scale per output channel, symmetric 8-bit activations with one per token (torch._int_mm, sums
in int32 without rounding). FP8: E4M3 on both sides (torch._scaled_mm, sums in float32; on CUDA the result is in bfloat16).
Simulation rounds the same codes and multiplies in the model's dtype, so the two differ by the order of a sum: on a CPU in float32
by less than 1e-5 of the largest output for INT8 and 1e-4 for FP8; on CUDA FP8 by bfloat16's rounding of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme
from harness.core.errors import MethodError
from harness.quantization.numerics.activations import codes_per_token
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

FLOAT8 = "fp8_e4m3"
CUDA_ROWS, CUDA_MULTIPLE = (
    32,
    16,
)  # torch._int_mm wants more than 16 rows, both want multiples of 8 or 16 otherwise


class CodeProduct:
    """The product of one weight. codes [out, in] int8 or float8, scale [out] float32. Raises MethodError for other formats."""

    def __init__(
        self, weight: QuantizedWeight, activation: ActivationScheme | None, device: torch.device
    ) -> None:
        if (
            activation is None
            or not activation.dynamic
            or activation.granularity != "token"
            or activation.outlier_threshold
        ):
            raise MethodError(
                "products of codes need activations with dynamic scales per token; use mode dense"
            )
        self.activation = activation
        if activation.format == "int":
            self.codes, self.scale = _integers(weight, activation)
        elif activation.format == FLOAT8:
            self.codes, self.scale = _floats(weight)
        else:
            raise MethodError(
                f"no product of {activation.format} activations on this hardware; use mode dense"
            )
        if device.type == "cuda" and any(size % CUDA_MULTIPLE for size in weight.shape):
            raise MethodError(
                f"products of codes need multiples of {CUDA_MULTIPLE}, not {list(weight.shape)}; use mode dense"
            )
        self.codes, self.scale = self.codes.to(device), self.scale.to(device)

    def __call__(self, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype; codes and scale are this weight's, wherever the module has moved them."""
        flat = x.reshape(-1, x.shape[-1])
        if not flat.shape[0]:
            return x.new_zeros(*x.shape[:-1], codes.shape[0])
        tokens, token_scale = codes_per_token(flat, self.activation)
        rows = tokens.shape[0]
        if tokens.is_cuda and rows < CUDA_ROWS:
            tokens = torch.cat((tokens, tokens.new_zeros(CUDA_ROWS - rows, tokens.shape[1])))
        if codes.dtype == torch.int8:
            product = torch._int_mm(tokens, codes.T)[:rows].float() * token_scale.float() * scale
        else:
            ones = torch.ones(tokens.shape[0], 1, device=x.device)
            ones[:rows] = token_scale.float()
            out = torch.bfloat16 if tokens.is_cuda else torch.float32
            product = torch._scaled_mm(
                tokens, codes.T, scale_a=ones, scale_b=scale[None], out_dtype=out
            )[:rows]
        return product.to(x.dtype).reshape(*x.shape[:-1], -1)


def _integers(weight: QuantizedWeight, activation: ActivationScheme) -> tuple[Tensor, Tensor]:
    fits = (
        isinstance(weight, UniformWeight)
        and weight.bits == 8
        and weight.zero is None
        and weight.scale.shape[1] == 1
    )
    if not fits or activation.bits != 8 or not activation.symmetric:
        raise MethodError(
            "INT8 products need symmetric 8-bit weights with one scale per output channel and symmetric 8-bit activations "
            "(scheme w8syma8); use mode dense"
        )
    assert isinstance(weight, UniformWeight)
    return (weight.codes.to(torch.int16) - 128).to(torch.int8), weight.scale[:, 0].float()


def _floats(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    scale = getattr(weight, "scale", None)
    if scale is None or scale.shape != (weight.shape[0], 1):
        raise MethodError(
            "FP8 products need E4M3 weights with one scale per output channel (scheme w8a8_fp8); use mode dense"
        )
    elements = weight.dequantize() / scale
    codes = elements.clamp(-448, 448).to(torch.float8_e4m3fn)
    if not torch.equal(codes.float() * scale, weight.dequantize()):
        raise MethodError(
            "FP8 products need E4M3 weights with one scale per output channel (scheme w8a8_fp8); use mode dense"
        )
    return codes, scale[:, 0].float()
