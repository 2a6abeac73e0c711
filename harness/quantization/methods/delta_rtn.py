"""A fine-tune as its base and their difference, rounded to nearest.

No paper of its own; the plain control of methods for differences. Δ = W_fine - W_base is rounded as `rtn` rounds a matrix: at equal
schemes the error is that of rounding a matrix whose entries are smaller.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Generator, Tensor

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import ConfigError
from harness.core.shapes import Shapes
from harness.quantization.methods.deltas import base_in, change_of, on_base
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.weights import QuantizedWeight


class Rounding:
    """Round to nearest of the difference."""

    version = 1  # raised with the version of `rtn`, whose numbers these are
    needs = ("base_weight",)
    stochastic = False
    activation_aware = False
    sequential = False
    no_adapter = "the difference is of full rank"

    @dataclass(frozen=True)
    class Settings:
        """grid, scale_search: of `rtn`."""

        grid: str = "gptq"
        scale_search: str = "none"

        def __post_init__(self) -> None:
            try:
                plugins.build("rounding", "rtn", dataclasses.asdict(self))
            except ConfigError as error:
                raise ValueError(str(error)) from error

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._inner = plugins.build("rounding", "rtn", dataclasses.asdict(settings))

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """The schemes of `rtn`."""
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
        return on_base(
            self._inner.round_layer(name, change_of(weight, base), None, scheme, rng), base
        )
