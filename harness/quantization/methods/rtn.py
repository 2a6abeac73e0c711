"""RTN: every weight goes to the nearest point of a uniform grid, with no calibration; the baseline of every paper.

No paper of its own. W' = scale (q - zero), q = clamp(round(w / scale) + zero, 0, 2^bits - 1), one grid per output channel or
per group of input channels.

What papers call RTN differs in the grid, so the grid is a setting: GPTQ (arXiv 2210.17323) widens the range to hold zero, AWQ
(2306.00978) does not and clamps the zero point, OmniQuant (2308.13137) leaves the zero point free, compressed-tensors uses
2 max|w| / (2^bits - 1). GPTQ's own RTN rows ignore the group size; here the scheme decides.
In formats without zero points (nf4, fp8_e4m3, mxfp4, …) w' is the nearest element times the scale of its block, whatever the grid.

scale_search chooses among several scales per group, the first with the least error:
    range           GPTQ's "mse" option: the range shrunk in 80 steps of 1 %, sum of |w' - w|^2.4
    neighbours      MX formats: the power of two, the one above, the one below; nvfp4: the largest weight meets 6, or 4 (Four Over
                    Six, arXiv 2512.02010), and the matrix's scale is max|W| / (6 · 256), so that 1.5 times each E4M3 scale is one
                    too; sum of squares
    neighbours_mae  the same by the sum of |w' - w|
    both            the range times 1.5 … 0.5 in steps of 1 %, sum of squares
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import Shapes
from harness.quantization.methods.checks import check_grid, require_finite, require_search
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
    settings_added_later: ClassVar[dict[str, str]] = {"scale_search": "none"}

    @dataclass(frozen=True)
    class Settings:
        """
        grid          gptq, awq, omniquant or compressed
        range_search  the older name of scale_search=range
        scale_search  of scales beside each group's own: none, range, neighbours, neighbours_mae or both
        """

        grid: str = "gptq"
        range_search: bool = False
        scale_search: str = "none"

        @property
        def search(self) -> str:
            """One of `grids.SEARCHES`."""
            return "range" if self.range_search else self.scale_search

        def __post_init__(self) -> None:
            if self.grid not in CONVENTIONS:
                raise ValueError(f'no grid "{self.grid}"; known: {", ".join(CONVENTIONS)}')
            require_search(self.scale_search, self.range_search)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Every format with a grid, integers of 2 to 8 bits among them, whose groups divide every layer."""
        return check_grid(
            scheme, shapes, convention=self.settings.grid, search=self.settings.search
        )

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: two copies of weight, four with a search."""
        require_finite(weight)
        size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
        grouped = weight.reshape(weight.shape[0], -1, size)  # [out, groups, g]
        grid = Fitting.of(weight, scheme, self.settings.grid, self.settings.search).fit(grouped)
        return on_grid(grid.quantize(grouped), grid, scheme)
