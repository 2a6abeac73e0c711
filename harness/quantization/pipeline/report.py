"""Relative errors of layers, and notes as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def relative_error(difference: Tensor, weight: Tensor, hessian: Tensor | None = None) -> float:
    """||D||² / ||W||², or tr(D H Dᵀ) / tr(W H Wᵀ); in float64 where a sum overflows float32. 0 where nothing comes out at all."""

    def size(matrix: Tensor, metric: Tensor | None) -> Tensor:
        return matrix.square().sum() if metric is None else ((matrix @ metric) * matrix).sum()

    error, reference = size(difference, hessian), size(weight, hessian)
    if not bool(torch.isfinite(error) & torch.isfinite(reference)):
        metric = hessian.double() if hessian is not None else None
        error, reference = size(difference.double(), metric), size(weight.double(), metric)
    value = float(error / reference) if float(reference) > 0 else 0.0
    return max(value, 0.0)  # round-off of an exact layer


def json_values(notes: Any) -> Any:
    """A method's notes as JSON values: tensors become lists or numbers."""
    if isinstance(notes, Tensor):
        return notes.tolist()
    if isinstance(notes, Mapping):
        return {str(key): json_values(value) for key, value in notes.items()}
    if isinstance(notes, list | tuple):
        return [json_values(item) for item in notes]
    return notes
