"""SVDQuant for weights: the largest singular directions stay in 16 bits, and the rest of the matrix is rounded.

SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models (arXiv 2411.05007), without its diffusion models.
W = B A + R with the singular value decomposition W = U Σ Vᵀ: B = U_r Σ_r and A = V_rᵀ, and R is rounded by another rounding
(`base`). More iterations repeat both: B A ← the rank-r part of W - Q(R), R ← W - B A. They stop when the objective rises, and the
best one is kept; compensate starts from W - Q(W), which is LoftQ's order. objective weight is ||W - B A - Q(R)||²; output is
tr(E H Eᵀ) with E = W - B A - Q(R) and H = E[x xᵀ], the error of the layer's output.

R is what W leaves of A and B as they are stored, so that rounding A and B to 16 bits costs nothing more.
Where we differ from the authors' code: every matrix has factors of its own (theirs: one A for q, k, v, and one for gate, up); the
smoothing before it is a transform of the method, not part of the rounding. Under an activation scheme the low-rank part reads
unrounded inputs, as in theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.core.cell import Scheme
from harness.core.errors import MethodError
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import require_finite
from harness.quantization.methods.correction import CorrectionSettings, LowRankCorrection
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.adapters import AdaptedWeight, singular_factors
from harness.quantization.numerics.weights import QuantizedWeight


class Rounding(LowRankCorrection):
    """Large singular directions in 16 bits, the rest rounded."""

    version = 1
    needs = ("hessian",)
    unneeded: ClassVar[dict[str, dict[str, str]]] = {"hessian": {"objective": "weight"}}
    stochastic = False
    activation_aware = False
    wraps = True
    settings: Settings

    @dataclass(frozen=True)
    class Settings(CorrectionSettings):
        """
        iterations  decompositions, each of what the rounding before it leaves; the best is kept
        objective   by which the best is chosen: output error, or weight error (data-free)
        compensate  start from what rounding W itself leaves
        """

        base: str = "rtn"
        iterations: int = 1
        objective: Literal["output", "weight"] = "output"
        compensate: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.iterations < 1:
                raise ValueError(f"iterations is {self.iterations}; it must be at least 1")
            if self.objective not in ("output", "weight"):
                raise ValueError(f'no objective "{self.objective}"; known: output, weight')

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Also ranks above the smaller side of a matrix."""
        rank = self.settings.rank
        short = [
            f"{linear.name} [{linear.out_features} × {linear.in_features}]"
            for linear in shapes.linears
            if self._has_part(linear.name) and rank > min(linear.out_features, linear.in_features)
        ]
        reasons = super().check(scheme, shapes)
        if short:
            reasons.append(
                f"rank {rank} is more than the smaller side of {', '.join(short)}; use a lower rank, or linears without these"
            )
        return reasons

    def corrected(
        self,
        weight: Tensor,
        evidence: Evidence | None,
        by_base: Callable[[Tensor], QuantizedWeight],
    ) -> AdaptedWeight:
        """Decompose and round. Peak memory: four [out, in] float64."""
        require_finite(weight)
        hessian = self._hessian(evidence)
        rest = weight - by_base(weight).dequantize() if self.settings.compensate else weight
        best: AdaptedWeight | None = None
        lowest = float("inf")
        for _ in range(self.settings.iterations):
            left, values, right = singular_factors(rest.double(), self.settings.rank)
            down, up = self.stored(right), self.stored(left * values)
            rounded = by_base(weight - up @ down)
            rest = weight - rounded.dequantize()
            error = rest - up @ down
            loss = float(
                error.square().sum() if hessian is None else ((error @ hessian) * error).sum()
            )
            if best is not None and not loss < lowest:
                break
            best, lowest = self.adapted(rounded, down, up), loss
        assert best is not None, "iterations is at least 1"
        return best

    def _hessian(self, evidence: Evidence | None) -> Tensor | None:
        """H [in, in] of the objective; None where that is the weight error."""
        if self.settings.objective == "weight":
            return None
        assert evidence is not None, "a method that needs the Hessian is given evidence"
        hessian = evidence["hessian"]
        if not bool(torch.isfinite(hessian).all()):
            raise MethodError(
                "the calibration inputs of this layer hold NaN or infinity, so their second moment does; use objective=weight, "
                "or load the model in a wider dtype (model.dtype=float32)"
            )
        return hessian
