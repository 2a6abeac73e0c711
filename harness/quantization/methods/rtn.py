"""RTN: every weight goes to the nearest point of a uniform grid, with no calibration; the baseline of every paper.

No paper of its own. W' = scale (q - zero), q = clamp(round(w / scale) + zero, 0, 2^bits - 1), one grid per output channel or
per group of input channels.

What papers call RTN differs in the grid, so the grid is a setting: GPTQ (arXiv 2210.17323) widens the range to hold zero, AWQ
(2306.00978) does not and clamps the zero point, OmniQuant (2308.13137) leaves the zero point free, compressed-tensors uses
2 max|w| / (2^bits - 1). GPTQ's own RTN rows ignore the group size; here the scheme decides.
In formats without zero points (nf4, fp8_e4m3, mxfp4, …) w' is the nearest element times the scale of its block, whatever the grid.
range_search is GPTQ's "mse" option: the range shrunk in 80 steps of 1 %, the smallest sum of |w' - w|^2.4 taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_grid, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.grids import CONVENTIONS, Fitting
from harness.quantization.numerics.weights import QuantizedWeight, on_grid


class Rounding:
    """Round to nearest."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """grid: gptq, awq, omniquant or compressed.   range_search: shrink each range to its least error."""

        grid: str = "gptq"
        range_search: bool = False

        def __post_init__(self) -> None:
            if self.grid not in CONVENTIONS:
                raise ValueError(f'no grid "{self.grid}"; known: {", ".join(CONVENTIONS)}')

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Every format with a grid, integers of 2 to 8 bits among them, whose groups divide every layer."""
        return check_grid(scheme, shapes, convention=self.settings.grid)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: two copies of weight, four with range_search."""
        require_finite(weight)
        size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
        grouped = weight.reshape(weight.shape[0], -1, size)  # [out, groups, g]
        grid = Fitting.of(weight, scheme, self.settings.grid, self.settings.range_search).fit(
            grouped
        )
        return on_grid(grid.quantize(grouped), grid, scheme)
