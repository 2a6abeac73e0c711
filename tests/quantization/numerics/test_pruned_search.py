"""The pruned search finds what adding up every sum finds, and leaves losers early."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from harness.quantization.numerics.pruned_search import first_least

TERM = st.one_of(
    st.floats(0, 1e3),
    st.sampled_from((0.0, 1.0, 1e-300, 1e300, math.inf, math.nan)),
    st.integers(0, 3).map(float),  # many ties
)


@settings(max_examples=400, deadline=None)
@given(
    table=st.integers(1, 6).flatmap(
        lambda width: st.lists(
            st.lists(TERM, min_size=width, max_size=width), min_size=1, max_size=8
        )
    ),
    tried=st.integers(1, 7),
    divisor=st.sampled_from((1.0, 3.0, 1e6)),
)
def test_the_winner_is_that_of_the_plain_search(
    table: list[list[float]], tried: int, divisor: float
) -> None:
    best, lowest, all_values = None, math.inf, []
    for index, row in enumerate(table):
        total = 0.0
        for term in row:
            total += term
        all_values.append(total / divisor)
        if all_values[-1] < lowest:
            best, lowest = index, all_values[-1]
    found = first_least(
        len(table), lambda c, start: iter(table[c][start:]), divisor, tried=tried, complete=(0,)
    )
    assert found.index == best
    assert 0 in found.values and (best is None or best in found.values)
    for index, value in found.values.items():
        assert value == all_values[index] or (math.isnan(value) and math.isnan(all_values[index]))


def test_what_has_lost_is_not_added_up() -> None:
    asked: list[tuple[int, int]] = []

    def terms(candidate: int, start: int) -> Iterator[float]:
        for number in range(start, 100):
            asked.append((candidate, number))
            yield 1.0 + 9 * abs(candidate - 6)

    found = first_least(10, terms, 100, tried=5)
    assert found.index == 6 and found.values == {6: 1.0}
    assert len(asked) < 10 * 5 + 95 + 9 * 15  # tried, the winner, and as far as losers go
    assert sum(candidate == 0 for candidate, _ in asked) == 5


def test_of_equal_candidates_the_first_wins() -> None:
    found = first_least(4, lambda c, start: iter([2.0, 1.0][start:]), 3, tried=1)
    assert found.index == 0
