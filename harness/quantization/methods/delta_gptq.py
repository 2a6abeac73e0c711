"""A fine-tune as its base and their difference, rounded by GPTQ.

No paper of its own (Delta-CoMe, arXiv 2406.08903, and DeltaZip, arXiv 2312.05215, round differences in this way and others).
Δ = W_fine - W_base goes through `gptq` with the second moment H of the fine-tune's inputs: since base + Δ' - W_fine = Δ' - Δ, the
objective ||(Δ - Δ')X||² is that of the layer's output. With inputs: quantized, earlier blocks run with their rounded differences.
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
    """Error-compensating rounding of the difference."""

    version = 1  # raised with the version of `gptq`, whose numbers these are
    needs = ("base_weight", "hessian")
    stochastic = False
    activation_aware = False
    no_adapter = "the difference is of full rank"

    @dataclass(frozen=True)
    class Settings:
        """All of them as in `gptq`."""

        damping_fraction: float = 0.01
        block_size: int = 128
        act_order: bool = False
        static_groups: bool = False
        sequential: bool = False
        grid: str = "gptq"
        scale_search: str = "none"

        def __post_init__(self) -> None:
            try:
                plugins.build("rounding", "gptq", dataclasses.asdict(self))
            except ConfigError as error:
                raise ValueError(str(error)) from error

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._inner = plugins.build("rounding", "gptq", dataclasses.asdict(settings))

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """The schemes of `gptq`."""
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
            self._inner.round_layer(name, change_of(weight, base), evidence, scheme, rng), base
        )

    def round_unseen(
        self, name: str, weight: Tensor, scheme: WeightScheme, rng: Generator, base: Tensor
    ) -> QuantizedWeight:
        """The difference of an expert that no token reached, rounded to nearest on the same grids."""
        nearest = plugins.build("rounding", "rtn", {"grid": self.settings.grid})
        return on_base(nearest.round_layer(name, change_of(weight, base), None, scheme, rng), base)
