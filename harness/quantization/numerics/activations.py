"""Grids of activations: values go to a grid and stay numbers; the product is computed in floating point.

With b bits, m = 2^(b-1) - 1, and lo, hi, |x| taken over a token, a sequence ("tensor") or a group of channels of one token:

    grid          scale                              codes                         source
    smoothquant   max(|x|, 1e-5) / m                 round(x / scale)              SmoothQuant, arXiv 2211.10438
    compressed    |x| / ((2^b - 1) / 2)              clamped to -2^(b-1) … m       compressed-tensors
    llama_quant   max(|x|, 2e-3) / (m - 1)           clamped to -m … m - 1         arXiv 2408.15301; 126 where others have 127
    omniquant     clamp((hi - lo) / (2^b - 1), …)    shifted by round(-lo/scale)   OmniQuant, arXiv 2308.13137; asymmetric only,
                                                                                   the range need not hold zero
    asymmetric    (hi - lo) / (2^b - 1)              shifted by round(-lo/scale)   GPTQ's rule; of every other grid's name

The formats fp8_e4m3 and fp8_e5m2 scale |x| to the largest number of the format and round to it. Scales are computed in the
activation's own dtype, as the references do.

The formats mxfp4 and nvfp4 (granularity group, blocks of 32 and 16 channels) have the elements and scales of the weights' formats,
found anew in each block, in float32: 2^(floor(log2 max|x|) - 2), and E4M3(max|x| / 6 / t) · t with t = max|X| / (6 · 448). X is the
sequence where scales are dynamic, and the calibration windows where they are static: then only t is fixed.

outlier_threshold t > 0 is LLM.int8()'s decomposition (arXiv 2208.07339): channels with some |x| >= t stay as they are; the others
are rounded with a scale over the values below t, which include the small values of outlier channels. Outlier channels are found in
each sequence by itself, so that a batch scores as its items do. On the symmetric "smoothquant" grid the codes are those of
bitsandbytes: round(x · (m / a)) with a = max|x| below t, scale and product in float32 whatever the activation's dtype. The product
with the dequantized 8-bit weight is then that of bitsandbytes with int8 outlier weights; a weight that keeps a 16-bit matrix for
these channels (`QuantizedWeight.beside_outliers`) multiplies them by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme, WeightScheme
from harness.core.number_formats import FORMATS
from harness.quantization.numerics.grids import FLOAT8_MAX, Fitting

GRIDS = ("smoothquant", "compressed", "llama_quant", "omniquant")
GRANULARITIES = ("token", "tensor", "group")
BLOCK_FLOATS = ("mxfp4", "nvfp4")  # with scales in blocks of channels
FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

VANISHING = 1e-30  # the least maximum that float32 can divide 2^15 by

Round = Callable[[Tensor], Tensor]


def round_dynamic(x: Tensor, scheme: ActivationScheme, to_integers: Round = torch.round) -> Tensor:
    """x [..., tokens, in] on grids of its own ranges, in x's dtype. group_size must divide in.

    to_integers: torch.round, or a rounding that lets gradients through (`training.round_through`).
    """
    if scheme.outlier_threshold > 0:
        large, kept = (
            x.abs() >= scheme.outlier_threshold,
            outlier_channels(x, scheme.outlier_threshold),
        )
        small = x.masked_fill(large, 0)
        if scheme.symmetric and scheme.grid == "smoothquant":
            return torch.where(kept, x, _vector_wise(small, scheme.bits, to_integers))
        plain = dataclasses.replace(scheme, outlier_threshold=0.0)
        return torch.where(kept, x, round_dynamic(small, plain, to_integers))
    if scheme.format in BLOCK_FLOATS:
        axes = tuple(range(1 if x.ndim > 2 else 0, x.ndim))
        return round_blocks(x, x.float().abs().amax(axes, keepdim=True), scheme)
    if scheme.granularity == "group":
        groups = x.unflatten(-1, (-1, scheme.group_size))
        return round_to_range(groups, *_range(groups, (-1,)), scheme, to_integers).flatten(-2)
    axes = (-1,) if scheme.granularity == "token" else tuple(range(1 if x.ndim > 2 else 0, x.ndim))
    return round_to_range(x, *_range(x, axes), scheme, to_integers)


def round_blocks(x: Tensor, largest: Tensor, scheme: ActivationScheme) -> Tensor:
    """x [..., in] in mxfp4 or nvfp4, in x's dtype. largest: the magnitude that fixes nvfp4's t, which broadcasts against x."""
    fixed = FORMATS[scheme.format]
    assert fixed.block is not None and fixed.scale_dtype is not None
    groups = x.float().unflatten(-1, (-1, fixed.block))
    whole = largest.float() / fixed.element.reach / FLOAT8_MAX  # in the order of weights
    whole = torch.where(whole > 0, whole, 1.0)
    layout = WeightScheme(scheme.format, 4, fixed.block, scale_dtype=fixed.scale_dtype)
    fitting = Fitting(layout, tensor_scale=whole.unsqueeze(-1) if whole.ndim else whole)
    magnitude = groups.abs().amax(-1, keepdim=True)
    nearest = fitting.from_range(-magnitude, magnitude).nearest(groups)
    nearest = torch.where(groups.isfinite(), nearest, groups)  # NaN has no code and stays NaN
    return nearest.flatten(-2).to(x.dtype)


def _vector_wise(x: Tensor, bits: int, to_integers: Round) -> Tensor:
    """LLM.int8()'s rounding of each token of x [..., in], computed in float32 and returned in x's dtype; zeros stay zeros."""
    m = 2 ** (bits - 1) - 1
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=VANISHING)
    return (to_integers(wide * (m / largest)) * (largest / m)).to(x.dtype)


def outlier_channels(x: Tensor, threshold: float) -> Tensor:
    """Channels of x [..., tokens, in] with some |x| >= threshold in their sequence, as a mask that broadcasts against x."""
    return (x.abs() >= threshold).any(
        dim=tuple(range(1 if x.ndim > 2 else 0, x.ndim - 1)), keepdim=True
    )


def _range(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)


def round_to_range(
    x: Tensor, lo: Tensor, hi: Tensor, scheme: ActivationScheme, to_integers: Round = torch.round
) -> Tensor:
    """x on the grid of the range [lo, hi], which broadcasts against x."""
    magnitude = torch.maximum(lo.abs(), hi.abs())
    if scheme.format in BLOCK_FLOATS:
        return round_blocks(x, magnitude, scheme)
    if scheme.format != "int":
        target = FLOATS[scheme.format]
        top = torch.finfo(target).max
        scale = (magnitude / top).clamp(min=torch.finfo(x.dtype).tiny)
        return (x / scale).clamp(-top, top).to(target).to(x.dtype) * scale
    top = 2**scheme.bits - 1
    if not scheme.symmetric and scheme.grid == "omniquant":
        scale = ((hi - lo) / top).clamp(1e-5, 1e4)
        zero = torch.round((-lo / scale).clamp(-1e4, 1e4))
        return ((to_integers(x / scale) + zero).clamp(0, top) - zero) * scale
    if not scheme.symmetric:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        empty = (lo == 0) & (hi == 0)
        scale = torch.where(empty, torch.ones_like(hi), (hi - lo) / top).clamp(
            min=torch.finfo(x.dtype).tiny
        )
        zero = torch.round(-lo / scale)
        return ((to_integers(x / scale) + zero).clamp(0, top) - zero) * scale
    scale, low, high = _symmetric(magnitude, scheme)
    return to_integers(x / scale).clamp(low, high) * scale


def codes_per_token(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """The codes [..., tokens, in] of `round_dynamic`, in int8 or float8, and their scales [..., tokens, 1] in x's dtype.

    For symmetric 8-bit schemes with a scale per token, and for 8-bit floats; codes times scales are round_dynamic(x), to the bit.
    """
    magnitude = x.abs().amax(-1, keepdim=True)
    if scheme.format != "int":
        target = FLOATS[scheme.format]
        largest = torch.finfo(target).max
        scale = (magnitude / largest).clamp(min=torch.finfo(x.dtype).tiny)
        return (x / scale).clamp(-largest, largest).to(target), scale
    scale, low, high = _symmetric(magnitude, scheme)
    return torch.round(x / scale).clamp(low, high).to(torch.int8), scale


def _symmetric(magnitude: Tensor, scheme: ActivationScheme) -> tuple[Tensor, int, int]:
    """Scale, smallest and largest code of a symmetric grid whose largest value is `magnitude`."""
    top, m = 2**scheme.bits - 1, 2 ** (scheme.bits - 1) - 1
    if scheme.grid == "smoothquant":  # dynamic codes end at m by themselves
        return magnitude.clamp(min=1e-5) / m, -m - 1, m
    if scheme.grid == "compressed":
        return (magnitude / (top / 2)).clamp(min=torch.finfo(magnitude.dtype).eps), -m - 1, m
    return magnitude.clamp(min=2e-3) / (m - 1), -m, m - 1
