"""Tools that methods share: the factored Hessian of a layer's evidence, and its squared gradients, checked to be finite."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.cell import Cell
from harness.core.errors import MethodError
from harness.quantization.methods.checks import require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.hessians import Factor, factored


def shared_factor(
    weight: Tensor, evidence: Evidence | None, damping_fraction: float, act_order: bool = False
) -> Factor:
    """The damped, inverted and factored Hessian, from which a column-by-column rounding of weight [out, in] starts.

    Computed once for all matrices with one input and all cells of one stream. Raises MethodError when the weight or the Hessian
    is not finite, or the Hessian not positive definite.
    """
    assert evidence is not None, "a method that needs the Hessian is given evidence"
    require_finite(weight)
    return evidence.once(
        ("factor", damping_fraction, act_order),
        lambda: factored(evidence["hessian"], damping_fraction, act_order),
    )


def stream_warnings(cell: Cell) -> list[str]:
    """What a method that compares both models' inputs warns of: inputs=full_precision makes them the same."""
    if cell.inputs != "full_precision":
        return []
    return [
        "inputs=full_precision leaves it little to correct: every block gets the unrounded model's inputs; use inputs=quantized"
    ]


def cross_moment(evidence: Evidence) -> Tensor:
    """E[x x̃ᵀ] [in, in] float32 of the inputs in the full-precision model and behind rounded blocks. Raises MethodError when it is
    not finite."""
    cross = evidence["cross"]
    if not bool(torch.isfinite(cross).all()):
        raise MethodError(
            "the products of the two models' inputs hold NaN or infinity; load the model with model.dtype=float32, "
            "or use more bits in the blocks before"
        )
    return cross


def sensitivity_of(weight: Tensor, evidence: Evidence | None) -> Tensor:
    """Squared gradients of weight [out, in], for methods that weigh its errors with them. Raises MethodError when they, or the
    weight, are not finite."""
    assert evidence is not None, "a method that needs squared gradients is given evidence"
    require_finite(weight)
    sensitivity = evidence["squared_gradient"]
    if not bool(torch.isfinite(sensitivity).all()):
        raise MethodError(
            "squared gradients hold NaN or infinity; load the model with model.dtype=float32"
        )
    return sensitivity
