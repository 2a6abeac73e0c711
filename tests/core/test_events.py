"""Events: what an exception becomes."""

from __future__ import annotations

import pytest

from harness.core.errors import HarnessError
from harness.core.events import failure


@pytest.mark.parametrize(
    "error,kind,reason",
    [
        (HarnessError("what, where\nmore"), "error", "what, where"),
        (ValueError("\nbad value\nmore"), "error", "ValueError: bad value"),
        (MemoryError(), "out_of_memory", "MemoryError: MemoryError"),
    ],
)
def test_an_exception_becomes_one_line_with_its_kind(
    error: Exception, kind: str, reason: str
) -> None:
    failed = failure(error, ("k",), "stage")
    assert (failed.kind, failed.reason) == (kind, reason)
    assert (failed.cell_keys, failed.stage) == (("k",), "stage")
    assert type(error).__name__ in failed.detail
