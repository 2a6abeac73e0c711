"""Any-Precision LLM: one table of values per row, grown from 3 bits by splitting clusters, so that all widths are nested.

Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs (arXiv 2402.10517), §3.
Objective: min sum F (w - w')² per output row, with F = sum over sequences of (d loss / d W)², the diagonal of the Fisher
information (SqueezeLLM, arXiv 2306.07629). Weighted k-means with 2^seed_bits clusters per row; then every cluster is divided by
2-means, again and again: 2^b values for b bits, and the code at b bits is the first b bits of every finer code.

A cell serves one width, scheme.weight.bits. Cells of one seed are nested in each other whatever their widths, since they start
from the same clusters, and are made together: all widths of a matrix are computed once for the cells of one pass. With parent_bits
0 each cell stores its own width, and `bits_per_weight` is that of codes and table. With parent_bits 8, as published, the
checkpoint holds 8-bit codes and the tables of all widths, it is made and stored once, and cells of all widths read theirs from it,
to the bit as if it were stored alone.

As in the authors' code: weights that are 0 count nothing; a row without gradient counts all weights once; the border of two means
is found by bisection. Where we differ: after the last border move the two means are taken anew (there they belong to the border
before it), so the error never grows with the bits; k-means++ draws from the cell's seed; gradients are summed in the precision
of the statistic (float32), there in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_tables
from harness.quantization.methods.evidence import sensitivity_of
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.codebooks import nested_tables
from harness.quantization.numerics.weights import QuantizedWeight

MOST_BITS = 8  # width of the nested model; every cell is a prefix of it


class Rounding:
    """Nested non-uniform rounding, weighted by squared gradients."""

    version = 1
    needs = ("squared_gradient",)
    stochastic = True
    activation_aware = False
    sequential = False
    settings_added_later: ClassVar[dict[str, int]] = {"parent_bits": 0}
    holds_all_widths = "parent_bits"  # unless it is 0

    @dataclass(frozen=True)
    class Settings:
        """
        seed_bits    width of the first clustering, and the least that can be served
        iterations   of its k-means, at most
        parent_bits  the largest width of a checkpoint that all widths are read from; shorter rows than its table has entries get
                     the largest width that they can have. 0: each width has a checkpoint of its own
        """

        seed_bits: int = 3
        iterations: int = 50
        parent_bits: int = 0

        def __post_init__(self) -> None:
            if not 1 <= self.seed_bits <= 8:
                raise ValueError(f"seed_bits is {self.seed_bits}; it must be 1 to 8")
            if self.iterations < 1:
                raise ValueError(f"iterations is {self.iterations}; it must be at least 1")
            if self.parent_bits and not self.seed_bits <= self.parent_bits <= MOST_BITS:
                raise ValueError(
                    f"parent_bits is {self.parent_bits}; it must be 0, or {self.seed_bits} (seed_bits) to {MOST_BITS}"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """seed_bits to 8 bits (parent_bits where that is set), one table per output row that is shorter than the row."""
        most = self.settings.parent_bits or MOST_BITS
        return check_tables(scheme, shapes, bits=range(self.settings.seed_bits, most + 1))

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Memory: that of `nested_tables`, and one byte per weight of the block, which stays
        for the cells of other widths."""
        assert evidence is not None, "any_precision needs squared gradients"
        settings, bits = self.settings, int(scheme.bits)
        importance = sensitivity_of(weight, evidence) * (weight != 0)
        widths = range(settings.seed_bits, MOST_BITS + 1)
        nested = evidence.once(
            ("any_precision", settings.seed_bits, settings.iterations, rng.initial_seed()),
            lambda: nested_tables(weight, importance, widths, rng, iterations=settings.iterations),
        )
        if not settings.parent_bits:
            return nested.served(bits, scheme.scale_dtype)
        longest_table = weight.shape[1].bit_length() - 1  # in bits
        return nested.stored(min(settings.parent_bits, longest_table), scheme.scale_dtype)
