"""A width per group of input channels: the layout, and how SliM-LLM (arXiv 2405.14917) finds the widths.

Equal numbers of groups are moved one bit down and one bit up, the least and the most salient ones, so that the mean stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from harness.core.errors import MethodError
from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored, fit
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import QuantizedWeight

FLOOR = 1e-6  # of probabilities in the divergence


@dataclass(frozen=True)
class MixedWidthWeight(QuantizedWeight):
    """Groups of consecutive input channels with a width each, the same for all rows.

    codes   [out, in] uint8
    scale   [out, groups] float32, exact in scale_dtype
    offset  [out, groups] float32: the zero point of groups of 2 bits and more, scale * (code - offset), an integer of at most
            five digits; the mean of groups of one bit, offset + scale * (2 code - 1), exact in scale_dtype
    bits    [groups], 1 to 8
    """

    kind = "mixed_width"
    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: tuple[int, ...]
    scale_dtype: str = "float16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        codes = self.codes.reshape(rows, len(self.bits), -1).float()
        scale, offset = self.scale.unsqueeze(-1), self.offset.unsqueeze(-1)
        single = torch.tensor([width == 1 for width in self.bits], device=codes.device)[
            None, :, None
        ]
        values = torch.where(single, offset + scale * (2 * codes - 1), scale * (codes - offset))
        return values.reshape(rows, columns)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        target = SCALE_DTYPES[self.scale_dtype]
        rows, columns = self.shape
        grouped = self.codes.reshape(rows, len(self.bits), -1)
        lowest = min(self.bits)
        span = max(1, (max(self.bits) - lowest).bit_length())
        widths = torch.tensor(self.bits, dtype=torch.uint8)
        tensors = {
            "scale": self.scale.to(target).contiguous(),
            "widths": pack(widths - lowest, span),
        }
        for width, groups in self._members().items():
            tensors[f"codes_{width}"] = pack(grouped[:, groups], width)
            offset = self.offset[:, groups]
            if width == 1:
                tensors["offset_1"] = offset.to(target).contiguous()
            elif bool(((offset >= 0) & (offset < 2**width)).all()):
                tensors[f"offset_{width}"] = pack(offset.to(torch.uint8), width)
            else:  # zero points outside the codes: ranges that do not hold zero
                tensors[f"offset_{width}"] = offset.to(torch.int16).contiguous()
        meta = {
            "shape": [rows, columns],
            "groups": len(self.bits),
            "lowest": lowest,
            "span": span,
            "scale_dtype": self.scale_dtype,
        }
        return tensors, meta

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        (rows, columns), groups = meta["shape"], meta["groups"]
        scale = tensors["scale"].float()
        widths = unpack(tensors["widths"], meta["span"], groups).to(torch.int64) + meta["lowest"]
        codes = torch.empty(rows, groups, columns // groups, dtype=torch.uint8, device=scale.device)
        offset = torch.empty_like(scale)
        found = cls(
            codes.reshape(rows, columns), scale, offset, tuple(widths.tolist()), meta["scale_dtype"]
        )
        for width, members in found._members().items():
            part = codes[:, members]
            codes[:, members] = unpack(tensors[f"codes_{width}"], width, part.numel()).reshape(
                part.shape
            )
            stored = tensors[f"offset_{width}"]
            packed = stored.dtype == torch.uint8
            plain = (
                unpack(stored, width, rows * len(members)).reshape(rows, -1) if packed else stored
            )
            offset[:, members] = plain.float()
        return found

    def _members(self) -> dict[int, list[int]]:
        """The groups of every width, narrow ones first."""
        return {
            width: [g for g, bits in enumerate(self.bits) if bits == width]
            for width in sorted(set(self.bits))
        }


def binarize(values: Tensor, scale_dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and mean of each row of values [..., g]: mean + scale (2 code - 1); scale = mean|w| not centred, as published"""
    mean = as_stored(values.mean(-1, keepdim=True), scale_dtype)
    scale = as_stored(values.abs().mean(-1, keepdim=True), scale_dtype)
    return (values >= mean).to(torch.uint8), scale, mean


def nearest_at(groups: Tensor, bits: int, scale_dtype: str) -> Tensor:
    """Groups [..., g] rounded to nearest at a width: GPTQ's asymmetric grid, or two values."""
    if bits == 1:
        codes, scale, mean = binarize(groups, scale_dtype)
        return mean + scale * (2 * codes.float() - 1)
    return fit(groups, bits, False, "gptq", scale_dtype).nearest(groups)


def group_salience(weight: Tensor, factor: Tensor, size: int) -> Tensor:
    """Sum over each group of w² / U_jj², [groups]: weight [out, in], factor the upper triangular U of H⁻¹ = Uᵀ U."""
    salience = (weight / factor.diagonal()).square().sum(0)
    return salience.reshape(-1, size).sum(1)


def widths_of(salience: Tensor, bits: int, moved: int) -> tuple[int, ...]:
    """bits per group [groups]: one less for the `moved` least salient, one more for as many of the most salient."""
    order = torch.argsort(salience, stable=True).tolist()
    widths = [bits] * len(order)
    for k in range(moved):
        widths[order[k]] -= 1
        widths[order[-1 - k]] += 1
    return tuple(widths)


def search_moved(
    weight: Tensor,
    inputs: Sequence[Tensor],
    salience: Tensor,
    bits: int,
    size: int,
    scale_dtype: str,
) -> int:
    """How many groups to move down and up: the least divergence of the layer's output, 1 … groups // 2 - 1, the first of equals.

    weight [out, in]; inputs: one [length, in] per sequence. Divergence: sum of p_q (log p_q - log p_o) over softmaxes of the
    output features, mean over tokens, then over sequences. Fewer than four groups leave no choice: 0, all groups at `bits`.
    Only two groups differ from one candidate to the next, so a candidate costs two narrow products. Peak memory: four copies of
    weight, and three outputs of one sequence. Raises MethodError when the outputs are not finite.
    """
    groups = weight.shape[1] // size
    if groups // 2 - 1 < 1:
        return 0
    grouped = weight.reshape(weight.shape[0], groups, size)
    middle = nearest_at(grouped, bits, scale_dtype)
    down, up = (nearest_at(grouped, bits + step, scale_dtype) - middle for step in (-1, 1))
    order = torch.argsort(salience, stable=True).tolist()
    divergence = torch.zeros(groups // 2 - 1, dtype=torch.float64, device=weight.device)
    for sequence in inputs:
        x = sequence.to(weight.device, torch.float32).reshape(-1, weight.shape[1])
        original = torch.softmax(x @ weight.T, -1).clamp(min=FLOOR).log()
        output = x @ middle.reshape(weight.shape).T
        for k in range(groups // 2 - 1):
            for group, change in ((order[k], down), (order[-1 - k], up)):
                output += x[:, group * size : (group + 1) * size] @ change[:, group].T
            p = torch.softmax(output, -1).clamp(min=FLOOR)
            divergence[k] += (p * (p.log() - original)).sum(-1).mean()
    if not bool(torch.isfinite(divergence).all()):
        way_out = "load the model in a wider dtype (model.dtype=float32)"
        raise MethodError(f"the divergence of the layer's output is not finite; {way_out}")
    return int(divergence.argmin()) + 1
