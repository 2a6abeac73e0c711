"""Delta-CoMe: a fine-tune as its base and the singular vectors of their difference, more bits for those of large singular values.

Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models (arXiv 2406.08903).
Δ = U S Vᵀ; the vectors are grouped by falling singular value, and each group is rounded by GPTQ at its own width, V first, then U
given the rounded V:

    V side    rows of V_gᵀ [k, n] with the second moment H of the layer's input
    U side    U_g [m, k] with H_U = M H Mᵀ, M = diag(S_g) V'_gᵀ: the second moment of y = M x, without another forward pass
    Δ'        Σ_g U'_g diag(S_g) V'_gᵀ

A plan is a list of (bits, columns) pairs; 0 columns in the last pair means what the budget leaves:
k = (bits · mn / (m + n) - Σ b k) / b_last, which is 968 for a 4096 × 4096 matrix at 1 bit, the authors' number.

Where we differ from the authors' code (thunlp/Delta-CoMe, Apache-2.0, whose GPTQ is missing from the repository; with that of
qwopqwop200/GPTQ-for-LLaMa, act_order and dynamic groups, it runs): H is that of the block as the fine-tune has it, where their code
calibrates group after group on a block without the later groups, and, by an exchange inside a loop, on the block's own output; the
last group follows each matrix's shape, where theirs has one number for all; singular vectors have canonical signs; columns with a
singular value of 0 are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import refusals
from harness.quantization.methods.deltas import (
    base_in,
    bits_for,
    budget,
    budget_reasons,
    change_of,
    on_base,
    shared_singular_vectors,
)
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.deltas import LowRankPart, LowRankWeight, singular_vectors
from harness.quantization.numerics.grids import SCALE_DTYPES
from harness.quantization.numerics.hessians import Factor
from harness.quantization.numerics.weights import DenseWeight, QuantizedWeight

WIDTHS = (16, 8, 4, 3, 2)
TOLERANCE = 0.05  # of a plan that states all columns against the scheme's bits, over the matrices of a block
Plan = Sequence[Sequence[int]]  # (bits, columns) pairs


class Rounding:
    """Singular vectors of the difference in groups of falling width."""

    version = 1  # raised with the version of `gptq`, which rounds both sides
    needs = ("base_weight", "hessian")
    stochastic = False
    activation_aware = False

    @dataclass(frozen=True)
    class Settings:
        """
        groups            (bits, columns) pairs in the order of falling singular values; 0 columns, in the last pair alone: what
                          the scheme's bits leave for the matrix
        groups_attention  the same for matrices of the attention; empty: groups
        groups_mlp        the same for all other matrices; empty: groups
        factor_dtype      of singular values, and of vectors before they are rounded: bfloat16, float16 or float32
        act_order, damping_fraction, block_size   of GPTQ, on both sides
        symmetric         grids without zero points
        sequential        a block's matrices in four steps, each seeing the rounded ones before it
        """

        groups: tuple[tuple[int, int], ...] = ((8, 2), (3, 32), (2, 0))
        groups_attention: tuple[tuple[int, int], ...] = ()
        groups_mlp: tuple[tuple[int, int], ...] = ()
        factor_dtype: str = "bfloat16"
        act_order: bool = True
        damping_fraction: float = 0.01
        block_size: int = 128
        symmetric: bool = False
        sequential: bool = True

        def __post_init__(self) -> None:
            for name in ("groups", "groups_attention", "groups_mlp"):
                _check_plan(name, getattr(self, name))
            if not self.groups:
                raise ValueError("groups is empty; state at least one pair of bits and columns")
            if self.factor_dtype not in SCALE_DTYPES:
                raise ValueError(
                    f'no factor_dtype "{self.factor_dtype}"; known: {", ".join(SCALE_DTYPES)}'
                )
            if not self.damping_fraction > 0:
                raise ValueError(f"damping_fraction is {self.damping_fraction}; it must be above 0")
            if self.block_size < 1:
                raise ValueError(f"block_size is {self.block_size}; it must be at least 1")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._gptq = plugins.build(
            "rounding",
            "gptq",
            {
                "damping_fraction": settings.damping_fraction,
                "block_size": settings.block_size,
                "act_order": settings.act_order,
            },
        )

    @property
    def sequential(self) -> bool:
        return self.settings.sequential

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """A budget (format "delta") that pays for the plan of every matrix, and groups that divide its inputs."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            wrong = list(budget_reasons(weight))
            yield from wrong
            if wrong:
                return
            size = weight.group_size
            if size != -1 and (size < 2 or linear.in_features % size):
                yield f"group_size {size} does not divide the inputs"
            if weight.scale_dtype not in SCALE_DTYPES:
                yield f'no scale_dtype "{weight.scale_dtype}"; known: {", ".join(SCALE_DTYPES)}'
            yield from self._plan_reasons(linear, weight)

        found = refusals(scheme, shapes, reasons)
        plans = [self._plan_of(each.name) for each in shapes.linears]
        if not found and all(plan[-1][1] for plan in plans):
            spent = sum(
                bits * columns * (each.out_features + each.in_features)
                for each, plan in zip(shapes.linears, plans, strict=True)
                for bits, columns in plan
            )
            stored = spent / sum(each.out_features * each.in_features for each in shapes.linears)
            if abs(stored / scheme.weight.bits - 1) > TOLERANCE:
                found.append(
                    f"the plan's codes take {stored:.3g} bits per weight and the scheme states {scheme.weight.bits:g}; "
                    f"set scheme.weight.bits={stored:.3g}, or 0 columns in the last pair"
                )
        return found

    def _plan_of(self, name: str) -> Plan:
        """The plan of a linear, with 0 for what the budget leaves."""
        own = self.settings
        return (own.groups_attention if "att" in name else own.groups_mlp) or own.groups

    def _plan_reasons(self, linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
        plan = self._plan_of(linear.name)
        most = min(linear.out_features, linear.in_features)
        fixed = sum(columns for _, columns in plan)
        if fixed > most or (not plan[-1][1] and fixed == most):
            yield f"the plan has {fixed} columns and more, and the matrix {most} singular values"
        elif not plan[-1][1] and columns_left(plan, weight.bits, linear) < 1:
            least = bits_for(sum(b * k for b, k in plan) + plan[-1][0], linear)
            yield (
                f"{weight.bits:g} bits leave no column of {plan[-1][0]} bits; use scheme.weight.bits={least:.3g} or more, "
                "or a plan with fewer columns (rounding.groups)"
            )

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """The base and both sides of every group. Peak memory: six copies of weight [out, in], four of H while it is factored."""
        base = base_in(evidence)
        assert evidence is not None
        return self._rounded(name, weight, base, scheme, evidence, rng)

    def round_unseen(
        self, name: str, weight: Tensor, scheme: WeightScheme, rng: Generator, base: Tensor
    ) -> QuantizedWeight:
        """Both sides of an expert that no token reached, rounded to nearest on the same grids."""
        return self._rounded(name, weight, base, scheme, None, rng)

    def _rounded(
        self,
        name: str,
        weight: Tensor,
        base: Tensor,
        scheme: WeightScheme,
        evidence: Evidence | None,
        rng: Generator,
    ) -> QuantizedWeight:
        rows, columns = weight.shape
        plan = filled(self._plan_of(name), scheme.bits, LinearShape(name, rows, columns, ""))
        rank = sum(count for _, count in plan)
        if evidence is None:
            left, sizes, right = singular_vectors(change_of(weight, base), rank)
        else:
            left, sizes, right = shared_singular_vectors(name, weight, evidence, rank)
        dtype = SCALE_DTYPES[self.settings.factor_dtype]
        left, sizes, right = (each.to(dtype).float() for each in (left, sizes, right))
        parts, start = [], 0
        for bits, count in plan:
            here = slice(start, start + count)
            kept = sizes[here] > 0  # a difference of lower rank has no more vectors
            start += count
            if bool(kept.any()):
                u, s, v = left[:, here][:, kept], sizes[here][kept], right[:, here][:, kept]
                parts.append(self._part(bits, u, s, v.T.contiguous(), scheme, evidence, rng))
        change = LowRankWeight(
            tuple(parts), (rows, columns), self.settings.factor_dtype, device=weight.device
        )
        return on_base(change, base)

    def _part(
        self,
        bits: int,
        left: Tensor,
        sizes: Tensor,
        right: Tensor,
        scheme: WeightScheme,
        evidence: Evidence | None,
        rng: Generator,
    ) -> LowRankPart:
        """One group: left [out, k], sizes [k], right [k, in]."""
        if bits == 16:
            dtype = SCALE_DTYPES[self.settings.factor_dtype]
            return LowRankPart(DenseWeight(left.to(dtype)), sizes, DenseWeight(right.to(dtype)))
        own = WeightScheme(
            "int", bits, scheme.group_size, self.settings.symmetric, scheme.scale_dtype
        )
        if evidence is None:
            rounded_right = self._gptq.round_layer("right", right, _Moment.none_of(right), own, rng)
            rounded_left = self._gptq.round_layer("left", left, _Moment.none_of(left), own, rng)
            return LowRankPart(rounded_left, sizes, rounded_right)
        rounded_right = self._gptq.round_layer("right", right, evidence, own, rng)
        through = sizes[:, None] * rounded_right.dequantize()  # M [k, in]
        moment = through @ evidence["hessian"] @ through.T
        moment = (moment + moment.T) / 2
        rounded_left = self._gptq.round_layer("left", left, _Moment(moment), own, rng)
        return LowRankPart(rounded_left, sizes, rounded_right)


class _Moment:
    """Evidence of an input that no layer has: its second moment H [k, k], and nothing else."""

    basis = "of singular vectors"
    tokens = 1

    def __init__(self, hessian: Tensor) -> None:
        self._hessian = hessian

    @classmethod
    def none_of(cls, matrix: Tensor) -> _Moment:
        """All inputs of a matrix [out, in] alike: GPTQ rounds each column to nearest."""
        return cls(torch.eye(matrix.shape[1], device=matrix.device))

    def __getitem__(self, statistic: str) -> Tensor:
        assert statistic == "hessian", statistic
        return self._hessian

    def once(self, key: object, compute: object) -> Factor:
        """Nothing is shared: every group of every matrix has a moment of its own."""
        assert callable(compute)
        found: Factor = compute()
        return found


def _check_plan(name: str, plan: Plan) -> None:
    for number, pair in enumerate(plan):
        if len(pair) != 2 or pair[0] not in WIDTHS:
            raise ValueError(
                f"{name}: {list(pair)} is no pair of bits ({', '.join(map(str, WIDTHS))}) and columns"
            )
        least = 0 if number == len(plan) - 1 else 1
        if pair[1] < least:
            raise ValueError(
                f"{name}: {list(pair)}: at least 1 column is expected; 0 stands for the rest, in the last pair alone"
            )


def columns_left(plan: Plan, bits: float, linear: LinearShape) -> int:
    """Columns of the plan's last width that a budget of `bits` per weight leaves; below 1 where it leaves none."""
    spent = sum(width * count for width, count in plan)
    left = int((budget(bits, linear) - spent) // plan[-1][0])
    most = min(linear.out_features, linear.in_features) - sum(count for _, count in plan)
    return min(left, most)


def filled(plan: Plan, bits: float, linear: LinearShape) -> list[tuple[int, int]]:
    """The plan with the columns of its last pair, where that says 0, as the budget gives them."""
    whole = [(width, count) for width, count in plan]
    if not whole[-1][1]:
        whole[-1] = whole[-1][0], max(0, columns_left(plan, bits, linear))
    return whole


__all__ = ["Rounding", "columns_left", "filled"]
