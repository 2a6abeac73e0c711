"""Number formats of weights: what each code of up to 8 bits stands for, which block shares a scale, and how scales are stored.

    format       code  element                              block  scale            source
    int          2–8   uniform steps                        free   scale_dtype      grids.py
    nf4          4     16 quantiles of the normal           free   scale_dtype ²    QLoRA, arXiv 2305.14314
    fp4          4     sign and 8 magnitudes of 0 … 1       free   scale_dtype ²    bitsandbytes, FP4
    fp8_e4m3     8     E4M3, no infinities, largest 448     free   scale_dtype      OCP 8-bit floating point (OFP8)
    fp8_e5m2     8     E5M2, largest 57344                  free   scale_dtype      OCP 8-bit floating point (OFP8)
    mxfp4        4     E2M1, largest 6                      32     E8M0             OCP Microscaling (MX) 1.0
    mxfp6_e2m3   6     E2M3, largest 7.5                    32     E8M0             OCP MX 1.0
    mxfp6_e3m2   6     E3M2, largest 28                     32     E8M0             OCP MX 1.0
    mxfp8_e4m3   8     E4M3                                 32     E8M0             OCP MX 1.0
    mxfp8_e5m2   8     E5M2                                 32     E8M0             OCP MX 1.0
    mxint8       8     two's complement / 64                32     E8M0             OCP MX 1.0
    nvfp4        4     E2M1                                 16     E4M3 · float32   NVIDIA NVFP4

A free block is scheme.weight.group_size, -1 being a whole row. A scale brings the largest magnitude of its block to the element's
`reach`; in MX it is 2^(floor(log2 max|w|) - emax), so the largest may saturate. float8_e4m3 scales are E4M3 numbers times one
float32 per matrix. Torch-free, for plans and names of schemes.

² or double_quantized, bitsandbytes' layout: 8-bit codes of the scales less their mean (`block_maxima`), rounded after the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PLAIN_SCALES = ("float16", "bfloat16", "float32")
SCALE_TYPES = (*PLAIN_SCALES, "float8_e4m3")  # e8m0 belongs to the MX formats alone
DOUBLE_QUANTIZED = "double_quantized"  # and this to NF4 and FP4

# 16 quantiles of the normal distribution with an exact zero, divided by the largest: QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' magnitudes by the low three bits of the code, in twelfths; the fourth bit is the sign.
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True)
class Element:
    """values: what each code stands for, 2^bits of them, NaN or infinite where a code is not used.

    reach   the magnitude to which the largest of a block is scaled
    signed  the highest bit is a sign: both zeros exist, and a value exactly between two takes the even code; else the lower value
    """

    bits: int
    values: tuple[float, ...]
    reach: float
    signed: bool = False

    @property
    def emax(self) -> int:
        """Exponent of the largest power of two among the values."""
        return math.frexp(max(v for v in self.values if math.isfinite(v)))[1] - 1


@dataclass(frozen=True)
class Format:
    """One row of the table above. block None: free, usually usual_block; scale_dtype None: of SCALE_TYPES or more_scales."""

    element: Element
    block: int | None = None
    scale_dtype: str | None = None
    usual_block: int = -1
    more_scales: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        return self.element.bits


def floating(exponent_bits: int, mantissa_bits: int, special: str = "") -> Element:
    """A float of sign, exponent, mantissa with subnormals and bias 2^(e-1) - 1.

    special: "ieee", the largest exponent means infinity and NaN; "nan", only all ones means NaN; "", every code is a number.
    """
    bits, bias = 1 + exponent_bits + mantissa_bits, 2 ** (exponent_bits - 1) - 1
    values: list[float] = []
    for code in range(2 ** (bits - 1)):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        if special == "ieee" and exponent == 2**exponent_bits - 1:
            values.append(math.nan if mantissa else math.inf)
        elif special == "nan" and code == 2 ** (bits - 1) - 1:
            values.append(math.nan)
        elif exponent:
            values.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
        else:
            values.append(mantissa / 2**mantissa_bits * 2.0 ** (1 - bias))
    reach = max(value for value in values if math.isfinite(value))
    return Element(bits, (*values, *(-value for value in values)), reach, signed=True)


_FP4 = tuple(twelfths / 12 for twelfths in FP4_TWELFTHS)
_E2M1, _E2M3, _E3M2 = floating(2, 1), floating(2, 3), floating(3, 2)
_E4M3, _E5M2 = floating(4, 3, "nan"), floating(5, 2, "ieee")
_INT8 = Element(
    8, tuple((code if code < 128 else code - 256) / 64 for code in range(256)), 127 / 64
)

FORMATS: dict[str, Format] = {
    "nf4": Format(Element(4, NF4, 1.0), usual_block=64, more_scales=(DOUBLE_QUANTIZED,)),
    "fp4": Format(
        Element(4, (*_FP4, *(0.0 - value for value in _FP4)), 1.0),
        usual_block=64,
        more_scales=(DOUBLE_QUANTIZED,),
    ),
    "fp8_e4m3": Format(_E4M3),
    "fp8_e5m2": Format(_E5M2),
    "mxfp4": Format(_E2M1, 32, "e8m0"),
    "mxfp6_e2m3": Format(_E2M3, 32, "e8m0"),
    "mxfp6_e3m2": Format(_E3M2, 32, "e8m0"),
    "mxfp8_e4m3": Format(_E4M3, 32, "e8m0"),
    "mxfp8_e5m2": Format(_E5M2, 32, "e8m0"),
    "mxint8": Format(_INT8, 32, "e8m0"),
    "nvfp4": Format(_E2M1, 16, "float8_e4m3"),
}
SHORT_NAMES = {"fp8": "fp8_e4m3", "mxfp6": "mxfp6_e2m3", "mxfp8": "mxfp8_e4m3"}
