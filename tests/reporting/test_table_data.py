"""Values of tables."""

from __future__ import annotations

import pytest

from harness.reporting.published import Printed
from harness.reporting.table_data import Value


def test_a_difference_needs_both_numbers() -> None:
    printed = Printed("6.1")
    value = Value(6.2, published=printed, published_number=float(printed))
    assert value.difference == pytest.approx(0.1)
    assert Value(6.2).difference is None and Value(published_number=6.1).difference is None
