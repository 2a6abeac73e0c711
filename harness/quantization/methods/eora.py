"""EoRA: a low-rank part that removes most of a finished rounding's error at the layer's output, in closed form.

EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation (arXiv 2410.21271).
Objective: min over A, B of ||(Δ - B A) X||_F, Δ = W - Ŵ the error of another rounding (`base`), rank of B A at most r. With the
second moment M = E[x xᵀ] = Q Λ Qᵀ and S = Q Λ^½, the singular value decomposition Δ S = U Σ Vᵀ gives B = U_r Σ_r^½ and
A = Σ_r^½ V_rᵀ Λ^-½ Qᵀ; what is left of the error is the sum of σ_i² over i > r, and no matrix of rank r leaves less (Eckart–Young).

Where we differ from the two implementations that we know of: eigenvalues are found in float64, and those up to `cutoff` times the
largest are left out. GPTQModel leaves out those up to in · 2^-23 times the largest, and can end above the plain decomposition of Δ;
the authors set negative ones to the smallest positive one. M is the plain mean over tokens; both codes weigh the last sequence some
e times as much as the first. The statistics are those of the cell's own input stream, as in GPTQModel; the authors
use a full-precision model with compensated blocks. The stream goes on with Ŵ + B A.
Rounding A and B to fewer bits, and calibration data of their own, are not here. An expert that too few tokens reached gets no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from harness.quantization.methods.correction import CorrectionSettings, LowRankCorrection
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.adapters import AdaptedWeight, weighted_factors
from harness.quantization.numerics.hessians import square_root
from harness.quantization.numerics.weights import QuantizedWeight


class Rounding(LowRankCorrection):
    """A low-rank part against the output error of another rounding."""

    version = 1
    needs = ("hessian",)
    stochastic = False
    activation_aware = False
    wraps = True
    keeps_base = True
    settings: Settings

    @dataclass(frozen=True)
    class Settings(CorrectionSettings):
        """cutoff: eigenvalues of the second moment up to this share of the largest are left out."""

        cutoff: float = 1e-9

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.cutoff < 1:
                raise ValueError(f"cutoff is {self.cutoff}; it must be at least 0 and below 1")

    def corrected(
        self,
        weight: Tensor,
        evidence: Evidence | None,
        by_base: Callable[[Tensor], QuantizedWeight],
    ) -> AdaptedWeight:
        """Round, then correct. Peak memory: five [in, in] float64 while the root is found, or three [out, in] float64."""
        assert evidence is not None, "a method that needs the Hessian is given evidence"
        rounded, cutoff = by_base(weight), self.settings.cutoff
        root, inverse = evidence.once(
            ("square root", cutoff), lambda: square_root(evidence["hessian"], cutoff)
        )
        error = weight - rounded.dequantize().to(weight.device)
        down, up = weighted_factors(error, root, inverse, self.settings.rank)
        return self.adapted(rounded, self.stored(down), self.stored(up))
