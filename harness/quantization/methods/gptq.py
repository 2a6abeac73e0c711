"""GPTQ: columns are rounded one after the other, and each error is undone in the columns still to come.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv 2210.17323).
Objective: min ||W X - W' X||² (eq. 1), layer by layer. With H = E[x xᵀ] damped by λ = damping_fraction · mean(diag H) and
Uᵀ U = (H + λ I)⁻¹ upper triangular (step 3 of §3.3), for every column j in order:

    q_j = nearest grid value of w_j        e_j = (w_j - q_j) / U_jj (eq. 2)        w_k -= e_j U_jk for k > j (eq. 3)

Updates reach the columns of the current block of `block_size` at once and all later columns in one product per block.

As in the authors' code: one grid per channel is fitted before dead columns (zero diagonal) are set to 0, grids of groups after;
a group inside a block is fitted on the weights as they were at the start of that block, so with group_size < block_size only the
first group of a block has seen all updates; damping is relative to the mean diagonal after dead entries became 1.
In formats without zero points (nf4, fp8_e4m3, mxfp4, …) q_j is the nearest element times the scale of its block; double_quantized
scales are rounded after all columns, and their errors are not fed back.
Where we differ: codes are kept, not only their values; scales are rounded to the type in which they are stored before the
columns are, so that errors of the storage type are fed back too (scale_dtype float32 gives the authors' numbers); a Hessian that
is not positive definite fails the cell; columns of equal diagonal keep their order under act_order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_columns, require_columns
from harness.quantization.methods.evidence import shared_factor
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.column_rounding import round_matrix
from harness.quantization.numerics.grids import Fitting
from harness.quantization.numerics.weights import QuantizedWeight


class Rounding:
    """Error-compensating rounding with second-order information."""

    version = 1
    needs = ("hessian",)
    stochastic = False
    activation_aware = False
    settings_added_later: ClassVar[dict[str, str]] = {"scale_search": "none"}
    reordered_groups: ClassVar[dict[str, bool]] = {"act_order": True, "static_groups": False}

    @dataclass(frozen=True)
    class Settings:
        """
        damping_fraction  of the mean diagonal, added to the diagonal of H; above 0
        block_size        columns between two updates of all the columns to come
        act_order         columns with the largest diagonal of H first
        static_groups     grids of all groups fitted before the first column is rounded; with act_order, groups then stay
                          consecutive and need no index per column
        sequential        rounds a block's linears in four steps, each seeing the rounded ones before it
        grid              gptq, awq, omniquant or compressed
        range_search      the older name of scale_search=range
        scale_search      choose among scales beside each group's own: none, range, neighbours, neighbours_mae or both, as in RTN
        """

        damping_fraction: float = 0.01
        block_size: int = 128
        act_order: bool = False
        static_groups: bool = False
        sequential: bool = False
        grid: str = "gptq"
        range_search: bool = False
        scale_search: str = "none"

        @property
        def search(self) -> str:
            """One of `grids.SEARCHES`."""
            return "range" if self.range_search else self.scale_search

        def __post_init__(self) -> None:
            require_columns(
                self.grid,
                self.scale_search,
                self.block_size,
                range_search=self.range_search,
                damping_fraction=self.damping_fraction,
            )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Every format with a grid, integers of 2 to 8 bits among them, whose groups divide every layer."""
        own = self.settings
        return check_columns(
            scheme,
            shapes,
            convention=own.grid,
            search=own.search,
            scattered=own.act_order and not own.static_groups,
        )

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: five copies of weight, or four [in, in] while H is factored."""
        own = self.settings
        return round_matrix(
            weight,
            shared_factor(weight, evidence, own.damping_fraction, own.act_order),
            scheme,
            Fitting.of(weight, scheme, own.grid, own.search),
            block_size=own.block_size,
            static_groups=own.static_groups,
        )
