"""Uniform grids: from the range of a row or group to scale and zero point, and between values and codes.

Papers draw the same bit width from different grids, and results at 2 and 3 bits depend on it, so the convention is a
parameter. lo, hi are the smallest and largest value of the row or group, Q = 2^bits - 1, and a code q stands for
scale * (q - zero).

    convention   symmetric  scale                              zero                     remark
    gptq         no         (hi - lo) / Q                      round(-lo / scale)       range widened to hold 0
    gptq         yes        (hi - lo) / Q                      2^(bits-1)               lo = -hi only if lo < 0; clips the top
    awq          no         max(hi - lo, 1e-5) / Q             clamp(-round(lo/scale))  groups of one sign are clipped
    awq          yes        max(|w|, 1e-5) / (2^(bits-1) - 1)  2^(bits-1)               also SmoothQuant's rule
    omniquant    no         clamp((hi - lo) / Q, 1e-5, 1e4)    round(-lo / scale)       zero not clamped to the codes
    omniquant    yes        |w| / (2^(bits-1) - 1)             2^(bits-1)               code 0 unused
    compressed   yes        2 |w| / Q                          2^(bits-1)               compressed-tensors' rule
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CONVENTIONS = ("gptq", "awq", "omniquant", "compressed")
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Grid:
    """scale and zero [..., 1] float32, one per row or group of the last axis; codes run from 0 to 2^bits - 1.

    scale is exact in the dtype it will be stored in; zero is integer-valued.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    @property
    def top(self) -> int:
        """The largest code, 2^bits - 1."""
        return 2**self.bits - 1

    def quantize(self, values: Tensor) -> Tensor:
        """Nearest codes of values [..., g], float32 holding integers 0 .. top; halves round to even."""
        return (torch.round(values / self.scale) + self.zero).clamp_(0, self.top)

    def dequantize(self, codes: Tensor) -> Tensor:
        """scale * (codes - zero)."""
        return self.scale * (codes - self.zero)

    def nearest(self, values: Tensor) -> Tensor:
        """The grid value nearest to each value."""
        return self.dequantize(self.quantize(values))


def fit(values: Tensor, bits: int, symmetric: bool, convention: str = "gptq", scale_dtype: str = "float32") -> Grid:
    """The grid of each row of values [..., g], over its last axis. Raises ValueError for an unknown convention."""
    return from_range(values.amin(-1, keepdim=True), values.amax(-1, keepdim=True), bits, symmetric, convention, scale_dtype)


def from_range(lo: Tensor, hi: Tensor, bits: int, symmetric: bool, convention: str = "gptq", scale_dtype: str = "float32") -> Grid:
    """The grid over the range [lo, hi], both [..., 1] float32."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    magnitude = torch.maximum(lo.abs(), hi.abs())
    if convention == "gptq":
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        if symmetric:
            hi = torch.maximum(lo.abs(), hi)
            lo = torch.where(lo < 0, -hi, lo)
        empty = (lo == 0) & (hi == 0)
        lo, hi = torch.where(empty, -1.0, lo), torch.where(empty, 1.0, hi)
        scale = _storable((hi - lo) / top, scale_dtype)
        zero = torch.full_like(scale, middle) if symmetric else torch.round(-lo / scale).clamp_(0, top)
    elif convention == "awq":
        if symmetric:
            scale = _storable(magnitude.clamp(min=1e-5) / (middle - 1), scale_dtype)
            zero = torch.full_like(scale, middle)
        else:
            scale = _storable((hi - lo).clamp(min=1e-5) / top, scale_dtype)
            zero = (-torch.round(lo / scale)).clamp(0, top)
    elif convention == "omniquant":
        if symmetric:
            scale = _storable((magnitude / (middle - 1)).clamp(1e-5, 1e4), scale_dtype)
            zero = torch.full_like(scale, middle)
        else:
            scale = _storable(((hi - lo) / top).clamp(1e-5, 1e4), scale_dtype)
            zero = torch.round((-lo / scale).clamp(-1e4, 1e4))
    elif convention == "compressed" and symmetric:
        scale = _storable((2 * magnitude / top).clamp(min=torch.finfo(torch.float32).eps), scale_dtype)
        zero = torch.full_like(scale, middle)
    else:
        kind = "symmetric" if symmetric else "asymmetric"
        raise ValueError(f'no {kind} grid "{convention}"; conventions: {", ".join(CONVENTIONS)} (compressed is symmetric only)')
    return Grid(scale, zero, bits)


def shrink_range(
    values: Tensor, bits: int, symmetric: bool, convention: str = "gptq", scale_dtype: str = "float32",
    *, steps: int = 80, grid: int = 100, exponent: float = 2.4,
) -> Grid:
    """The grid whose range, shrunk by p = 1 - i / grid for i = 0 .. steps - 1, minimises sum |q - w|^exponent per row.

    GPTQ's "mse" range search; the first strict minimum wins. values: [..., g]. Peak memory: three copies of values.
    """
    lo, hi = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if convention == "gptq":
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    best = from_range(lo, hi, bits, symmetric, convention, scale_dtype)
    lowest = (best.nearest(values) - values).abs_().pow_(exponent).sum(-1, keepdim=True)
    for step in range(1, steps):
        p = 1 - step / grid
        trial = from_range(p * lo, p * hi, bits, symmetric, convention, scale_dtype)
        error = (trial.nearest(values) - values).abs_().pow_(exponent).sum(-1, keepdim=True)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best = Grid(torch.where(better, trial.scale, best.scale), torch.where(better, trial.zero, best.zero), bits)
    return best


def as_stored(values: Tensor, dtype: str) -> Tensor:
    """Values as they are read back from their storage dtype ("float16" …): rounded to it, in float32. May be negative or zero."""
    target = SCALE_DTYPES[dtype]
    limit = torch.finfo(target).max
    return values.clamp(-limit, limit).to(target).float()


def _storable(scale: Tensor, dtype: str) -> Tensor:
    """The scale as it will be read back: rounded to its storage dtype, kept within that type's normal range."""
    target = SCALE_DTYPES[dtype]
    if target is torch.float32:
        return scale
    limits = torch.finfo(target)
    return scale.clamp(limits.tiny, limits.max).to(target).float()
