"""Two-bit weights as a sum of two binary matrices with scales of their own: w' = a1 b1 + a2 b2, b1 and b2 of {0, 1}.

Flexible dual binarization of DB-LLM (arXiv 2402.11960). Untrained, a1 = 2s and a2 = -s: levels -s, 0, s, 2s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import QuantizedWeight

LEVELS = "the levels -s, 0, s, 2s are not symmetric"


@dataclass(frozen=True)
class DualBinaryWeight(QuantizedWeight):
    """first, second: [out, in] uint8 of 0 and 1; first_scale, second_scale: [out, groups] float32, exact in scale_dtype."""

    kind = "dual_binary"
    first: Tensor
    second: Tensor
    first_scale: Tensor
    second_scale: Tensor
    scale_dtype: str = "float16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape[0], self.first.shape[1]

    @property
    def group_size(self) -> int:
        """Input channels per pair of scales."""
        return self.shape[1] // self.first_scale.shape[1]

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        planes = [
            plane.reshape(rows, scale.shape[1], -1).float() * scale.unsqueeze(-1)
            for plane, scale in ((self.first, self.first_scale), (self.second, self.second_scale))
        ]
        return (planes[0] + planes[1]).reshape(rows, columns)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        target = SCALE_DTYPES[self.scale_dtype]
        tensors = {
            "first": pack(self.first, 1),
            "second": pack(self.second, 1),
            "first_scale": self.first_scale.to(target).contiguous(),
            "second_scale": self.second_scale.to(target).contiguous(),
        }
        return tensors, {"shape": list(self.shape), "scale_dtype": self.scale_dtype}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        first, second = (
            unpack(tensors[name], 1, rows * columns).reshape(rows, columns)
            for name in ("first", "second")
        )
        return cls(
            first,
            second,
            tensors["first_scale"].float(),
            tensors["second_scale"].float(),
            meta["scale_dtype"],
        )


def initial_step(groups: Tensor, search: bool = False) -> Tensor:
    """s of each group [..., g] -> [..., 1]: half the largest magnitude; search: of 80, each 1 % less, the least squared error."""
    largest = groups.abs().amax(-1, keepdim=True) / 2
    if not search:
        return largest
    best, lowest = largest, torch.full_like(largest, torch.inf)
    for i in range(80):
        step = largest * (1 - i / 100)
        error = (nearest(groups, 2 * step, -step) - groups).square().sum(-1, keepdim=True)
        better = error < lowest
        lowest, best = torch.where(better, error, lowest), torch.where(better, step, best)
    return best


def planes_of(groups: Tensor, first_scale: Tensor, second_scale: Tensor) -> tuple[Tensor, Tensor]:
    """b1 and b2 of groups [..., g], 0.0 or 1.0; ties go to 1. Scales [..., 1], a1 >= 0 >= a2."""
    first = (groups - (first_scale + second_scale) / 2 >= 0).float()
    second = (first_scale * first + second_scale / 2 - groups >= 0).float()
    return first, second


def nearest(groups: Tensor, first_scale: Tensor, second_scale: Tensor) -> Tensor:
    """a1 b1 + a2 b2"""
    first, second = planes_of(groups, first_scale, second_scale)
    return first_scale * first + second_scale * second


class TrainedScales(nn.Module):
    """The scales of one matrix while they are trained, as logarithms of their growth; the weights themselves stay.

    Codes follow the scales and are constants to the gradient: d w' / d a1 = b1, d w' / d a2 = b2. through_thresholds: as far as
    the levels reach, the map counts as the identity in w (straight-through), so that scales feel the codes that they move:
    a1 d w' / d a1 + a2 d w' / d a2 = w' - w there, and w' outside.
    """

    def __init__(
        self,
        weight: Tensor,
        first_scale: Tensor,
        second_scale: Tensor,
        through_thresholds: bool = False,
    ) -> None:
        """weight [out, in] float32; scales [out, groups]."""
        super().__init__()
        groups = weight.reshape(weight.shape[0], first_scale.shape[1], -1)
        self.register_buffer("groups", groups, persistent=False)
        scales = torch.stack((first_scale, second_scale)).unsqueeze(-1)  # [2, out, groups, 1]
        self.register_buffer("start", scales, persistent=False)
        self.growth = nn.Parameter(torch.zeros(2, *first_scale.shape, 1, device=weight.device))
        self.through_thresholds = through_thresholds

    def scales(self) -> Tensor:
        """a1 and a2 as they stand, [2, out, groups, 1]."""
        return self.get_buffer("start") * self.growth.exp()

    def weight(self) -> Tensor:
        """w' [out, in], differentiable in `growth`."""
        groups = self.get_buffer("groups")
        first_scale, second_scale = self.scales()
        with torch.no_grad():
            first, second = planes_of(groups, first_scale, second_scale)
        if self.through_thresholds:
            # of a group of zeros
            width = second_scale.abs().clamp(min=torch.finfo(torch.float32).tiny)
            ratio = ((first_scale * first + second_scale / 2 - groups) / width).clamp(-1, 1)
            second = second + (ratio - ratio.detach())
        return (first_scale * first + second_scale * second).reshape(groups.shape[0], -1)

    @torch.no_grad()
    def stored(self, scale_dtype: str) -> DualBinaryWeight:
        """The matrix with its scales in their storage type."""
        first_scale, second_scale = as_stored(self.scales(), scale_dtype)
        groups = self.get_buffer("groups")
        return assemble(groups, first_scale, second_scale, scale_dtype)


def assemble(
    groups: Tensor, first_scale: Tensor, second_scale: Tensor, scale_dtype: str
) -> DualBinaryWeight:
    """The nearest DualBinaryWeight of groups [out, groups, g], with scales [out, groups, 1] exact in scale_dtype."""
    rows = groups.shape[0]
    first, second = (
        plane.reshape(rows, -1).to(torch.uint8)
        for plane in planes_of(groups, first_scale, second_scale)
    )
    return DualBinaryWeight(
        first, second, first_scale.reshape(rows, -1), second_scale.reshape(rows, -1), scale_dtype
    )
