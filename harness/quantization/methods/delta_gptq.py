"""A fine-tune as its base and their difference, rounded by GPTQ.

No paper of its own (Delta-CoMe, arXiv 2406.08903, and DeltaZip, arXiv 2312.05215, round differences in this way and others).
Δ = W_fine - W_base goes through `gptq` with the second moment H of the fine-tune's inputs: since base + Δ' - W_fine = Δ' - Δ, the
objective ||(Δ - Δ')X||² is that of the layer's output. With inputs: quantized, earlier blocks run with their rounded differences.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.quantization.methods.deltas import (
    RoundedDifference,
    change_of,
    on_base,
    require_settings,
)
from harness.quantization.numerics.weights import QuantizedWeight


class Rounding(RoundedDifference):
    """Error-compensating rounding of the difference."""

    inner = "gptq"
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
            require_settings("gptq", self)

    def round_unseen(
        self, name: str, weight: Tensor, scheme: WeightScheme, rng: Generator, base: Tensor
    ) -> QuantizedWeight:
        """The difference of an expert that no token reached, rounded to nearest on the same grids."""
        nearest = plugins.build("rounding", "rtn", {"grid": self.settings.grid})
        return on_base(nearest.round_layer(name, change_of(weight, base), None, scheme, rng), base)
