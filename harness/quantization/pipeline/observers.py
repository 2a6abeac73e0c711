"""Calibration statistics of a linear's input, accumulated sequence by sequence in float32, in a fixed order.

A `Collector` gathers the statistics of one group of linears with one input; an `InputEvidence` gives a method those that it needs.
Linears of a group and cells of one stream share the statistics and what was computed from them once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.core.errors import MethodError
from harness.quantization.numerics.hessians import accumulate_cross, accumulate_hessian

T = TypeVar("T")
OF_INPUTS = (
    "hessian",
    "cross",
    "mean",
    "square_mean",
    "abs_mean",
    "abs_max",
    "abs_max_per_sequence",
    "inputs",
)


@dataclass
class GroupStatistics:
    """Statistics of one input. memo: what methods computed from them once; finite: no input held NaN or infinity."""

    group: str
    tokens: int
    finite: bool
    values: dict[str, Tensor]
    memo: dict[Hashable, Any] = field(default_factory=dict)
    linear_memo: dict[str, dict[Hashable, Any]] = field(default_factory=dict)


Statistics = dict[str, GroupStatistics]  # by group


class Collector:
    """Accumulates statistics of one group's input. Peak memory: one Hessian, and all inputs where a method keeps them."""

    def __init__(
        self, group: str, needs: Collection[str], sequences: int, storage: torch.device
    ) -> None:
        self.group, self.needs, self.sequences, self.storage = (
            group,
            frozenset(needs),
            sequences,
            storage,
        )
        self.tokens, self.finite = 0, True
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}
        self._width = 0

    def add(self, sequence: int, inputs: Tensor, original: Tensor | None = None) -> None:
        """One sequence's input [..., in]; the tokens of an expert may be none.

        original: the same tokens' input in the full-precision model, for "cross"; None where it is this input. Where it holds NaN
        or infinity so does "cross", and nothing else: methods without "cross" get the same with it and without it.
        """
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        self._width = x.shape[1]
        if x.shape[0] == 0:
            return
        self.finite = self.finite and bool(torch.isfinite(x).all())
        if "hessian" in self.needs:
            hessian = self._sums.setdefault(
                "hessian", torch.zeros(x.shape[1], x.shape[1], device=x.device)
            )
            accumulate_hessian(hessian, x, self.tokens)
        if "cross" in self.needs:
            full = x if original is None else original.reshape(-1, original.shape[-1]).float()
            cross = self._sums.setdefault(
                "cross", torch.zeros(x.shape[1], x.shape[1], device=x.device)
            )
            accumulate_cross(cross, full, x, self.tokens)
        if "mean" in self.needs:
            self._add("mean", x.sum(0))
        # not the diagonal of a Hessian: a cell gets the same bytes whatever others in its pass need
        if "square_mean" in self.needs:
            self._add("square_mean", x.square().sum(0))
        if self.needs & {"abs_mean", "abs_max", "abs_max_per_sequence"}:
            magnitude = x.abs()
            if "abs_mean" in self.needs:
                self._add("abs_mean", magnitude.sum(0))
            self._maxima[sequence] = magnitude.amax(0)
        if "inputs" in self.needs:
            self._inputs[sequence] = inputs.detach().reshape(x.shape).to(self.storage, copy=True)
        self.tokens += x.shape[0]

    def finish(self) -> GroupStatistics:
        """The statistics; empty when not one token arrived (an expert that was never chosen)."""
        values: dict[str, Tensor] = {}
        if self.tokens:
            values |= {
                name: total if name in ("hessian", "cross") else total / self.tokens
                for name, total in self._sums.items()
            }
        if self._maxima:
            empty = torch.zeros_like(next(iter(self._maxima.values())))
            rows = torch.stack(
                [self._maxima.get(sequence, empty) for sequence in range(self.sequences)]
            )
            values |= {"abs_max": rows.amax(0), "abs_max_per_sequence": rows}
        if (
            self._inputs
            and len({x.shape for x in self._inputs.values()}) == 1
            and len(self._inputs) == self.sequences
        ):
            values["inputs"] = torch.stack(
                [self._inputs[sequence] for sequence in range(self.sequences)]
            )
        elif self._inputs:  # an expert's tokens differ in number: one long sequence
            values["inputs"] = torch.cat(
                [self._inputs[sequence] for sequence in sorted(self._inputs)]
            )[None]
        return GroupStatistics(self.group, self.tokens, self.finite, values)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value


class InputEvidence:
    """Evidence of one linear, or of all linears of a group, for one cell: the statistics that its method needs, and no other."""

    def __init__(
        self,
        statistics: GroupStatistics,
        needs: Collection[str],
        basis: str,
        linear: str | None = None,
        more: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        self.basis = basis
        self.tokens = statistics.tokens
        self._statistics, self._needs, self._more = statistics, frozenset(needs), dict(more or {})
        self._memo = (
            statistics.memo if linear is None else statistics.linear_memo.setdefault(linear, {})
        )

    def __getitem__(self, statistic: str) -> Tensor:
        if statistic not in self._needs:
            raise KeyError(
                f'"{statistic}" is not among the needs of this method: {", ".join(sorted(self._needs)) or "none"}'
            )
        if statistic in self._more:
            return self._more[statistic]()
        if not self._statistics.finite:
            raise MethodError(
                f'the calibration inputs of "{self._statistics.group}" hold NaN or infinity; load the model in a wider dtype '
                "(model.dtype=float32), use other calibration text, or more bits in the blocks before"
            )
        if not self._statistics.tokens:
            raise MethodError(
                f'no calibration token reached "{self._statistics.group}" (an expert that was never chosen); '
                "use more calibration samples"
            )
        return self._statistics.values[statistic]

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]
