"""Checks that methods share: which number formats and group sizes they accept, and that a weight is finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor

from harness.core import plugins
from harness.core.cell import BASE_WEIGHT, Scheme, WeightScheme
from harness.core.errors import MethodError, unknown_name
from harness.core.number_formats import DOUBLE_QUANTIZED, FORMATS, PLAIN_SCALES, SCALE_TYPES
from harness.core.shapes import LinearShape, Shapes
from harness.core.sparsity import read_sparsity
from harness.quantization.numerics.grids import CONVENTIONS, SEARCHES, search_reasons

# of weights that are stored as they are
DENSE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


def require_finite(weight: Tensor, name: str = "") -> None:
    """Raise MethodError when a matrix [out, in] holds NaN or infinity; name: of its linear, where the caller has several."""
    if not bool(torch.isfinite(weight).all()):
        raise MethodError(
            f"{name and f'{name}: '}the weight holds NaN or infinity; the model itself is damaged"
        )


def check_rotations(shapes: Shapes) -> list[str]:
    """Reasons why the residual stream and the values of a model cannot be rotated."""
    if not shapes.rotations or shapes.ends is None:
        return [f'family "{shapes.family}" does not allow rotations of its residual stream']
    reasons = []
    if shapes.experts:
        reasons.append("rotations inside experts are not supported; use a dense model")
    if any(pair.offset for pair in shapes.pairs):
        reasons.append("norms with an offset cannot be folded into the linears behind them")
    return reasons


def check_uniform(
    scheme: Scheme,
    shapes: Shapes,
    *,
    bits: Collection[int] = range(2, 9),
    convention: str | None = None,
    never_symmetric: str | None = None,
    signed: Collection[bool] = (False,),
) -> list[str]:
    """Reasons why some linear cannot be stored on uniform integer grids of these bit widths; overrides are looked at too.

    One reason per kind of problem, naming every layer it concerns. convention: also that this grid exists for the scheme.
    never_symmetric: the reason to refuse symmetric schemes for, where the method does.   signed: values of `signed_scales` that
    the method's symmetric grids can have.
    """
    reasons = _check_grids(
        scheme, shapes, bits, convention, formats=(), scales=PLAIN_SCALES, signed=signed
    )
    if never_symmetric is not None and any(
        weight.symmetric for weight, _ in _weight_schemes(scheme, shapes)
    ):
        reasons.append(f"{never_symmetric}; use symmetric=false")
    return reasons


def check_tables(
    scheme: Scheme, shapes: Shapes, *, bits: Collection[int] = range(2, 9)
) -> list[str]:
    """Reasons why some linear cannot have one table of 2^bits values per output row."""

    def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
        if weight.group_size != -1:
            yield f"there is one table per output row; use group_size=-1 instead of {weight.group_size}"
        if weight.bits in bits and 2 ** int(weight.bits) > linear.in_features:
            yield f"a table of {2 ** int(weight.bits)} values is longer than the row it stands for"

    return check_uniform(scheme, shapes, bits=bits) + refusals(scheme, shapes, reasons)


def check_grid(
    scheme: Scheme,
    shapes: Shapes,
    *,
    convention: str | None = None,
    signed: Collection[bool] = (False, True),
    search: str = "none",
) -> list[str]:
    """The same for methods that take their grids from `grids.Fitting`: integers of 2 to 8 bits and all of `number_formats`.

    search: also that these grids can be searched so (`grids.SEARCHES`).
    """
    reasons = _check_grids(
        scheme, shapes, range(2, 9), convention, formats=FORMATS, scales=SCALE_TYPES, signed=signed
    )
    for weight, _ in _weight_schemes(scheme, shapes) if not reasons else ():
        reasons += search_reasons(search, weight)
    return list(dict.fromkeys(reasons))


def check_columns(
    scheme: Scheme, shapes: Shapes, *, convention: str, search: str, scattered: bool
) -> list[str]:
    """`check_grid` for methods that round column by column. scattered: groups are columns that are not neighbours."""

    def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
        if weight.scale_dtype == DOUBLE_QUANTIZED and weight.group_size != -1:
            yield (
                "act_order scatters the columns of a group, and double_quantized scales need neighbouring columns; "
                "use static_groups=true"
            )

    found = check_grid(scheme, shapes, convention=convention, search=search)
    return found + (refusals(scheme, shapes, reasons) if scattered else [])


def require_search(scale_search: str, range_search: bool = False) -> None:
    """Raise ValueError unless the settings scale_search and range_search, which is older and means "range", name one search."""
    if scale_search not in SEARCHES:
        raise ValueError(f'no scale_search "{scale_search}"; known: {", ".join(SEARCHES)}')
    if range_search and scale_search not in ("none", "range"):
        raise ValueError(
            f"range_search is scale_search=range, and scale_search is {scale_search}; set range_search=false"
        )


def require_columns(
    grid: str, scale_search: str, block_size: int, *, range_search: bool = False, **damping: float
) -> None:
    """Raise ValueError for settings that no rounding of one column after the other takes.

    damping: one setting by its name, above 0.   block_size: columns between two products, at least 1.
    """
    if grid not in CONVENTIONS:
        raise ValueError(f'no grid "{grid}"; known: {", ".join(CONVENTIONS)}')
    require_search(scale_search, range_search)
    for name, value in damping.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")


def check_pruned(
    scheme: Scheme,
    shapes: Shapes,
    *,
    convention: str,
    search: str,
    block_size: int = 0,
    patterns: bool = True,
) -> list[str]:
    """Reasons why some linear cannot be pruned as the scheme says, and its survivors stored dense or on grids of `check_grid`.

    search: as there.
    block_size: columns that a method prunes together, which a pattern's length must divide; 0: none.   patterns: n:m is possible.
    """

    def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
        if not weight.sparsity:
            yield "no sparsity is stated; use a scheme that states one (w16s50, w4s50, w4s2of4, …)"
            return
        try:
            sparsity = read_sparsity(weight.sparsity)
        except ValueError as error:
            yield f'sparsity "{weight.sparsity}": {error}'
            return
        of, size = sparsity.of, weight.group_size
        if of and not patterns:
            yield "this setting prunes a share of each row, and no pattern; use a sparsity such as 0.5"
        if of and linear.in_features % of:
            yield f"{weight.sparsity} does not divide the inputs"
        if of and size > 0 and size % of:
            yield f"group size {size} is no multiple of the {of} of {weight.sparsity}"
        if of and block_size % of:
            yield f"block_size {block_size} is no multiple of the {of} of {weight.sparsity}"
        if not of and not sparsity.pruned_of(linear.in_features):
            yield f"a sparsity of {weight.sparsity} prunes not one weight of a row"
        if weight.format == "dense":
            if size != -1:
                yield f"survivors that are not rounded have no groups; use group_size=-1, not {size}"
            yield from dense_reasons(weight)

    found = refusals(scheme, shapes, reasons)
    for weight, linears in _weight_schemes(scheme, shapes):
        if weight.format != "dense" and weight.sparsity:
            some = dataclasses.replace(shapes, linears=tuple(linears))
            found += check_grid(Scheme("", weight), some, convention=convention, search=search)
    return list(dict.fromkeys(found))


def check_sparsity(rounding: str, prunes: bool, scheme: Scheme, shapes: Shapes) -> list[str]:
    """Reasons why a rounding that does not prune cannot have a scheme that states a sparsity. prunes: the rounding's fact.

    Named instead are those that do; for a rounding of differences from a base, those that prune differences.
    """
    sparse = [weight.sparsity for weight, _ in _weight_schemes(scheme, shapes) if weight.sparsity]
    if prunes or not sparse:
        return []
    known = plugins.find("rounding")
    of_differences = {
        name for name, facts in known.items() if BASE_WEIGHT in facts.get("needs", ())
    }
    pruning = [
        name
        for name, facts in known.items()
        if facts.get("prunes", False) and (name in of_differences) == (rounding in of_differences)
    ]
    return [
        f"the scheme states a sparsity ({', '.join(dict.fromkeys(sparse))}), and {rounding} does not prune; "
        f"use {', '.join(pruning)}"
    ]


def dense_reasons(weight: WeightScheme) -> Iterator[str]:
    """Reasons why weights cannot be stored as they are, in the type that scale_dtype names."""
    if weight.scale_dtype not in DENSE_BITS:
        yield f'no dtype "{weight.scale_dtype}"; known: {", ".join(DENSE_BITS)}'
    elif weight.bits != DENSE_BITS[weight.scale_dtype]:
        width = DENSE_BITS[weight.scale_dtype]
        yield f"{weight.scale_dtype} has {width} bits, not {weight.bits:g}"


def _check_grids(
    scheme: Scheme,
    shapes: Shapes,
    bits: Collection[int],
    convention: str | None,
    formats: Collection[str],
    scales: Collection[str],
    signed: Collection[bool],
) -> list[str]:
    widths = f"{min(bits)} to {max(bits)}" if len(bits) > 1 else str(min(bits))
    reasons: list[str] = []
    undivided: dict[int, dict[str, None]] = {}  # group size -> layers, in order, each once
    for weight, linears in _weight_schemes(scheme, shapes):
        if weight.format in formats:
            reasons += _check_format(weight, scales)
        elif weight.format != "int" and formats:
            reasons.append(unknown_name("number format", weight.format, ("int", *formats)))
            continue
        elif weight.format != "int":
            reasons.append(
                f'format "{weight.format}" is not an integer grid; use scheme.weight.format=int or a method made for it'
            )
            continue
        else:
            if weight.zero_point != "integer" and not formats:
                reasons.append(
                    "this method chooses zero points in its own way; leave scheme.weight.zero_point=integer"
                )
            elif weight.zero_point != "integer" and weight.symmetric:
                reasons.append(
                    "symmetric grids have no zero point to be float; use symmetric=false or zero_point=integer"
                )
            if weight.symmetric and weight.signed_scales not in signed:
                reasons.append(
                    "this method's symmetric grids have no scales below 0; leave scheme.weight.signed_scales=false"
                    if weight.signed_scales
                    else "this method's symmetric grids have scales of both signs; set scheme.weight.signed_scales=true, "
                    "as w4g128signed does, or use an asymmetric scheme"
                )
            if weight.bits not in bits:
                reasons.append(
                    f"{weight.bits:g} bits; this method rounds to whole widths of {widths}"
                )
            if weight.scale_dtype not in scales:
                reasons.append(f'no scale_dtype "{weight.scale_dtype}"; known: {", ".join(scales)}')
        if convention is not None and convention not in CONVENTIONS:
            reasons.append(f'no grid "{convention}"; known: {", ".join(CONVENTIONS)}')
        elif convention == "compressed" and weight.format == "int" and not weight.symmetric:
            reasons.append(
                'grid "compressed" is symmetric only; use a symmetric scheme or another grid'
            )
        size = weight.group_size
        if size != -1 and size < 2:
            reasons.append(
                f"group size {size}; use -1 for one scale per output channel, or 2 and more"
            )
        elif size != -1:
            for linear in linears:
                if linear.in_features % size:
                    undivided.setdefault(size, {})[f"{linear.name} ({linear.in_features})"] = None
    reasons += [
        f"group size {size} does not divide in_features of {', '.join(layers)}{_dividing(shapes)}"
        for size, layers in undivided.items()
    ]
    return list(dict.fromkeys(reasons))


def _dividing(shapes: Shapes) -> str:
    """Which usual group sizes fit every matrix of a model, as the end of a sentence."""
    widths = {linear.in_features for linear in shapes.linears}
    fitting = [size for size in (16, 32, 64, 128) if not any(width % size for width in widths)]
    named = " and ".join(map(str, fitting))
    verb = "divides" if len(fitting) == 1 else "divide"
    return f"; {named} {verb} all widths" if fitting else "; scale per row: a scheme without g"


def _check_format(weight: WeightScheme, scales: Collection[str]) -> Iterator[str]:
    """Reasons why a scheme contradicts what its format fixes."""
    name, fixed = weight.format, FORMATS[weight.format]
    if weight.zero_point != "integer":
        yield f"{name} has no zero points; leave scheme.weight.zero_point=integer"
    if weight.bits != fixed.bits:
        yield f"{name} has {fixed.bits} bits, not {weight.bits:g}; set scheme.weight.bits={fixed.bits}"
    if fixed.block is not None and weight.group_size != fixed.block:
        yield f"{name} has blocks of {fixed.block}, not group_size {weight.group_size}; set scheme.weight.group_size={fixed.block}"
    if fixed.scale_dtype is not None and weight.scale_dtype != fixed.scale_dtype:
        yield f"{name} has {fixed.scale_dtype} scales; set scheme.weight.scale_dtype={fixed.scale_dtype}, not {weight.scale_dtype}"
    elif fixed.scale_dtype is None and weight.scale_dtype not in (*scales, *fixed.more_scales):
        yield f'no scale_dtype "{weight.scale_dtype}"; known: {", ".join((*scales, *fixed.more_scales))}'


def _weight_schemes(
    scheme: Scheme, shapes: Shapes
) -> Iterator[tuple[WeightScheme, list[LinearShape]]]:
    """Every distinct weight scheme of the model with the linears that have it in some block."""
    per_block = any(override.blocks is not None for override in scheme.overrides)
    found: dict[WeightScheme, dict[str, LinearShape]] = {}
    for block in range(shapes.blocks if per_block else 1):
        for linear in shapes.linears:
            found.setdefault(scheme.weight_for(block, linear.name), {})[linear.name] = linear
    for weight, linears in found.items():
        yield weight, list(linears.values())


def refusals(
    scheme: Scheme, shapes: Shapes, reasons: Callable[[LinearShape, WeightScheme], Iterable[str]]
) -> list[str]:
    """Every reason that reasons(linear, its weight scheme) gives, once, with all the layers that it concerns.

    "group_size 48 does not divide the inputs: self_attn.q_proj [32 × 32], mlp.down_proj [32 × 64] (blocks 0, 3)"; blocks are
    named where overrides of the scheme make them differ.
    """
    found: dict[str, dict[LinearShape, list[int]]] = {}
    for block in range(shapes.blocks):
        for linear in shapes.linears:
            for reason in reasons(linear, scheme.weight_for(block, linear.name)):
                found.setdefault(reason, {}).setdefault(linear, []).append(block)
    listed = []
    for reason, layers in found.items():
        parts = []
        for linear, blocks in layers.items():
            some = (
                "" if len(blocks) == shapes.blocks else f" (blocks {', '.join(map(str, blocks))})"
            )
            parts.append(f"{linear.name} [{linear.out_features} × {linear.in_features}]{some}")
        listed.append(f"{reason}: {', '.join(parts)}")
    return listed
