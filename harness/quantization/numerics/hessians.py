"""The second moment of a layer's input, and the triangular factors that GPTQ and its relatives need of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from harness.core.errors import MethodError

EXACT_INPUTS = 4096  # inputs up to which a root stays in float64


def accumulate_hessian(hessian: Tensor, inputs: Tensor, tokens_seen: int) -> int:
    """Add one batch to the running mean of x xᵀ, in place; return the new token count.

    The Hessian of GPTQ (arXiv 2210.17323) eq. 1 without its factor 2, which cancels in the update and in relative damping.

    hessian: [in, in] float32, overwritten.   inputs: [..., in], any float dtype.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
    return accumulate_cross(hessian, x, x, tokens_seen)


def accumulate_cross(cross: Tensor, x: Tensor, other: Tensor, tokens_seen: int) -> int:
    """Add one batch to the running mean of x otherᵀ, in place; return the new token count.

    cross: [in, in] float32, overwritten.   x, other: [tokens, in] float32, of the same tokens.
    """
    total = tokens_seen + x.shape[0]
    cross.mul_(tokens_seen / total).addmm_(x.T, other, alpha=1 / total)
    return total


def damped(
    hessian: Tensor, damping_fraction: float, *, dead_last: bool = False
) -> tuple[Tensor, Tensor]:
    """A copy of hessian [in, in] ready to factor, and its dead columns [in] bool (never active: zero diagonal).

    Dead columns get a unit diagonal; then damping_fraction * mean(diagonal) is added to the whole diagonal. dead_last: the
    damping first, of the mean with the zeros, then the unit diagonal (SpQR).
    Raises MethodError when the Hessian holds NaN or infinity: no damping helps then.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise MethodError(
            "the calibration inputs of this layer hold NaN or infinity, so its Hessian does; "
            "load the model in a wider dtype (model.dtype=float32) or use other calibration text"
        )
    h = hessian.clone()
    diagonal = h.diagonal()  # a view: writing to it writes to h
    dead = diagonal == 0
    if not dead_last:
        diagonal[dead] = 1
    diagonal += damping_fraction * diagonal.mean()
    if dead_last:
        diagonal[dead] = 1
    return h, dead


def inverse_factor(hessian: Tensor, setting: str = "damping_fraction") -> Tensor:
    """The upper triangular U [in, in] with Uᵀ U = hessian⁻¹; GPTQ's factor.

    Raises MethodError when hessian is not positive definite; setting: what of the method to raise then.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise MethodError(
            f"the damped Hessian [{hessian.shape[0]} × {hessian.shape[0]}] is not positive definite (leading minor {int(failed)}); "
            f"use more calibration tokens than the layer has inputs, or a larger {setting}"
        )
    return upper


@dataclass(frozen=True)
class Factor:
    """The factor of a Hessian that a column-by-column rounding needs.

    upper   [in, in] float32: Uᵀ U = (H + λI)⁻¹, in the order of `order`
    dead    [in] bool: columns whose input was never active, in their original order
    order   [in] int64: the column that comes k-th; None: the original order
    """

    upper: Tensor
    dead: Tensor
    order: Tensor | None

    @classmethod
    def uncalibrated(cls, weight: Tensor) -> Self:
        """The factor without calibration: all columns of weight [out, in] count alike, none is dead, no error is passed on."""
        columns = weight.shape[1]
        return cls(
            torch.eye(columns, device=weight.device),
            torch.zeros(columns, dtype=torch.bool, device=weight.device),
            None,
        )


def factored(hessian: Tensor, damping_fraction: float, act_order: bool = False) -> Factor:
    """The damped, inverted, factored Hessian; act_order puts the largest diagonal entries first.

    It depends on nothing else, so q, k, v and all bit widths on one input stream share it:
    evidence.once(("factor", damping_fraction, act_order), lambda: factored(evidence["hessian"], damping_fraction, act_order)).
    Raises MethodError when the Hessian is not finite or not positive definite. Peak memory: four [in, in] float32.
    """
    dead, order = hessian.diagonal() == 0, None
    if act_order:
        # dead columns take the place of a unit diagonal
        diagonal = torch.where(dead, 1.0, hessian.diagonal())
        order = torch.argsort(diagonal, descending=True, stable=True)
        hessian = hessian[order][:, order]
    return Factor(inverse_factor(damped(hessian, damping_fraction)[0]), dead, order)


def square_root(hessian: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """S [in, n] with S Sᵀ = hessian [in, in], and its pseudo-inverse S⁺ [n, in]; float64, float32 above 4,096 inputs.

    S = Q Λ^½ of the eigenvalues above cutoff · the largest; n is their number. Eigenvalues are found in float64, because those of
    float32 are noise below some 1e-7 of the largest: they would count directions that hardly occur as absent, or the reverse.
    Raises MethodError when the Hessian holds NaN or infinity.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise MethodError(
            "the calibration inputs of this layer hold NaN or infinity, so their second moment does; "
            "load the model in a wider dtype (model.dtype=float32) or use other calibration text"
        )
    values, vectors = torch.linalg.eigh(hessian.double())
    kept = (values > cutoff * values[-1]) & (values > 0)
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    dtype = torch.float64 if hessian.shape[0] <= EXACT_INPUTS else torch.float32
    return (vectors * roots).to(dtype), (vectors / roots).T.to(dtype)
