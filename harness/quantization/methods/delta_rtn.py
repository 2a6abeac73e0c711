"""A fine-tune as its base and their difference, rounded to nearest.

No paper of its own; the plain control of methods for differences. Δ = W_fine - W_base is rounded as `rtn` rounds a matrix: at equal
schemes the error is that of rounding a matrix whose entries are smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.quantization.methods.deltas import RoundedDifference, require_settings


class Rounding(RoundedDifference):
    """Round to nearest of the difference."""

    inner = "rtn"
    version = 1  # raised with the version of `rtn`, whose numbers these are
    needs = ("base_weight",)
    stochastic = False
    activation_aware = False
    no_adapter = "the difference is of full rank"

    @dataclass(frozen=True)
    class Settings:
        """grid, scale_search: of `rtn`."""

        grid: str = "gptq"
        scale_search: str = "none"

        def __post_init__(self) -> None:
            require_settings("rtn", self)
