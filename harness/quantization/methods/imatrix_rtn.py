"""Importance-weighted round to nearest: the scale of each group minimises the error where inputs are large.

No paper of its own: llama.cpp's quantization with an importance matrix (MIT), and auto-round's optimised RTN (Apache-2.0). The
scale of each group, and its zero point where there is one, minimise sum_j u_j (w_j - w'_j)² over candidates. With h_j = E[x_j²],
the diagonal of the Hessian:

    activations    u_j = h_j · sqrt(σ² + w_j²), σ² the mean of w² over the row (llama.cpp)
    plain          u_j = h_j (auto-round)
    none           u_j = 1

Symmetric integers, on signed grids: 19 inverse scales around B / m, each refitted to its codes by least squares; codes and refitted
scale are kept, the scale rounded to its storage type afterwards, as in llama.cpp. Without refit: auto-round's 201 scales (181 at
2 bits) and nearest codes. Asymmetric integers: 21 inverse scales from (Q - 1) / (hi - lo) to (Q + 1) / (hi - lo), each refitted
with its minimum (llama.cpp's K-quants), the plain grid before them. Formats without zero points: RTN's `scale_search`, weighted:
the neighbours of powers of two and of nvfp4's scales, else the shrunk ranges.

Where we differ: inputs that were never active count 1e-8 of the mean (llama.cpp gives a group of them scale 0, auto-round fills in
by rules of its own); integer zero points are rounded before the error of a candidate is measured, and codes are chosen for the grid
as stored, which K-quants, with scales of 6 bits in blocks of 256, cannot do; so too for E4M3 scales. llama.cpp gathers h on the
unrounded model: inputs=full_precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import MethodError
from harness.core.number_formats import PLAIN_SCALES
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import check_grid, refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.grids import (
    Fitting,
    Grid,
    as_stored,
    search_reasons,
    stored_scale,
)
from harness.quantization.numerics.weighted_grids import (
    STEPS_ASYMMETRIC,
    STEPS_REFITTED,
    best_of,
    refitted_asymmetric,
    refitted_signed,
    signed_candidates,
)
from harness.quantization.numerics.weights import QuantizedWeight, on_grid

IMPORTANCE = ("activations", "plain", "none")
SMALLEST_GROUP = 8
FLOOR = 1e-8  # of the mean importance


class Rounding:
    """Round to nearest with scales that minimise the error weighted by the inputs' mean square."""

    version = 1
    needs = ("square_mean",)
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        importance  of each weight: activations, plain or none
        refit       fit the scale of each candidate to its codes by least squares; only of symmetric integers
        steps       candidates on each side of the plain scale (of asymmetric integers: after it); -1: as published
        """

        importance: str = "activations"
        refit: bool = True
        steps: int = -1

        def __post_init__(self) -> None:
            if self.importance not in IMPORTANCE:
                raise ValueError(
                    f'no importance "{self.importance}"; known: {", ".join(IMPORTANCE)}'
                )
            if self.steps < -1:
                raise ValueError(f"steps is {self.steps}; it must be at least 0, or -1")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Every format with a grid whose groups of 8 and more divide every layer; symmetric integers with signed scales."""

        def small(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.group_size != -1 and weight.group_size < SMALLEST_GROUP:
                yield (
                    f"groups of {weight.group_size} have too few weights to fit a scale to; "
                    f"use {SMALLEST_GROUP} and more, or -1"
                )

        reasons = check_grid(scheme, shapes, signed=(True,))
        return reasons or refusals(scheme, shapes, small)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: eight copies of weight."""
        assert evidence is not None, "imatrix_rtn needs the mean square of the layer's inputs"
        square_mean = evidence["square_mean"]
        if not bool(torch.isfinite(square_mean).all()):
            raise MethodError(
                "the mean squares of this layer's calibration inputs hold NaN or infinity; "
                "load the model in a wider dtype (model.dtype=float32) or use other calibration text"
            )
        return self._round(weight, square_mean, scheme)

    def round_unseen(
        self, name: str, weight: Tensor, scheme: WeightScheme, rng: Generator
    ) -> QuantizedWeight:
        """An expert that no token reached: all its inputs count alike."""
        return self._round(weight, torch.ones(weight.shape[1], device=weight.device), scheme)

    def _round(self, weight: Tensor, square_mean: Tensor, scheme: WeightScheme) -> QuantizedWeight:
        require_finite(weight)
        rows, columns = weight.shape
        size = columns if scheme.group_size == -1 else scheme.group_size
        grouped = weight.reshape(rows, -1, size)  # [out, groups, g]
        importance = importance_of(weight, square_mean, self.settings.importance)
        importance = importance.expand(rows, columns).reshape(grouped.shape)
        if scheme.format != "int":
            search = "range" if search_reasons("neighbours", scheme) else "neighbours"
            grid = Fitting.of(weight, scheme, search=search).fit(grouped, importance)
            return on_grid(grid.quantize(grouped), grid, scheme)
        if scheme.symmetric:
            return self._signed(weight, grouped, importance, scheme)
        return self._asymmetric(weight, grouped, importance, scheme)

    def _signed(
        self, weight: Tensor, grouped: Tensor, importance: Tensor, scheme: WeightScheme
    ) -> QuantizedWeight:
        bits, steps = int(scheme.bits), self.settings.steps
        plain = Fitting.of(weight, scheme).fit(grouped)  # its scale is replaced

        def stored(scale: Tensor) -> Grid:
            return dataclasses.replace(
                plain, scale=stored_scale(scale, scheme.scale_dtype, plain.tensor_scale)
            )

        if not self.settings.refit:
            candidates = signed_candidates(grouped, bits, None if steps == -1 else steps)
            grid = best_of(grouped, importance, map(stored, candidates))
            return on_grid(grid.quantize(grouped), grid, scheme)
        codes, scale = refitted_signed(
            grouped, importance, bits, STEPS_REFITTED if steps == -1 else steps
        )
        grid = stored(scale)
        if scheme.scale_dtype not in PLAIN_SCALES:  # too coarse to keep the codes of another scale
            codes = grid.quantize(grouped)
        return on_grid(codes, grid, scheme)

    def _asymmetric(
        self, weight: Tensor, grouped: Tensor, importance: Tensor, scheme: WeightScheme
    ) -> QuantizedWeight:
        steps = STEPS_ASYMMETRIC if self.settings.steps == -1 else self.settings.steps
        plain = Fitting.of(weight, scheme).fit(grouped)

        def stored(scale: Tensor, minimum: Tensor) -> Grid:
            kept = stored_scale(scale, scheme.scale_dtype, plain.tensor_scale)
            if plain.float_zero:
                dtype = scheme.scale_dtype if scheme.scale_dtype in PLAIN_SCALES else "float16"
                zero = as_stored(-minimum / kept, dtype)
            else:
                zero = torch.round(-minimum / kept).clamp_(0, plain.top)
            return dataclasses.replace(plain, scale=kept, zero=zero)

        def candidates() -> Iterator[Grid]:
            yield plain
            yield from refitted_asymmetric(grouped, importance, int(scheme.bits), stored, steps)

        grid = best_of(grouped, importance, candidates())
        return on_grid(grid.quantize(grouped), grid, scheme)


def importance_of(weight: Tensor, square_mean: Tensor, rule: str) -> Tensor:
    """u of each weight: [out, in] with rule "activations", else [in]. Its scale means nothing.

    weight: [out, in].   square_mean: [in], at least 0; where it is 0 or next to it, 1e-8 of its mean.
    """
    mean = square_mean.mean()
    if rule == "none" or not bool(mean > 0):
        return torch.ones_like(square_mean)
    active = (square_mean / mean).clamp(min=FLOOR)
    if rule == "plain":
        return active
    square = weight.square()
    variance = square.mean(-1, keepdim=True)  # 0 in rows of zeros
    return active * torch.where(variance > 0, (variance + square).sqrt(), 1.0)
