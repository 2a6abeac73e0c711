"""`harness status`: counts, and failures with what a person can do about them."""

from __future__ import annotations

from collections.abc import Callable

from harness.cli.status import status
from harness.core.cell import cell_key
from harness.core.failures import FailureKind
from harness.core.sweep import Sweep
from harness.storage.store import Store


def test_a_failure_has_its_reason_and_its_remedy(demo_sweep: Callable[..., Sweep]) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4,w3", "baseline=false")
    store = Store(sweep.runtime.runs)
    store.open_cells(sweep.cells)
    first, second = map(cell_key, sweep.cells)
    kind = FailureKind.NO_NODE
    store.write_failure(first, {"stage": "evaluate", "kind": kind, "reason": kind.sentence})
    store.write_failure(second, {"stage": "evaluate", "kind": "error", "reason": "it broke"})
    text = status(store, sweep.name, sweep.cells)
    assert f"{kind.sentence}; {kind.remedy}    harness show {first[:8]}" in text
    assert f"it broke    harness show {second[:8]}" in text
    assert "0 of 2 cells done · 2 failed" in text
