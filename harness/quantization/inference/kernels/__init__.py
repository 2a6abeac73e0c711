"""Kernels: products of quantized matrices as a library computes them, one file each, and which of them runs a matrix.

    kernel      weight                                     input                        library
    int_mm      INT8, symmetric, one scale per row         INT8 per token               torch._int_mm
    scaled_mm   FP8 E4M3, one scale per row                FP8 E4M3 per token           torch._scaled_mm
    int4pack    4-bit integers in groups of 32 to 256      bfloat16, not rounded        torch, CPU
    int8pack    INT8, symmetric, one scale per row         bfloat16, not rounded        torch, CPU
    thin_products  a difference of low rank from a base    not rounded                  torch

The order is fixed: what runs depends on the matrix and on the machine's instructions, never on a timing. A matrix that no kernel
holds exactly is refused with the reasons of each; nothing falls back to a dequantized matrix unless the mode says so.
"""

from __future__ import annotations

import functools
import importlib
from typing import cast

import torch

from harness.core.cell import ActivationScheme
from harness.core.errors import MethodError, unknown_name
from harness.quantization.inference.kernels.protocols import Kernel
from harness.quantization.numerics.weights import QuantizedWeight

ORDER = ("int_mm", "scaled_mm", "int4pack", "int8pack", "thin_products")


@functools.cache
def kernel(name: str) -> Kernel:
    """A kernel by its name. Raises MethodError with the nearest name when there is none."""
    if name not in ORDER:
        raise MethodError(unknown_name("kernel", name, ORDER))
    module = importlib.import_module(f"harness.quantization.inference.kernels.{name}")
    return cast(Kernel, module.Product())


def reasons(
    name: str,
    weight: QuantizedWeight,
    activation: ActivationScheme | None,
    dtype: torch.dtype,
    device: torch.device,
) -> list[str]:
    """Why a kernel cannot multiply a matrix here; empty where it can."""
    one = kernel(name)
    absent = one.available(device)
    return [absent] if absent else one.reasons(weight, activation, dtype, device)


def choose(
    weight: QuantizedWeight,
    activation: ActivationScheme | None,
    dtype: torch.dtype,
    device: torch.device,
    name: str = "",
) -> Kernel:
    """The first kernel in ORDER that holds the matrix exactly, or the one of that name.

    Raises MethodError with every kernel's reasons where there is none.
    """
    asked = (name,) if name else ORDER
    found: dict[str, list[str]] = {}
    for each in asked:
        found[each] = reasons(each, weight, activation, dtype, device)
        if not found[each]:
            return kernel(each)
    listed = "; ".join(f"{each}: {', '.join(why)}" for each, why in found.items())
    raise MethodError(
        f"no kernel multiplies this matrix as it is stored ({listed}); use mode dense"
    )
