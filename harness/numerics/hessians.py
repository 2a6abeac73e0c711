"""The second moment of a layer's input, and the triangular factors that GPTQ and its relatives need of it."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.errors import MethodError


def accumulate_hessian(hessian: Tensor, inputs: Tensor, tokens_seen: int) -> int:
    """Add one batch to the running mean of x xᵀ, in place; return the new token count.

    The Hessian of GPTQ (arXiv 2210.17323) eq. 1 without its factor 2, which cancels in the update and in relative damping.

    hessian: [in, in] float32, overwritten.   inputs: [..., in], any float dtype.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).float()              # [tokens, in]
    total = tokens_seen + x.shape[0]
    hessian.mul_(tokens_seen / total).addmm_(x.T, x, alpha=1 / total)
    return total


def damped(hessian: Tensor, damping_fraction: float) -> tuple[Tensor, Tensor]:
    """A copy of hessian [in, in] ready to factor, and its dead columns [in] bool (never active: zero diagonal).

    Dead columns get a unit diagonal; then damping_fraction * mean(diagonal) is added to the whole diagonal.
    Raises MethodError when the Hessian holds NaN or infinity: no damping helps then.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise MethodError(
            "the calibration inputs of this layer hold NaN or infinity, so its Hessian does; "
            "load the model in a wider dtype (model.dtype=float32) or use other calibration text"
        )
    h = hessian.clone()
    diagonal = h.diagonal()                                       # a view: writing to it writes to h
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping_fraction * diagonal.mean()
    return h, dead


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U [in, in] with Uᵀ U = hessian⁻¹; GPTQ's factor. Raises MethodError when not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise MethodError(
            f"the damped Hessian [{hessian.shape[0]} × {hessian.shape[0]}] is not positive definite (leading minor {int(failed)}); "
            "use more calibration tokens than the layer has inputs, or a larger damping_fraction"
        )
    return upper
