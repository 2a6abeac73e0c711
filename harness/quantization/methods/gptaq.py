"""GPTAQ: GPTQ towards the full-precision layer's output on its own inputs, not on those behind rounded blocks.

GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration (arXiv 2504.02692).
Objective: min ||W X - W' X̃||², X of the full-precision model, X̃ behind the rounded blocks and groups. With H = E[x̃ x̃ᵀ], damped and
factored as in GPTQ, Uᵀ U = H⁻¹, and D = E[(x - x̃) x̃ᵀ], the correction

    P = strength · strict_upper(D Uᵀ) U

is strictly upper triangular, and column j, rounded to q_j, changes the columns behind it by

    w_k -= (w_j - q_j) U_jk / U_jj        w_k += w_j P_jk

As in the authors' code, columns behind the current block of `block_size` gain q_j P_jk instead (correction: as_published), so that
results depend on the block size; correction: column takes w_j everywhere. strength is 0.25 in their code and not in the paper.
Grids, dead columns, orders and number formats are those of GPTQ. Experts have no D: the router sends them other tokens in the two
models, so they are rounded by GPTQ.
Where we differ: statistics are means over tokens (theirs, over sequences); a correction above 10 fails the cell.
The authors state no licence: written from a description.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from harness.core.cell import Cell, Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_columns, require_columns
from harness.quantization.methods.evidence import cross_moment, shared_factor, stream_warnings
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.column_rounding import round_matrix
from harness.quantization.numerics.error_feedback import Correction
from harness.quantization.numerics.grids import Fitting
from harness.quantization.numerics.hessians import Factor
from harness.quantization.numerics.weights import QuantizedWeight

CORRECTIONS = ("as_published", "column")
LARGEST = 10.0  # entries of P beyond it mean that the two models' inputs have little to do with each other


class Rounding:
    """GPTQ that also corrects the difference between the two models' inputs."""

    version = 1
    needs = ("hessian", "cross")
    stochastic = False
    activation_aware = False
    reordered_groups: ClassVar[dict[str, bool]] = {"act_order": True, "static_groups": False}

    @dataclass(frozen=True)
    class Settings:
        """
        damping_fraction  of the mean diagonal, added to the diagonal of H; above 0
        block_size        columns between two updates of all the columns to come
        act_order         columns with the largest diagonal of H first
        static_groups     grids of all groups fitted before the first column is rounded
        sequential        rounds a block's linears in four steps, each seeing the rounded ones before it
        grid              gptq, awq, omniquant or compressed
        scale_search      choose among scales beside each group's own: none, range, neighbours, neighbours_mae or both
        strength          of the correction; 0: GPTQ
        correction        as_published, or column: later blocks too gain by the column before it was rounded
        """

        damping_fraction: float = 0.01
        block_size: int = 128
        act_order: bool = False
        static_groups: bool = False
        sequential: bool = True
        grid: str = "gptq"
        scale_search: str = "none"
        strength: float = 0.25
        correction: str = "as_published"

        def __post_init__(self) -> None:
            require_columns(
                self.grid,
                self.scale_search,
                self.block_size,
                damping_fraction=self.damping_fraction,
            )
            if not self.strength >= 0:
                raise ValueError(f"strength is {self.strength}; it must be at least 0")
            if self.correction not in CORRECTIONS:
                raise ValueError(
                    f'no correction "{self.correction}"; known: {", ".join(CORRECTIONS)}'
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
            search=own.scale_search,
            scattered=own.act_order and not own.static_groups,
        )

    def warnings(self, cell: Cell, shapes: Shapes) -> list[str]:
        """Cells in which both models have the same inputs."""
        return stream_warnings(cell)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: six copies of weight, or six [in, in] while P is made."""
        own = self.settings
        factor = shared_factor(weight, evidence, own.damping_fraction, own.act_order)
        assert evidence is not None, "refused by shared_factor"
        matrix = evidence.once(
            ("correction", own.damping_fraction, own.act_order, own.strength),
            lambda: correction_matrix(
                cross_moment(evidence), evidence["hessian"], factor, own.strength
            ),
        )
        # without entries the loop is GPTQ's own
        correction = Correction(matrix, own.correction == "as_published") if matrix.any() else None
        return round_matrix(
            weight,
            factor,
            scheme,
            Fitting.of(weight, scheme, own.grid, own.scale_search),
            block_size=own.block_size,
            static_groups=own.static_groups,
            correction=correction,
        )


def correction_matrix(cross: Tensor, hessian: Tensor, factor: Factor, strength: float) -> Tensor:
    """P = strength · strict_upper(D Uᵀ) U, [in, in] float32, in the order of the factor; D = cross - hessian without dead columns.

    Raises MethodError where an entry is above 10.
    """
    difference = (cross - hessian).masked_fill(factor.dead, 0)
    if factor.order is not None:
        difference = difference[factor.order][:, factor.order]
    matrix = strength * ((difference @ factor.upper.T).triu(1) @ factor.upper)
    largest = float(matrix.abs().max())
    if not largest <= LARGEST:
        raise MethodError(
            f"the two input streams have little to do with each other (largest correction {largest:.3g}); "
            "use gptq, or more bits in the blocks before"
        )
    return matrix
