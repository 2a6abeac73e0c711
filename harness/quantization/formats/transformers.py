"""An ordinary model folder: every matrix as plain numbers in the model's dtype, as the cell is evaluated.

For cells that only prune (zeros stay in place), for models that a reduction made smaller, and for fine-tunes that are stored as
differences (base + difference, the model that their authors evaluate). Other rounded weights are refused: as plain numbers they
take the room of the model itself, and the folder would not say that they are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme, WeightScheme
from harness.quantization.formats.protocols import Description
from harness.quantization.numerics.deltas import DeltaWeight
from harness.quantization.numerics.pruned_weights import is_unrounded
from harness.quantization.numerics.weights import QuantizedWeight


class Layout:
    """Every matrix as a plain weight."""

    stores_group_order = True

    def scheme_reasons(
        self, weight: WeightScheme, activation: ActivationScheme | None
    ) -> list[str]:
        reasons = []
        if weight.format != "dense":
            reasons.append(
                "rounded weights would be stored as plain numbers, at the size of the model; use compressed_tensors, gptq or awq"
            )
        if activation is not None:
            reasons.append(
                "a plain folder holds weights only, and the scheme rounds activations too"
            )
        return reasons

    def weight_reasons(self, weight: QuantizedWeight, dtype: torch.dtype) -> list[str]:
        if isinstance(weight, DeltaWeight) or is_unrounded(weight):
            return []
        return [f'the layout "{weight.kind}" is rounded']

    def describe(
        self, weight: QuantizedWeight, activation: ActivationScheme | None
    ) -> Description | None:
        return None

    def model_reasons(self, described: Mapping[str, Description | None]) -> list[str]:
        return []

    def pack_linear(
        self, weight: QuantizedWeight, activation: ActivationScheme | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return {"weight": weight.dequantize().to(dtype)}

    def quantization_config(
        self, described: Mapping[str, Description | None], others: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """Nothing: the folder is one of an ordinary model."""
        return {}

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        return {}
