"""NF4 and FP4 as bitsandbytes stores them: 4-bit codes into a table, scaled by the largest magnitude of each flat block.

QLoRA: Efficient Finetuning of Quantized LLMs (arXiv 2305.14314), §3; the layout of bitsandbytes.
Objective: equally many weights per code when a block is normally distributed: NF4's table are 16 quantiles of the normal; FP4's are
a sign and 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1. For a block of B consecutive weights of the
row-major matrix, with A = max|w|: q = nearest entry of the table to w / A, w' = table[q] · A (eqs. 1–4).
Double quantization (§3, eqs. 5–6): A less its mean over the matrix is stored in 8 bits, itself in blocks of 256.

Blocks run over the flattened matrix: where B does not divide the rows they cross from one to the next, unlike groups.
(The roundings rtn, gptq and awq take the same tables with groups within rows and scales of any type; with scale_dtype
double_quantized they store what this one does.)
As in bitsandbytes: A and the second-level constants are float32 whatever else scale_dtype says; two codes per byte, the first in
the high half; a matrix of odd size ends with the code of zero. Where we differ: the last, short block multiplies by 1 / A as all
others do (bitsandbytes' CPU path divides there, its CUDA kernel multiplies); zeros of FP4 have one code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.number_formats import DOUBLE_QUANTIZED, FORMATS
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.block_maxima import BlockMaxima, check_block, unit_blocks
from harness.quantization.numerics.grids import encode
from harness.quantization.numerics.weights import NormalFloatWeight, QuantizedWeight

FLAT_FORMATS = ("nf4", "fp4")


class Rounding:
    """Nearest entry of the table."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """double_quantization: store the block maxima in 8 bits, as the scheme's scale_dtype double_quantized does, too."""

        double_quantization: bool = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Format nf4 or fp4, 4 bits, blocks of 32 to 4096 weights in powers of two."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.format not in FLAT_FORMATS:
                yield f'format "{weight.format}" is not NF4 or FP4; use scheme.weight.format=nf4 or fp4'
            if weight.bits != 4:
                yield f"NF4 and FP4 have 4 bits, not {weight.bits:g}"
            yield from check_block("NF4 and FP4", weight.group_size)

        return refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: three copies of weight."""
        require_finite(weight)
        scaled, values = unit_blocks(weight.reshape(-1), scheme.group_size)
        codes = encode(scaled, FORMATS[scheme.format].element).reshape(weight.shape)
        double = self.settings.double_quantization or scheme.scale_dtype == DOUBLE_QUANTIZED
        maxima = BlockMaxima.double_quantized(values) if double else BlockMaxima(values)
        return NormalFloatWeight(codes, maxima, scheme.group_size, scheme.format)
