"""Qronos: the first column takes its best value, all others are solved again for the full-precision output, then GPTQ goes on.

Qronos: Correcting the Past by Shaping the Future ... in Post-Training Quantization (arXiv 2505.11695).
Objective: min ||W X - W' X̃||², X of the full-precision model, X̃ behind the rounded blocks and groups. With H = E[x̃ x̃ᵀ],
G = E[x x̃ᵀ] and λ = damping · (largest eigenvalue of H):

    v_0    = (W G_{:,0} - sum over k > 0 of w_k H_0k) / H_00, rounded to q_0
    W_rest = (W (G + λI)_{:,1:} - q_0 H_{0,1:}) A,   A = (H_{1:,1:} + λI)⁻¹ = U_{1:,1:}ᵀ U_{1:,1:},   Uᵀ U = (H + λI)⁻¹

and the columns of W_rest are rounded by GPTQ's loop with U: to solve again after every column would give the same updates. The
first column is no other: with v_0 in place of q_0 above, (v_0 - q_0) H_{0,1:} A is what GPTQ's loop feeds forward from it. So all
columns are solved once, and the loop runs over all of them.

Grids: one per channel of W. Groups: `fit` says on what. (In the authors' code grids follow the weights as they change.)
Where we differ: factors are made in float64; the largest eigenvalue comes from 30 power iterations that start at the vector of ones
(theirs at random); dead columns end at the grid's zero (theirs at their weight, whose inputs are 0 either way); a matrix that
cannot be factored fails the cell, where theirs stays unrounded. Experts have no G of their own: the router sends them other tokens
in the two models, so G is H there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor

from harness.core.cell import Cell, Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_columns, require_columns, require_finite
from harness.quantization.methods.evidence import cross_moment, stream_warnings
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.column_rounding import round_matrix
from harness.quantization.numerics.grids import Fitting
from harness.quantization.numerics.hessians import Factor, inverse_factor
from harness.quantization.numerics.weights import QuantizedWeight

FITS = ("shifted", "original")
POWER_ITERATIONS = 30


class Rounding:
    """Least squares towards the full-precision output, then GPTQ."""

    version = 1
    needs = ("hessian", "cross")
    stochastic = False
    activation_aware = False

    @dataclass(frozen=True)
    class Settings:
        """
        damping       times the largest eigenvalue of H, added to its diagonal; above 0, small
        block_size    columns between two updates of all the columns to come; changes no number but for the order of float sums
        act_order     columns with the largest diagonal of H first
        sequential    rounds a block's linears in four steps, each seeing the rounded ones before it
        grid          gptq, awq, omniquant or compressed
        scale_search  choose among scales beside each group's own: none, range, neighbours, neighbours_mae or both
        fit           of the grids of groups: shifted, on the weights after they were solved again, or original
        """

        damping: float = 1e-6
        block_size: int = 128
        act_order: bool = True
        sequential: bool = True
        grid: str = "gptq"
        scale_search: str = "none"
        fit: str = "shifted"

        def __post_init__(self) -> None:
            require_columns(self.grid, self.scale_search, self.block_size, damping=self.damping)
            if self.fit not in FITS:
                raise ValueError(f'no fit "{self.fit}"; known: {", ".join(FITS)}')

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Every format with a grid, integers of 2 to 8 bits among them, whose groups divide every layer."""
        own = self.settings
        return check_columns(
            scheme, shapes, convention=own.grid, search=own.scale_search, scattered=False
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
        """Quantize weight [out, in] float32. Peak memory: eight copies of weight, or ten [in, in], while they are solved again."""
        assert evidence is not None, "qronos needs the inputs of both models"
        require_finite(weight)
        own = self.settings
        system = evidence.once(
            ("qronos", own.damping, own.act_order),
            lambda: System.of(
                evidence["hessian"], cross_moment(evidence), own.damping, own.act_order
            ),
        )
        shifted = system.solve(weight)
        fitted_on = shifted if own.fit == "shifted" and scheme.group_size != -1 else weight
        return round_matrix(
            shifted,
            system.factor,
            scheme,
            Fitting.of(fitted_on, scheme, own.grid, own.scale_search),
            block_size=own.block_size,
            static_groups=True,
            fitted_on=fitted_on,
        )


@dataclass(frozen=True)
class System:
    """The least-squares problem that matrices with one input share; [in, in] and [in] float64, columns in the order of rounding.

    order   [in] int64: the column that comes k-th
    first   H_0, the row of the first column
    cross   G_{:,0}
    target  (G + λI)_{:,1:}, [in, in - 1]
    upper   U_{1:,1:}, [in - 1, in - 1]
    factor  U in float32, for the loop over columns
    """

    order: Tensor
    first: Tensor
    cross: Tensor
    target: Tensor
    upper: Tensor
    factor: Factor

    @classmethod
    def of(cls, hessian: Tensor, cross: Tensor, damping: float, act_order: bool) -> Self:
        """From H and G, [in, in] float32. Raises MethodError when H is not finite, or cannot be factored."""
        if not bool(torch.isfinite(hessian).all()):
            raise MethodError(
                "the calibration inputs of this layer hold NaN or infinity, so its Hessian does; "
                "load the model in a wider dtype (model.dtype=float32) or use other calibration text"
            )
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        order = (
            torch.argsort(diagonal, descending=True, stable=True)
            if act_order
            else torch.arange(hessian.shape[0], device=hessian.device)
        )
        h, g = (matrix[order][:, order].double() for matrix in (hessian, cross))
        largest = _largest_eigenvalue(h)
        added = damping * largest if largest > 0 else 1.0  # of inputs that are all 0
        eye = added * torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
        upper = inverse_factor(h + eye, "damping")
        factor = Factor(upper.float(), dead, order if act_order else None)
        return cls(order, h[0].clone(), g[:, 0].clone(), (g + eye)[:, 1:], upper[1:, 1:], factor)

    def solve(self, weight: Tensor) -> Tensor:
        """[v_0 | W_rest] of a matrix [out, in] float32, with v_0 in place of q_0; its columns in their own order.

        Raises MethodError when a value is not finite.
        """
        original = weight[:, self.order].double()
        first = original @ self.cross - original[:, 1:] @ self.first[1:]
        first = torch.where(self.first[0] > 0, first / self.first[0], 0.0)
        rest = original @ self.target - first[:, None] * self.first[1:]
        rest = (rest @ self.upper.T) @ self.upper
        solved = torch.cat((first[:, None], rest), dim=1).float()
        if not bool(torch.isfinite(solved).all()):
            raise MethodError("the least squares of this layer give NaN or infinity; raise damping")
        placed = torch.empty_like(weight)
        placed[:, self.order] = solved
        return placed


def _largest_eigenvalue(matrix: Tensor) -> float:
    """Of a positive semidefinite matrix, by power iteration from the vector of ones: never above the true one."""
    vector = torch.ones(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    for _ in range(POWER_ITERATIONS):
        image = matrix @ vector
        length = image.norm()
        if float(length) == 0:
            return 0.0
        vector = image / length
    return float(vector @ (matrix @ vector))
