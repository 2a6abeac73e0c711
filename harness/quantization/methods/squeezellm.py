"""SqueezeLLM: a table of values per row, placed where the loss is sensitive; the few worst weights are stored in a sparse matrix.

SqueezeLLM: Dense-and-Sparse Quantization (arXiv 2306.07629).
Objective: min sum F (w - w')² per output row, with F = sum over sequences of (d loss / d W)², the diagonal of the Fisher
information: weighted k-means of each row with 2^bits clusters (§4.1). Before it, the `sensitive_fraction` of the weights with the
largest F and then the `outlier_fraction` of the largest magnitudes leave the dense matrix for a sparse one in scale_dtype (§4.2).

Where we differ from the authors' code: fractions are taken of each matrix (theirs sets the magnitude threshold per matrix from one
interquartile range for the model); greedy k-means++ and Lloyd's steps are ours, seeded by the cell; a sparse entry replaces the
dense value (theirs is added to the centroid nearest to 0, and zeros join the clustering with weight 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_tables
from harness.quantization.methods.evidence import sensitivity_of
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.codebooks import nested_tables
from harness.quantization.numerics.sparse import Outliers
from harness.quantization.numerics.weights import QuantizedWeight


class Rounding:
    """Sensitivity-weighted tables per row, dense and sparse."""

    version = 1
    needs = ("squared_gradient",)
    stochastic = True
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        sensitive_fraction  of the weights, those with the largest squared gradient, kept in the sparse matrix
        outlier_fraction    of the weights, the largest of the others, kept there too; both 0: dense only
        iterations          of k-means, at most
        """

        sensitive_fraction: float = 0.0005
        outlier_fraction: float = 0.004
        iterations: int = 50

        def __post_init__(self) -> None:
            sensitive, outlier = self.sensitive_fraction, self.outlier_fraction
            if min(sensitive, outlier) < 0 or sensitive + outlier >= 1:
                raise ValueError(
                    f"sensitive_fraction={sensitive}, outlier_fraction={outlier}; from 0, together below 1"
                )
            if self.iterations < 1:
                raise ValueError(f"iterations is {self.iterations}; it must be at least 1")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """2 to 8 bits, one table per output row that is shorter than the row."""
        return check_tables(scheme, shapes)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Memory: that of `nested_tables`."""
        sensitivity = sensitivity_of(weight, evidence)
        sparse = largest(sensitivity, self.settings.sensitive_fraction)
        sparse = sparse | largest(
            weight.abs().masked_fill(sparse, 0), self.settings.outlier_fraction
        )
        importance = sensitivity.masked_fill(sparse, 0) * (weight != 0)
        # A row without any gradient is clustered by its weights only, without those that are in the sparse matrix.
        importance = torch.where(importance.sum(1, keepdim=True) > 0, importance, (~sparse).float())
        bits = int(scheme.bits)
        outliers = (
            Outliers.where(sparse, weight, scheme.scale_dtype) if bool(sparse.any()) else None
        )
        dense, one = weight.masked_fill(sparse, 0), range(bits, bits + 1)
        return nested_tables(
            dense, importance, one, rng, iterations=self.settings.iterations
        ).served(bits, scheme.scale_dtype, outliers)


def largest(values: Tensor, fraction: float) -> Tensor:
    """Which of values [out, in] are among the round(fraction · size) largest, [out, in] bool; of equal ones the first."""
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    order = torch.argsort(values.flatten(), descending=True, stable=True)
    chosen[order[: round(fraction * values.numel())]] = True
    return chosen.reshape(values.shape)
