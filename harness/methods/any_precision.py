"""Any-Precision LLM: one table of values per row, grown from 3 bits by splitting clusters, so that all widths are nested.

Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs (arXiv 2402.10517), §3.
Objective: min sum F (w - w')² per output row, with F = sum over sequences of (d loss / d W)², the diagonal of the Fisher
information (SqueezeLLM, arXiv 2306.07629). Weighted k-means with 2^seed_bits clusters per row; then every cluster is divided by
2-means, again and again: 2^b values for b bits, and the code at b bits is the first b bits of every finer code.

A cell serves one width, scheme.weight.bits. Cells of one seed are nested in each other whatever their widths, since they start
from the same clusters; `bits_per_weight` is that of the served width alone, codes and table.

As in the authors' code: weights that are 0 count nothing; a row without gradient counts all weights once; the border of two means
is found by bisection. Where we differ: after the last border move the two means are taken anew (there they belong to the border
before it), so the error never grows with the bits; k-means++ draws from the cell's seed; gradients are summed in the precision
of the statistic (float32), there in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.errors import MethodError
from harness.methods.protocols import Evidence, LinearShape, Scheme, Shapes, WeightScheme, check_uniform, refusals
from harness.numerics.codebooks import LookupWeight, SortedRows, cluster_rows, split_clusters
from harness.numerics.grids import as_stored
from harness.numerics.weights import QuantizedWeight

NUMBERS = 2**24                                 # weights whose prefix sums are held at a time


class Rounding:
    """Nested non-uniform rounding, weighted by squared gradients."""

    version = 1
    needs = ("squared_gradient",)
    stochastic = True
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        seed_bits   width of the first clustering, and the least that can be served
        iterations  of its k-means, at most
        """

        seed_bits: int = 3
        iterations: int = 50

        def __post_init__(self) -> None:
            if not 1 <= self.seed_bits <= 8:
                raise ValueError(f"seed_bits is {self.seed_bits}; it must be 1 to 8")
            if self.iterations < 1:
                raise ValueError(f"iterations is {self.iterations}; it must be at least 1")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """seed_bits to 8 bits, one table per output row that is shorter than the row."""
        seed_bits = self.settings.seed_bits

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.group_size != -1:
                yield f"Any-Precision has one table per output row; use group_size=-1 instead of {weight.group_size}"
            if weight.bits == int(weight.bits) and seed_bits <= weight.bits <= 8 and 2**int(weight.bits) > linear.in_features:
                yield f"a table of {2**int(weight.bits)} values is longer than the row it stands for"

        return check_uniform(scheme, shapes, bits=range(seed_bits, 9)) + refusals(scheme, shapes, reasons)

    def round_layer(
        self, name: str, weight: Tensor, evidence: Evidence | None, scheme: WeightScheme, rng: Generator
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Memory: some 2^24 · 60 bytes on the CPU, where the sorting is done."""
        assert evidence is not None, "any_precision needs squared gradients"
        if not bool(torch.isfinite(weight).all()):
            raise MethodError(f"{name}: the weight holds NaN or infinity; the model itself is damaged")
        sensitivity = evidence["squared_gradient"]
        if not bool(torch.isfinite(sensitivity).all()):
            raise MethodError(f"{name}: squared gradients hold NaN or infinity; load the model with model.dtype=float32")
        importance = sensitivity * (weight != 0)
        bits = int(scheme.bits)
        codes, tables = [], []
        at_a_time = max(1, NUMBERS // weight.shape[1])
        for values, weights in zip(weight.split(at_a_time), importance.split(at_a_time), strict=True):
            rows = SortedRows.of(values, weights)
            table, borders = cluster_rows(rows, 2**self.settings.seed_bits, rng, iterations=self.settings.iterations)
            for _ in range(self.settings.seed_bits, bits):
                table, borders = split_clusters(rows, table, borders)
            codes.append(rows.codes(borders))
            tables.append(table.float())
        table = as_stored(torch.cat(tables), scheme.scale_dtype).to(weight.device)
        return LookupWeight(torch.cat(codes).to(weight.device), table, bits, scheme.scale_dtype)
