"""The state of a running sweep."""

from __future__ import annotations

from harness.storage.store import Store
from harness.storage.sweep_state import SweepState, is_running


def test_the_state_of_a_sweep(store: Store) -> None:
    state = SweepState(
        store, "study", {"k1": "demo · rtn · w4", "k2": "demo · gptq · w4"}, interval_seconds=0
    )
    state.update("k1", "quantizing", stage="block", step=1, steps=3)
    state.update("k2", "failed", reason="singular Hessian")
    read = store.sweep_state("study")
    assert read is not None and is_running(read) and store.sweep_names() == ["study"]
    assert read["cells"]["k1"] == {
        "title": "demo · rtn · w4",
        "state": "quantizing",
        "stage": "block",
        "step": 1,
        "steps": 3,
    }
    elsewhere = {**read, "owner": {**read["owner"], "host": "elsewhere"}}
    assert is_running(elsewhere) and not is_running(
        {**elsewhere, "updated": read["updated"] - 3600}
    )
    state.end()
    ended = store.sweep_state("study")
    assert ended is not None and not is_running(ended)
    assert store.sweep_state("other") is None
