"""The contract of a checkpoint layout that other libraries load.

`harness/quantization/formats/<name>.py` defines `class Layout`.

Native checkpoints are read block by block; a layout says which of their matrices it can express, and how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme, WeightScheme
from harness.quantization.numerics.adapters import AdaptedWeight
from harness.quantization.numerics.deltas import LowRankWeight
from harness.quantization.numerics.weights import QuantizedWeight, UniformWeight

Description = dict[str, Any]  # a linear as the layout describes it: JSON values


class Layout(Protocol):
    """In all methods dtype is the model's: the dtype of unquantized tensors, and of the weights once they are read back.

    A layout whose groups are always neighbouring channels states `stores_group_order = False` in its class body.
    """

    def scheme_reasons(
        self, weight: WeightScheme, activation: ActivationScheme | None
    ) -> list[str]:
        """Why a linear of this scheme cannot be expressed, as far as the scheme tells; empty when it can."""
        ...

    def weight_reasons(self, weight: QuantizedWeight, dtype: torch.dtype) -> list[str]:
        """Why this matrix cannot be expressed exactly; empty when it can."""
        ...

    def describe(
        self, weight: QuantizedWeight, activation: ActivationScheme | None
    ) -> Description | None:
        """The linear's description in `quantization_config`; None: it is stored as an ordinary weight."""
        ...

    def model_reasons(self, described: Mapping[str, Description | None]) -> list[str]:
        """Why these linears, by module name, cannot be in one checkpoint."""
        ...

    def pack_linear(
        self, weight: QuantizedWeight, activation: ActivationScheme | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The linear's tensors without its bias, by their names within its module."""
        ...

    def quantization_config(
        self, described: Mapping[str, Description | None], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """The entry of config.json. others: names of linear modules outside the blocks, which stay as they are."""
        ...

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """Further JSON files of the folder, by name."""
        ...


@runtime_checkable
class AdapterLayout(Protocol):
    """A layout of adapters only: `class Layout` with these methods instead."""

    def scheme_reasons(
        self, weight: WeightScheme, activation: ActivationScheme | None
    ) -> list[str]: ...

    def write_adapters(
        self, folder: Path, adapters: Mapping[str, AdaptedWeight], base: str, dropout: float
    ) -> None:
        """Write the folder. adapters: by module name in the model; base: source of the unquantized model."""
        ...

    def write_differences(
        self,
        folder: Path,
        changes: Mapping[str, LowRankWeight],
        base: str,
        saved: Mapping[str, Tensor],
    ) -> None:
        """Write a fine-tune as adapters of its base. changes: by module name; saved: other parameters that differ, by name."""
        ...


def grid_reasons(weight: UniformWeight, least_zero: int = 0) -> list[str]:
    """Why a layout with float16 scales and integer zero points cannot hold a grid of integers exactly.

    least_zero: the smallest zero point that the layout stores; 1 where it stores the zero point minus 1.
    """
    reasons = []
    zero = weight.zero
    if zero is not None:
        if not bool(((zero == zero.round()) & (zero >= 0) & (zero < 2**weight.bits)).all()):
            reasons.append("zero points that are not among the codes, or no integers")
        elif not bool((zero >= least_zero).all()):
            reasons.append(
                "zero points of 0, which the layout (it stores zero - 1) cannot hold; use -f gptq_v2, or a symmetric scheme"
            )
    if not torch.equal(weight.scale.to(torch.float16).float(), weight.scale):
        reasons.append(
            f"{weight.scale_dtype} scales are not exact in float16; use scheme.weight.scale_dtype=float16"
        )
    return reasons
