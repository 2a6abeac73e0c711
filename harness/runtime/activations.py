"""Rounding of activations at run time: simulated, the values are rounded to a grid and the product is computed in floating point.

With b bits, m = 2^(b-1) - 1, and lo, hi, |x| taken over a token, a sequence ("tensor") or a group of channels of one token:

    grid          scale                              codes                         source
    smoothquant   max(|x|, 1e-5) / m                 round(x / scale)              SmoothQuant, arXiv 2211.10438
    compressed    |x| / ((2^b - 1) / 2)              clamped to -2^(b-1) … m       compressed-tensors
    llama_quant   max(|x|, 2e-3) / (m - 1)           clamped to -m … m - 1         arXiv 2408.15301; 126 where others have 127
    asymmetric    (hi - lo) / (2^b - 1)              shifted by round(-lo/scale)   GPTQ's rule; whatever the grid's name

format float8_e4m3 and float8_e5m2 scale |x| to the largest number of the format and round to it. Scales are computed in the
activation's own dtype, as the references do. Dynamic scales are of the tensor in hand; a "tensor" scale is of one sequence, never
of its batch mates, so that a batch scores as its items do alone. Static scales are one number per linear, the largest |x| over the
calibration windows (smallest and largest value when asymmetric), and codes are clamped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.cell import ActivationScheme, Scheme
from harness.errors import MethodError, unknown_name
from harness.methods.protocols import Shapes

GRIDS = ("smoothquant", "compressed", "llama_quant")
GRANULARITIES = ("token", "tensor", "group")
FLOATS = {"float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def check(scheme: Scheme, shapes: Shapes) -> list[str]:
    """Reasons why the activations of a scheme cannot be rounded; empty when they can."""
    problems: list[str] = []
    ungrouped: dict[int, list[str]] = {}
    for block in range(shapes.blocks):
        for linear in shapes.linears:
            activation = scheme.activation_for(block, linear.name)
            if activation is None:
                continue
            problems += _problems(activation)
            if activation.granularity == "group" and (activation.group_size < 1 or linear.in_features % activation.group_size):
                names = ungrouped.setdefault(activation.group_size, [])
                entry = f"{linear.name} ({linear.in_features})"
                if entry not in names:
                    names.append(entry)
    for size, names in ungrouped.items():
        problems.append(f"activation group size {size} does not divide in_features of {', '.join(names)}")
    return list(dict.fromkeys(problems))


def _problems(scheme: ActivationScheme) -> list[str]:
    problems = []
    if scheme.format != "int" and scheme.format not in FLOATS:
        problems.append(unknown_name("activation format", scheme.format, ("int", *FLOATS)))
    if scheme.format == "int" and scheme.grid not in GRIDS:
        problems.append(unknown_name("activation grid", scheme.grid, GRIDS))
    if scheme.granularity not in GRANULARITIES:
        problems.append(unknown_name("activation granularity", scheme.granularity, GRANULARITIES))
    if scheme.format == "int" and not 2 <= scheme.bits <= 16:
        problems.append(f"activations of {scheme.bits} bits: 2 to 16 are possible")
    if not scheme.dynamic and scheme.granularity != "tensor":
        problems.append(f"static activation scales are one number per linear; granularity {scheme.granularity} needs dynamic: true")
    return problems


class ActivationQuantizer:
    """Rounds the input of one linear. __call__: [..., in] -> the same shape and dtype.

    A static quantizer must see the calibration data first: while `observing` it passes inputs on and keeps their range.
    """

    def __init__(self, scheme: ActivationScheme, name: str = "") -> None:
        problems = _problems(scheme)
        if problems:
            raise MethodError(f"{name}: " + "; ".join(problems))
        self.scheme, self.name = scheme, name
        self.observing = False
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        scheme = self.scheme
        if self.observing:
            lo, hi = x.amin(), x.amax()
            self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
            self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)
            return x
        if x.numel() == 0:                              # an expert that no token chose
            return x
        if not scheme.dynamic:
            if self.lo is None or self.hi is None:
                raise MethodError(f"{self.name}: static activation scales need calibration data before the model runs")
            return _rounded(x, self.lo, self.hi, scheme)
        if scheme.granularity == "group":
            if scheme.group_size < 1 or x.shape[-1] % scheme.group_size:
                raise MethodError(f"{self.name}: activation group size {scheme.group_size} does not divide {x.shape[-1]} inputs")
            groups = x.unflatten(-1, (-1, scheme.group_size))
            return _rounded(groups, *_range(groups, (-1,)), scheme).flatten(-2)
        axes = (-1,) if scheme.granularity == "token" else tuple(range(1 if x.ndim > 2 else 0, x.ndim))
        return _rounded(x, *_range(x, axes), scheme)


def _range(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)


def _rounded(x: Tensor, lo: Tensor, hi: Tensor, scheme: ActivationScheme) -> Tensor:
    """x on the grid of the range [lo, hi], which broadcasts against x."""
    magnitude = torch.maximum(lo.abs(), hi.abs())
    if scheme.format != "int":
        target = FLOATS[scheme.format]
        top = torch.finfo(target).max
        scale = (magnitude / top).clamp(min=torch.finfo(x.dtype).tiny)
        return (x / scale).clamp(-top, top).to(target).to(x.dtype) * scale
    bits = scheme.bits
    top, m = 2**bits - 1, 2 ** (bits - 1) - 1
    if not scheme.symmetric:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        empty = (lo == 0) & (hi == 0)
        scale = torch.where(empty, torch.ones_like(hi), (hi - lo) / top).clamp(min=torch.finfo(x.dtype).tiny)
        zero = torch.round(-lo / scale)
        return ((torch.round(x / scale) + zero).clamp(0, top) - zero) * scale
    rule: Callable[[Tensor], Tensor]
    if scheme.grid == "smoothquant":
        scale = magnitude.clamp(min=1e-5) / m
        rule = (lambda codes: codes) if scheme.dynamic else (lambda codes: codes.clamp(-m - 1, m))
    elif scheme.grid == "compressed":
        scale = (magnitude / (top / 2)).clamp(min=torch.finfo(x.dtype).eps)
        rule = lambda codes: codes.clamp(-m - 1, m)                                    # noqa: E731
    else:
        scale = magnitude.clamp(min=2e-3) / (m - 1)
        rule = lambda codes: codes.clamp(-m, m - 1)                                    # noqa: E731
    return rule(torch.round(x / scale)) * scale
