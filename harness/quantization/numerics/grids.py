"""Grids: from the range of a row or group to scale and zero point, and between values and codes.

Two kinds behind one `Grid`: uniform integers, and the elements of `number_formats` (NF4, FP8, MX, …), which have no zero point. A
method that takes both gets its grids from a `Fitting`.

Uniform grids. Papers draw the same bit width from different grids, and results at 2 and 3 bits depend on it, so the convention is a
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
    signed       yes        -m / 2^(bits-1)                    2^(bits-1)               m: of lo and hi the larger in magnitude

In "signed" grids, of schemes with `signed_scales`, m is exact and the other side reaches (2^(bits-1) - 1) / 2^(bits-1) of it: the
rule of llama.cpp's Q4_0 and of AutoRound's symmetric grids. Where lo = -hi, m is hi, so the scale is negative.
With float zero points the zero is -lo / scale in all of them, as a float of the scale's type.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from harness.core.cell import WeightScheme
from harness.core.number_formats import DOUBLE_QUANTIZED, FORMATS, Element
from harness.quantization.numerics.block_maxima import SMALLEST

CONVENTIONS = ("gptq", "awq", "omniquant", "compressed")  # that a method's setting may name
SIGNED = "signed"  # and the one that a scheme decides
SEARCHES = ("none", "range", "neighbours", "neighbours_mae", "both")
FLOAT8_MAX, FLOAT8_MIN = 448.0, 2.0**-9  # of E4M3: the largest, and the smallest above zero
FLOAT8_WITH_ROOM = 256.0  # 1.5 times it is an E4M3 number too
E8M0_BIAS = 127
# factors of a range, the range itself first
SHRINKING = tuple(1 - step / 100 for step in range(80))
WIDE = (1.0, *(step / 100 for step in range(150, 49, -1)))
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Grid:
    """scale and zero [..., 1] float32, one per row or group of the last axis; codes run from 0 to 2^bits - 1.

    scale         exact in the dtype it will be stored in, but for double_quantized scales; negative in signed grids alone
    zero          integer-valued, unless float_zero; 0 with an element
    element       None: uniform steps; else a code stands for scale * element.values[code]
    tensor_scale  [1] float32 where scale is a float8 number times it
    by_inverse    values are multiplied by 1 / scale, as in bitsandbytes, which may differ from a division in the last bit; scales
                  of 0, of blocks of zeros, are allowed then
    """

    scale: Tensor
    zero: Tensor
    bits: int
    element: Element | None = None
    tensor_scale: Tensor | None = None
    by_inverse: bool = False
    float_zero: bool = False

    @property
    def top(self) -> int:
        """The largest code, 2^bits - 1."""
        return 2**self.bits - 1

    def quantize(self, values: Tensor) -> Tensor:
        """Nearest codes 0 .. top of values [..., g], float32 (uint8 with an element); halves round to even."""
        if self.element is not None:
            return encode(
                values * (1 / self.scale.clamp(min=SMALLEST))
                if self.by_inverse
                else values / self.scale,
                self.element,
            )
        if self.float_zero:
            return torch.round(values / self.scale + self.zero).clamp_(0, self.top)
        return (torch.round(values / self.scale) + self.zero).clamp_(0, self.top)

    def dequantize(self, codes: Tensor) -> Tensor:
        """scale * (codes - zero), or scale * the elements of the codes."""
        if self.element is not None:
            return self.scale * decode(codes, self.element)
        return self.scale * (codes - self.zero)

    def nearest(self, values: Tensor) -> Tensor:
        """The grid value nearest to each value."""
        return self.dequantize(self.quantize(values))


@dataclass(frozen=True)
class Fitting:
    """How the groups of one matrix get their grids: the scheme, the method's settings, and what the whole matrix decides first.

    search        one of SEARCHES: which ranges beside its own each group tries
    tensor_scale  [1] float32 for float8 scales
    """

    scheme: WeightScheme
    convention: str = "gptq"
    search: str = "none"
    tensor_scale: Tensor | None = None

    @classmethod
    def of(
        cls, weight: Tensor, scheme: WeightScheme, convention: str = "gptq", search: str = "none"
    ) -> Self:
        """For a matrix [out, in]. Its largest scale becomes the largest float8 number, or 256 where larger ones are tried."""
        plain = cls(scheme, convention, search)
        if scheme.scale_dtype != "float8_e4m3":
            return plain
        size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
        grouped = weight.reshape(weight.shape[0], -1, size)
        scale = (
            cls(dataclasses.replace(scheme, scale_dtype="float32"), convention).fit(grouped).scale
        )
        # grids of zeros have a scale of their own
        scale = scale.masked_fill(grouped.abs().amax(-1, keepdim=True) == 0, 0)
        largest = scale.abs().amax().reshape(1)
        return dataclasses.replace(
            plain,
            tensor_scale=torch.where(
                largest > 0,
                largest / (FLOAT8_MAX if search in ("none", "range") else FLOAT8_WITH_ROOM),
                1.0,
            ),
        )

    def fit(self, values: Tensor, importance: Tensor | None = None) -> Grid:
        """The grid of each row of values [..., g]. importance [..., g]: weights of the squared errors in a search; None: 1."""
        lo, hi = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        if self.search == "none":
            return self.from_range(lo, hi)
        if self.search == "range":
            if self.convention == "gptq":
                lo, hi = lo.clamp(max=0), hi.clamp(min=0)
            factors, exponent = SHRINKING, 2.4
        else:
            factors = _neighbours(self.scheme) if self.search != "both" else WIDE
            exponent = 1.0 if self.search == "neighbours_mae" else 2.0
        if importance is not None:
            exponent = 2.0
        return _least_error(values, lo, hi, factors, self.from_range, exponent, importance)

    def from_range(self, lo: Tensor, hi: Tensor) -> Grid:
        """The grid over the range [lo, hi], both [..., 1] float32."""
        scheme = self.scheme
        if scheme.format == "int":
            return from_range(
                lo,
                hi,
                int(scheme.bits),
                scheme.symmetric,
                SIGNED if scheme.signed_scales else self.convention,
                scheme.scale_dtype,
                self.tensor_scale,
                float_zero=scheme.zero_point == "float",
            )
        element = FORMATS[scheme.format].element
        magnitude = torch.maximum(lo.abs(), hi.abs())
        # of the whole matrix at once, when its codes are chosen (`weights.on_grid`)
        if scheme.scale_dtype == DOUBLE_QUANTIZED:
            return Grid(
                magnitude / element.reach,
                torch.zeros_like(magnitude),
                element.bits,
                element,
                by_inverse=True,
            )
        if scheme.scale_dtype == "e8m0":
            exponent = (torch.frexp(magnitude).exponent - 1 - element.emax).clamp(-127, 127)
            scale = torch.ldexp(torch.ones_like(magnitude), exponent)
        else:
            scale = torch.where(magnitude > 0, magnitude / element.reach, 1.0)
            scale = _storable(scale, scheme.scale_dtype, self.tensor_scale)
        return Grid(scale, torch.zeros_like(scale), element.bits, element, self.tensor_scale)


def fit(
    values: Tensor,
    bits: int,
    symmetric: bool,
    convention: str = "gptq",
    scale_dtype: str = "float32",
) -> Grid:
    """The grid of each row of values [..., g], over its last axis. Raises ValueError for an unknown convention."""
    return from_range(
        values.amin(-1, keepdim=True),
        values.amax(-1, keepdim=True),
        bits,
        symmetric,
        convention,
        scale_dtype,
    )


def from_range(
    lo: Tensor,
    hi: Tensor,
    bits: int,
    symmetric: bool,
    convention: str = "gptq",
    scale_dtype: str = "float32",
    tensor_scale: Tensor | None = None,
    *,
    float_zero: bool = False,
) -> Grid:
    """The uniform grid over the range [lo, hi], both [..., 1] float32.

    float_zero: zero points are -lo / scale in the storage type of scales (float16 beside float8 scales), neither rounded to an
    integer nor clamped, so that both ends are on the grid as exactly as that type allows.
    """
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    float_zero = float_zero and not symmetric
    magnitude = torch.maximum(lo.abs(), hi.abs())
    if convention == "gptq":
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        if symmetric:
            hi = torch.maximum(lo.abs(), hi)
            lo = torch.where(lo < 0, -hi, lo)
        empty = (lo == 0) & (hi == 0)
        lo, hi = torch.where(empty, -1.0, lo), torch.where(empty, 1.0, hi)
        scale = _storable((hi - lo) / top, scale_dtype, tensor_scale)
        zero = (
            torch.full_like(scale, middle) if symmetric else torch.round(-lo / scale).clamp_(0, top)
        )
    elif convention == "awq":
        if symmetric:
            scale = _storable(magnitude.clamp(min=1e-5) / (middle - 1), scale_dtype, tensor_scale)
            zero = torch.full_like(scale, middle)
        else:
            scale = _storable((hi - lo).clamp(min=1e-5) / top, scale_dtype, tensor_scale)
            zero = (-torch.round(lo / scale)).clamp(0, top)
    elif convention == "omniquant":
        if symmetric:
            scale = _storable(
                (magnitude / (middle - 1)).clamp(1e-5, 1e4), scale_dtype, tensor_scale
            )
            zero = torch.full_like(scale, middle)
        else:
            scale = _storable(((hi - lo) / top).clamp(1e-5, 1e4), scale_dtype, tensor_scale)
            zero = torch.round((-lo / scale).clamp(-1e4, 1e4))
    elif convention == "compressed" and symmetric:
        scale = _storable(
            (2 * magnitude / top).clamp(min=torch.finfo(torch.float32).eps),
            scale_dtype,
            tensor_scale,
        )
        zero = torch.full_like(scale, middle)
    elif convention == SIGNED and symmetric:
        end = torch.where(lo.abs() > hi, lo, hi)
        scale = stored_scale(torch.where(end == 0, 1.0, -end / middle), scale_dtype, tensor_scale)
        zero = torch.full_like(scale, middle)
    else:
        kind = "symmetric" if symmetric else "asymmetric"
        known = ", ".join((*CONVENTIONS, SIGNED))
        raise ValueError(
            f'no {kind} grid "{convention}"; conventions: {known} (compressed and signed are symmetric only)'
        )
    if float_zero:  # rows of zeros keep the zero point that is a code
        exact = as_stored(-lo / scale, scale_dtype if scale_dtype in SCALE_DTYPES else "float16")
        zero = torch.where(magnitude > 0, exact, zero)
    return Grid(scale, zero, bits, tensor_scale=tensor_scale, float_zero=float_zero)


def shrink_range(
    values: Tensor,
    bits: int,
    symmetric: bool,
    convention: str = "gptq",
    scale_dtype: str = "float32",
    *,
    steps: int = 80,
    grid: int = 100,
    exponent: float = 2.4,
) -> Grid:
    """The grid whose range, shrunk by p = 1 - i / grid for i = 0 .. steps - 1, minimises sum |q - w|^exponent per row.

    GPTQ's "mse" range search; the first strict minimum wins. values: [..., g]. Peak memory: three copies of values.
    """
    lo, hi = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    make = functools.partial(
        from_range, bits=bits, symmetric=symmetric, convention=convention, scale_dtype=scale_dtype
    )
    if convention == "gptq":
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    return _least_error(values, lo, hi, [1 - step / grid for step in range(steps)], make, exponent)


def search_reasons(search: str, scheme: WeightScheme) -> list[str]:
    """Reasons why the grids of a scheme cannot be searched in this way."""
    if search.startswith("neighbours") and not _neighbours(scheme):
        kind = scheme.format if scheme.format != "int" else "integers"
        return [
            f"{search} tries the scales beside a power of two (MX formats) or the E4M3 scale of nvfp4; {kind} with "
            f"{scheme.scale_dtype} scales have none to try; use scale_search=range"
        ]
    return []


def _neighbours(scheme: WeightScheme) -> tuple[float, ...]:
    """Factors of a group's range that lead to the scales beside its own, the range itself first; empty where there are none.

    Powers of two: the exponent, the one above, the one below. E2M1 with E4M3 scales: the largest weight meets 6, or 4, whose
    neighbours 3 and 6 are closer (Four Over Six, arXiv 2512.02010).
    """
    if scheme.scale_dtype == "e8m0":
        return (1.0, 2.0, 0.5)
    if scheme.format == "nvfp4" and scheme.scale_dtype == "float8_e4m3":
        return (1.0, 1.5)
    return ()


def _least_error(
    values: Tensor,
    lo: Tensor,
    hi: Tensor,
    factors: Sequence[float],
    make: Callable[[Tensor, Tensor], Grid],
    exponent: float,
    importance: Tensor | None = None,
) -> Grid:
    """Of the grids over the range times each factor, the first with the least sum of importance · |q - w|^exponent, row by row."""

    def loss(grid: Grid) -> Tensor:
        error = (grid.nearest(values) - values).abs_().pow_(exponent)
        return (error if importance is None else error.mul_(importance)).sum(-1, keepdim=True)

    best = make(lo, hi)
    lowest = loss(best)
    for factor in factors[1:]:
        trial = make(factor * lo, factor * hi)
        error = loss(trial)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        scale, zero = (
            torch.where(better, trial.scale, best.scale),
            torch.where(better, trial.zero, best.zero),
        )
        best = dataclasses.replace(best, scale=scale, zero=zero)
    return best


# ---- elements --------------------------------------------------------------------------------------------------------


@functools.cache
def tables(element: Element, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of an element: values by code [2^bits], borders between neighbouring values, the code of each interval between borders."""
    codes = [code for code, value in enumerate(element.values) if math.isfinite(value)]
    if element.signed:  # -0 below +0, larger magnitudes further out
        sign = 2 ** (element.bits - 1)
        codes.sort(key=lambda code: -(code - sign) - 1 if code >= sign else code)
    else:
        first = {element.values[code]: code for code in reversed(codes)}
        codes = [first[value] for value in sorted(first)]
    values = torch.tensor(element.values)
    ordered = values[codes]
    borders = (ordered[:-1] + ordered[1:]) / 2
    if element.signed:  # a border itself belongs to the interval below it
        upper = torch.tensor(
            [
                low % 2 == 1 or value == 0
                for low, value in zip(codes, borders.tolist(), strict=False)
            ]
        )
        borders = torch.where(upper, torch.nextafter(borders, torch.tensor(-math.inf)), borders)
    return (
        values.to(device),
        borders.to(device),
        torch.tensor(codes, dtype=torch.uint8, device=device),
    )


