"""Rounding of activations at run time: simulated, the values are rounded to a grid and the product is computed in floating point.

The grids are those of `numerics.activations`. Dynamic scales are computed from the tensor that is rounded; a "tensor" scale
is computed for each sequence of a batch, so that an item scores the same in every batch. Static scales are one number per linear,
the largest |x| over the calibration windows (smallest and largest value when asymmetric), and codes are clamped; in nvfp4 that
number is the scale of the whole input, beside dynamic ones of its blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.cell import ActivationScheme, Scheme
from harness.core.errors import MethodError, unknown_name
from harness.core.number_formats import FORMATS
from harness.core.shapes import Shapes
from harness.core.text import short_list
from harness.quantization.numerics.activations import (
    BLOCK_FLOATS,
    FLOATS,
    GRANULARITIES,
    GRIDS,
    round_dynamic,
    round_to_range,
)


def check(scheme: Scheme, shapes: Shapes) -> list[str]:
    """Reasons why the activations of a scheme cannot be rounded; empty when they can."""
    problems: list[str] = []
    ungrouped: dict[int, list[str]] = {}
    experts: dict[str, None] = {}
    for block in range(shapes.blocks):
        for linear in shapes.linears:
            activation = scheme.activation_for(block, linear.name)
            if activation is None:
                continue
            problems += _problems(activation)
            whole = activation.granularity == "tensor" or activation.format == "nvfp4"
            if linear.expert and (not activation.dynamic or whole):
                experts[linear.name] = None
            if activation.granularity == "group" and (
                activation.group_size < 1 or linear.in_features % activation.group_size
            ):
                names = ungrouped.setdefault(activation.group_size, [])
                entry = f"{linear.name} ({linear.in_features})"
                if entry not in names:
                    names.append(entry)
    for size, names in ungrouped.items():
        problems.append(
            f"activation group size {size} does not divide in_features of {', '.join(names)}"
        )
    if experts:
        first = short_list(list(experts), 2)
        problems.append(
            f"experts ({first}) receive tokens of several sequences at once, or none: "
            "their activations need dynamic scales per token or per group; use granularity token"
        )
    return list(dict.fromkeys(problems))


def _problems(scheme: ActivationScheme) -> list[str]:
    problems = []
    if scheme.format in BLOCK_FLOATS:
        return _block_problems(scheme)
    if scheme.format != "int" and scheme.format not in FLOATS:
        known = ("int", *FLOATS, *BLOCK_FLOATS)
        problems.append(unknown_name("activation format", scheme.format, known))
    if scheme.format == "int" and scheme.grid not in GRIDS:
        problems.append(unknown_name("activation grid", scheme.grid, GRIDS))
    if scheme.format == "int" and scheme.grid == "omniquant" and scheme.symmetric:
        problems.append(
            'activation grid "omniquant" is asymmetric only; use activation.symmetric=false'
        )
    if scheme.granularity not in GRANULARITIES:
        problems.append(unknown_name("activation granularity", scheme.granularity, GRANULARITIES))
    if scheme.format == "int" and not 2 <= scheme.bits <= 16:
        problems.append(f"activations of {scheme.bits} bits: 2 to 16 are possible")
    if scheme.outlier_threshold and (
        scheme.granularity != "token" or not scheme.dynamic or scheme.format != "int"
    ):
        problems.append("activation outliers (LLM.int8()) need dynamic integer scales per token")
    if scheme.outlier_threshold < 0:
        problems.append(
            f"activation outlier_threshold {scheme.outlier_threshold:g} is negative; 0 means that no channel is an outlier"
        )
    if not scheme.dynamic and scheme.granularity != "tensor":
        problems.append(
            f"static activation scales are one number per linear; granularity {scheme.granularity} needs dynamic: true"
        )
    return problems


def _block_problems(scheme: ActivationScheme) -> list[str]:
    """What contradicts a format with scales in blocks of channels."""
    name, block, problems = scheme.format, FORMATS[scheme.format].block, []
    for field, value in (("bits", 4), ("granularity", "group"), ("group_size", block)):
        if getattr(scheme, field) != value:
            problems.append(
                f"activations in {name} have {field} {value}, not {getattr(scheme, field)}; set activation.{field}={value}"
            )
    if not scheme.symmetric:
        problems.append(
            f"activations in {name} have no zero points; leave activation.symmetric=true"
        )
    if scheme.outlier_threshold:
        problems.append("activation outliers (LLM.int8()) need dynamic integer scales per token")
    if not scheme.dynamic and name == "mxfp4":
        problems.append(
            "activations in mxfp4 have no scale that calibration could fix; use activation.dynamic=true"
        )
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
        if x.numel() == 0:  # an expert that no token chose
            return x
        if not scheme.dynamic:
            if self.lo is None or self.hi is None:
                raise MethodError(
                    f"{self.name}: static activation scales need calibration data before the model runs"
                )
            return round_to_range(x, self.lo, self.hi, scheme)
        if scheme.granularity == "group" and (
            scheme.group_size < 1 or x.shape[-1] % scheme.group_size
        ):
            raise MethodError(
                f"{self.name}: activation group size {scheme.group_size} does not divide {x.shape[-1]} inputs"
            )
        return round_dynamic(x, scheme)
