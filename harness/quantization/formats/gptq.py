"""Checkpoints in the layout of GPTQ-for-LLaMa and AutoGPTQ, version 1, which vLLM, GPTQModel and other kernels load.

A linear [out, in] with groups of columns is stored as codes of b bits in int32 words, without gaps, lowest bits first:

    qweight  [in · b / 32, out] int32     codes of one output channel, down the columns
    qzeros   [groups, out · b / 32] int32   zero point - 1, across the outputs: a zero point of 0 cannot be stored
    scales   [groups, out] float16
    g_idx    [in] int32                   the group of each input channel; any order (act_order)

weight = scales[g] · (code - zero), symmetric ones with zero 2^(b-1). quantize_config.json repeats what config.json says. Version
2 (`formats/gptq_v2.py`) stores zero points as they are. A file says which it is by `checkpoint_format`; an engine that takes one
for the other writes text without sense and raises no error. transformers itself loads this layout only with a kernel package
(gptqmodel); `unpack_linear` reads it with torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme, WeightScheme
from harness.quantization.formats.protocols import Description, grid_reasons
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

WIDTHS = (2, 3, 4, 8)
MULTIPLE = 32  # kernels ask it of both features; words of 3 bits need it


class Layout:
    """GPTQ, version 1. subtracted: from every zero point before it is stored."""

    checkpoint_format = "gptq"
    subtracted = 1

    def scheme_reasons(
        self, weight: WeightScheme, activation: ActivationScheme | None
    ) -> list[str]:
        reasons = []
        if weight.format != "int":
            reasons.append(f'GPTQ\'s layout holds integers, not "{weight.format}"')
        elif weight.bits not in WIDTHS:
            reasons.append(
                f"GPTQ's layout has codes of {', '.join(map(str, WIDTHS))} bits, not {weight.bits:g}"
            )
        if weight.signed_scales:
            reasons.append(
                "scales below 0: no engine was seen to read them from GPTQ's layout; use a scheme without signed_scales"
            )
        if weight.zero_point != "integer":
            reasons.append(
                "GPTQ's layout has integer zero points; use scheme.weight.zero_point=integer"
            )
        if activation is not None:
            reasons.append(
                "GPTQ's layout holds weights only, and the scheme rounds activations too"
            )
        return reasons

    def weight_reasons(self, weight: QuantizedWeight, dtype: torch.dtype) -> list[str]:
        if not isinstance(weight, UniformWeight):
            return [f'the layout "{weight.kind}" is no grid of integers']
        reasons = []
        rows, columns = weight.shape
        if rows % MULTIPLE or columns % MULTIPLE:
            reasons.append(f"a matrix of {rows} × {columns}; both must be multiples of {MULTIPLE}")
        reasons += grid_reasons(weight, least_zero=self.subtracted)
        return reasons

    def describe(
        self, weight: QuantizedWeight, activation: ActivationScheme | None
    ) -> Description | None:
        if not isinstance(weight, UniformWeight):
            return None
        size = weight.group_size if weight.scale.shape[1] > 1 else -1
        ordered = weight.column_group is not None
        return {
            "bits": weight.bits,
            "group_size": size,
            "sym": weight.zero is None,
            "desc_act": ordered,
        }

    def model_reasons(self, described: Mapping[str, Description | None]) -> list[str]:
        different = {tuple(sorted(d.items())) for d in described.values() if d is not None}
        reasons = []
        for key, title in (
            ("bits", "bit widths"),
            ("group_size", "group sizes"),
            ("sym", "kinds of zero points"),
        ):
            values = sorted({dict(d)[key] for d in different})
            if len(values) > 1:
                reasons.append(
                    f"GPTQ's layout has one description for all linears; here {title} are {', '.join(map(str, values))}"
                )
        kept = [name for name, description in described.items() if description is None]
        if kept:
            reasons.append(
                f"GPTQ's layout quantizes every linear of a block; here {', '.join(kept[:4])} … are not"
            )
        return reasons

    def pack_linear(
        self, weight: QuantizedWeight, activation: ActivationScheme | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        assert isinstance(weight, UniformWeight), weight.kind
        columns = weight.shape[1]
        zero = (
            torch.full_like(weight.scale, 2 ** (weight.bits - 1))
            if weight.zero is None
            else weight.zero
        )
        group = weight.column_group
        if group is None:
            group = (
                torch.arange(columns, dtype=torch.int32, device=weight.codes.device)
                // weight.group_size
            )
        return {
            "qweight": _words(weight.codes, weight.bits).T.contiguous(),
            "qzeros": _words((zero - self.subtracted).T.to(torch.uint8), weight.bits),
            "scales": weight.scale.T.to(torch.float16).contiguous(),
            "g_idx": group.to(torch.int32),
        }

    def quantization_config(
        self, described: Mapping[str, Description | None], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        first = next(d for d in described.values() if d is not None)
        ordered = any(d["desc_act"] for d in described.values() if d is not None)
        return {
            **first,
            "desc_act": ordered,
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            "lm_head": False,
        }

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        return {"quantize_config.json": dict(quantization_config)}


def unpack_linear(tensors: Mapping[str, Tensor], bits: int, added: int = 1) -> Tensor:
    """The matrix [out, in] float32 of qweight, qzeros, scales and g_idx. added: to stored zero points; 1 in version 1, else 0."""
    groups, rows = tensors["scales"].shape
    columns = tensors["g_idx"].numel()
    codes = _codes(tensors["qweight"].T.contiguous(), bits, columns).float()  # [out, in]
    zero = (_codes(tensors["qzeros"], bits, rows).float() + added).T  # [out, groups]
    assert zero.shape == (rows, groups)
    group = tensors["g_idx"].long()
    return tensors["scales"].T.float()[:, group] * (codes - zero[:, group])


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, m] as int32 words [n, m · bits / 32] along the last axis; m is a multiple of 32."""
    return pack(codes.contiguous(), bits).view(torch.int32).reshape(codes.shape[0], -1)


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_words`: [n, count] uint8."""
    rows = words.shape[0]
    return unpack(words.contiguous().view(torch.uint8).reshape(-1), bits, rows * count).reshape(
        rows, count
    )