def encode(values: Tensor, element: Element) -> Tensor:
    """Codes, uint8, of the nearest elements; values beyond the largest take the largest. Small negative values become -0."""
    _, borders, codes = tables(element, values.device)
    return codes[torch.bucketize(values, borders)]


def decode(codes: Tensor, element: Element) -> Tensor:
    """The elements of codes, float32."""
    return tables(element, codes.device)[0][codes.long()]


# ---- how scales are stored -------------------------------------------------------------------------------------------


def as_stored(values: Tensor, dtype: str) -> Tensor:
    """Values as they are read back from their storage dtype ("float16" …): rounded to it, in float32. May be negative or zero."""
    target = SCALE_DTYPES[dtype]
    limit = torch.finfo(target).max
    return values.clamp(-limit, limit).to(target).float()


def stored_scale(scale: Tensor, dtype: str, tensor_scale: Tensor | None = None) -> Tensor:
    """Scales of either sign as they are read back; none becomes 0."""
    magnitude = scale.abs().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.copysign(_storable(magnitude, dtype, tensor_scale), scale)


def _storable(scale: Tensor, dtype: str, tensor_scale: Tensor | None = None) -> Tensor:
    """The scale as it will be read back: rounded to its storage dtype, kept within that type's normal range."""
    if dtype == "float8_e4m3":
        assert tensor_scale is not None, "float8 scales need the matrix's own scale: Fitting.of"
        return _to_float8(scale / tensor_scale).float() * tensor_scale
    target = SCALE_DTYPES[dtype]
    if target is torch.float32:
        return scale
    limits = torch.finfo(target)
    return scale.clamp(limits.tiny, limits.max).to(target).float()


def _to_float8(scale: Tensor) -> Tensor:
    magnitude = scale.abs().clamp(FLOAT8_MIN, FLOAT8_MAX)
    return torch.copysign(magnitude, scale).to(torch.float8_e4m3fn)


def pack_scales(scale: Tensor, dtype: str, tensor_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The stored tensors of scales [out, groups] that are exact in dtype: "scale", and "tensor_scale" with float8."""
    if dtype == "e8m0":
        return {"scale": (torch.frexp(scale).exponent - 1 + E8M0_BIAS).to(torch.uint8)}
    if dtype == "float8_e4m3":
        assert tensor_scale is not None
        return {"scale": _to_float8(scale / tensor_scale), "tensor_scale": tensor_scale}
    return {"scale": scale.to(SCALE_DTYPES[dtype]).contiguous()}


def unpack_scales(tensors: dict[str, Tensor], dtype: str) -> Tensor:
    """The inverse of `pack_scales`, exact, float32."""
    stored = tensors["scale"]
    if dtype == "e8m0":
        return torch.ldexp(
            torch.ones_like(stored, dtype=torch.float32), stored.to(torch.int32) - E8M0_BIAS
        )
    return stored.float() * tensors["tensor_scale"] if dtype == "float8_e4m3" else stored.float()
