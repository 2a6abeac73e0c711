"""Tools of the methods that store a fine-tune as its difference Δ = W_fine - W_base from the model that it came from.

Δ is computed in float32 from both matrices as they are loaded in the model's dtype; the published codes subtract in bfloat16, which
rounds Δ wherever the two differ by more than a factor of 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import ConfigError, MethodError
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.deltas import DeltaWeight, singular_vectors
from harness.quantization.numerics.weights import QuantizedWeight

LEAST_BITS, MOST_BITS = 0.25, 4.0  # of a budget, per weight


def base_in(evidence: Evidence | None) -> Tensor:
    """The base's matrix [out, in] float32 of one linear."""
    assert evidence is not None, "a method that needs the base is given evidence"
    return evidence["base_weight"]


def change_of(weight: Tensor, base: Tensor) -> Tensor:
    """Δ [out, in] float32. Raises MethodError where either matrix holds NaN or infinity, or their shapes differ."""
    require_finite(weight)
    if base.shape != weight.shape:
        raise MethodError(f"the matrix is {list(weight.shape)}, and the base's {list(base.shape)}")
    if not bool(torch.isfinite(base).all()):
        raise MethodError("the base's matrix holds NaN or infinity; the base model is damaged")
    return weight - base


def on_base(change: QuantizedWeight, base: Tensor) -> DeltaWeight:
    """The matrix of the fine-tune as it is stored: the change, and the base beside it."""
    return DeltaWeight(change, base)


def require_settings(inner: str, settings: Any) -> None:
    """Raise ValueError for settings (a dataclass) that the rounding `inner` does not take."""
    try:
        plugins.build("rounding", inner, dataclasses.asdict(settings))
    except ConfigError as error:
        raise ValueError(str(error)) from error


class RoundedDifference:
    """The difference as another rounding makes it; a subclass names that one, and its settings are those of that one."""

    inner: ClassVar[str]

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self._inner = plugins.build("rounding", self.inner, dataclasses.asdict(settings))

    @property
    def sequential(self) -> bool:
        """Whether matrices see the rounded ones before them: as the settings say, where they do."""
        return bool(getattr(self.settings, "sequential", False))

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """The schemes of the inner rounding."""
        return list(self._inner.check(scheme, shapes))

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """The base and the rounded difference of weight [out, in] float32."""
        base = base_in(evidence)
        change = self._inner.round_layer(name, change_of(weight, base), evidence, scheme, rng)
        return on_base(change, base)


def shared_singular_vectors(
    name: str, weight: Tensor, evidence: Evidence, rank: int, *, randomized: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, rank], S [rank], V [in, rank] of Δ (`numerics.deltas.singular_vectors`); exact ones are computed once per linear
    and stream, for all cells and ranks.

    name: of the linear, since linears with one input share their evidence.
    """
    change = change_of(weight, evidence["base_weight"])
    if randomized:
        key = ("singular vectors", name, rank)
        return evidence.once(key, lambda: singular_vectors(change, rank, randomized=True))
    left, sizes, right = evidence.once(("singular vectors", name), lambda: singular_vectors(change))
    return left[:, :rank], sizes[:rank], right[:, :rank]


def budget(bits: float, linear: LinearShape) -> float:
    """Bits for each pair of singular vectors' entries: bits · mn / (m + n), so that k pairs of b bits cost b · k of it."""
    rows, columns = linear.out_features, linear.in_features
    return bits * rows * columns / (rows + columns)


def bits_for(spent: float, linear: LinearShape) -> float:
    """The inverse of `budget`: bits per weight of a matrix whose singular vectors take `spent`."""
    rows, columns = linear.out_features, linear.in_features
    return spent * (rows + columns) / (rows * columns)


def budget_reasons(weight: WeightScheme) -> Iterator[str]:
    """Reasons why a scheme states no budget for a difference."""
    if weight.format != "delta":
        yield (
            f'the bits come from a budget for the difference; use a scheme of format "delta" (delta16, delta32g64), '
            f'not "{weight.format}"'
        )
    elif not LEAST_BITS <= weight.bits <= MOST_BITS:
        yield f"a budget of {weight.bits:g} bits per weight; {LEAST_BITS:g} to {MOST_BITS:g} are possible"
