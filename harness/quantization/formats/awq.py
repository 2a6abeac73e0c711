"""Checkpoints in the GEMM layout of AWQ, which vLLM, SGLang, TensorRT-LLM and transformers load.

A linear [out, in] has codes of 4 bits and groups of consecutive columns. Eight codes stand in one int32 word; nibble i (bits 4i to
4i + 3) of word j holds output 8j + ORDER[i]:

    qweight  [in, out / 8] int32        codes, one input channel a row
    qzeros   [groups, out / 8] int32    zero points, as they are
    scales   [groups, out] float16

weight = (code - zero) · scale; symmetric weights have zero 8. What AWQ's scales changed stands in the norms, biases and linears
before; the layout has no scale of inputs. The layout does not depend on the method: codes of RTN or GPTQ are stored as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme, WeightScheme
from harness.quantization.formats.protocols import Description, grid_reasons
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
ROWS, COLUMNS = 8, 32  # kernels ask these multiples of out_features and in_features


class Layout:
    """AWQ, GEMM."""

    def scheme_reasons(
        self, weight: WeightScheme, activation: ActivationScheme | None
    ) -> list[str]:
        reasons = []
        if weight.format != "int":
            reasons.append(f'AWQ\'s layout holds integers, not "{weight.format}"')
        elif weight.bits != BITS:
            reasons.append(f"AWQ's layout has codes of {BITS} bits, not {weight.bits:g}")
        if weight.signed_scales:
            reasons.append(
                "scales below 0: no engine was seen to read them from AWQ's layout; use a scheme without signed_scales"
            )
        if weight.zero_point != "integer":
            reasons.append(
                "AWQ's layout has integer zero points; use scheme.weight.zero_point=integer"
            )
        if activation is not None:
            reasons.append("AWQ's layout is of weights alone; the scheme rounds activations too")
        return reasons

    def weight_reasons(self, weight: QuantizedWeight, dtype: torch.dtype) -> list[str]:
        if not isinstance(weight, UniformWeight):
            return [f'the layout "{weight.kind}" is no grid of integers']
        reasons = []
        rows, columns = weight.shape
        if rows % ROWS or columns % COLUMNS:
            reasons.append(
                f"a matrix of {rows} × {columns}; outputs must be a multiple of {ROWS}, inputs of {COLUMNS}"
            )
        if weight.column_group is not None:
            reasons.append("groups in the order of activations (act_order); use static_groups=true")
        reasons += grid_reasons(weight)
        return reasons

    def describe(
        self, weight: QuantizedWeight, activation: ActivationScheme | None
    ) -> Description | None:
        if not isinstance(weight, UniformWeight):
            return None
        return {"group_size": weight.group_size if weight.scale.shape[1] > 1 else -1}

    def model_reasons(self, described: Mapping[str, Description | None]) -> list[str]:
        sizes = sorted({d["group_size"] for d in described.values() if d is not None})
        if len(sizes) <= 1:
            return []
        listed = ", ".join(map(str, sizes))
        return [f"AWQ's layout has one group size for all linears; here they are {listed}"]

    def pack_linear(
        self, weight: QuantizedWeight, activation: ActivationScheme | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        if not isinstance(weight, UniformWeight):
            return {"weight": weight.dequantize().to(dtype)}
        zero = weight.zero
        if zero is None:
            zero = torch.full_like(weight.scale, 2 ** (BITS - 1))
        return {
            "qweight": _words(weight.codes.T),
            "qzeros": _words(zero.T),
            "scales": weight.scale.T.to(torch.float16).contiguous(),
        }

    def quantization_config(
        self, described: Mapping[str, Description | None], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        first = next(d for d in described.values() if d is not None)
        dense = [name for name, description in described.items() if description is None]
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": first["group_size"],
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [*dense, *others],
        }

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def unpack_linear(tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix [out, in] float32 of qweight, qzeros and scales."""
    codes, zero = (_codes(tensors[name]).T for name in ("qweight", "qzeros"))
    scale = tensors["scales"].T.float()
    size = codes.shape[1] // scale.shape[1]
    return (codes - zero.repeat_interleave(size, 1)) * scale.repeat_interleave(size, 1)


def _words(values: Tensor) -> Tensor:
    """Values of 4 bits [n, out] as int32 words [n, out / 8] in the layout's order."""
    eights = values.to(torch.int64).reshape(values.shape[0], -1, len(ORDER))[..., list(ORDER)]
    shifts = torch.arange(0, 32, BITS, device=values.device)
    words = (eights << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def _codes(words: Tensor) -> Tensor:
    """The inverse of `_words`: [n, out] float32."""
    shifts = torch.arange(0, 32, BITS, device=words.device)
    nibbles = (words.to(torch.int64)[..., None] >> shifts) & 15
    eights = torch.empty_like(nibbles)
    eights[..., list(ORDER)] = nibbles
    return eights.flatten(1).float()
