"""One matrix pruned by each method that prunes; survivors in float32 where they are not rounded."""

from __future__ import annotations

from evidence import FakeEvidence, generator
from torch import Tensor

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.pruned_weights import SparseWeight


def magnitude(
    weight: Tensor, sparsity: str = "0.5", bits: int = 16, **settings: object
) -> SparseWeight:
    scheme = (
        WeightScheme("dense", 32, -1, scale_dtype="float32", sparsity=sparsity)
        if bits == 16
        else WeightScheme("int", bits, -1, scale_dtype="float32", sparsity=sparsity)
    )
    rounding = plugins.build("rounding", "magnitude", settings)
    found: SparseWeight = rounding.round_layer("linear", weight, None, scheme, generator())
    return found


def wanda(
    weight: Tensor, inputs: Tensor, sparsity: str = "0.5", **settings: object
) -> SparseWeight:
    scheme = WeightScheme("dense", 32, -1, scale_dtype="float32", sparsity=sparsity)
    rounding = plugins.build("rounding", "wanda", settings)
    evidence = FakeEvidence(inputs, needs=("square_mean",))
    found: SparseWeight = rounding.round_layer("linear", weight, evidence, scheme, generator())
    return found


def sparsegpt(
    weight: Tensor,
    evidence: Evidence,
    sparsity: str = "0.5",
    bits: int = 16,
    group_size: int = -1,
    **settings: object,
) -> SparseWeight:
    scheme = (
        WeightScheme("dense", 32, -1, scale_dtype="float32", sparsity=sparsity)
        if bits == 16
        else WeightScheme("int", bits, group_size, scale_dtype="float32", sparsity=sparsity)
    )
    rounding = plugins.build("rounding", "sparsegpt", settings)
    found: SparseWeight = rounding.round_layer("linear", weight, evidence, scheme, generator())
    return found
