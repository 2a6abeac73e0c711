"""The least of several sums of terms that are never negative, without adding up those that have already lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Least:
    """The outcome of a search.

    index   the candidate with the least value, the first of equal ones; None when no value is finite
    values  by candidate, of those that were added up to the end: the index and `complete` among them
    """

    index: int | None
    values: dict[int, float]


def first_least(
    candidates: int,
    terms: Callable[[int, int], Iterator[float]],
    divisor: float,
    *,
    tried: int,
    complete: Collection[int] = (),
) -> Least:
    """The candidate whose mean, sum of terms / divisor, is least: the one that adding up all sums would find, to the bit.

    terms(candidate, start) yields the candidate's terms from number `start` on, each at least 0, as many for all candidates.
    The first `tried` terms of every candidate say in which order to go on, most promising first. A candidate is left as soon as
    its partial sum cannot win any more: sums in floating point never fall when terms that are not negative are added. NaN and
    infinity never win. Candidates in `complete` are added up whatever they are.
    """
    begun: list[float] = []
    for candidate in range(candidates):
        total = 0.0
        for _, term in zip(range(tried), terms(candidate, 0), strict=False):
            total += term
        begun.append(total)
    values: dict[int, float] = {}
    best: int | None = None

    def can_win(total: float, candidate: int) -> bool:
        value = total / divisor
        if best is None:
            return value < float("inf")
        return value < values[best] or (value == values[best] and candidate < best)

    def promise(candidate: int) -> tuple[bool, float, int]:
        return not begun[candidate] < float("inf"), begun[candidate], candidate

    for candidate in sorted(range(candidates), key=promise):
        total, needed = begun[candidate], candidate in complete
        if not (needed or can_win(total, candidate)):
            continue
        for term in terms(candidate, tried):
            total += term
            if not (needed or can_win(total, candidate)):
                break
        else:
            values[candidate] = total / divisor
            if can_win(total, candidate):
                best = candidate
    return Least(best, values)
