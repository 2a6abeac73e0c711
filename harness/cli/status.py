"""`harness status`: the progress of a sweep."""

from __future__ import annotations

import time
from collections.abc import Iterable

from harness.core.cell import Cell, cell_key
from harness.core.failures import with_remedy
from harness.execution.coordination import active_drivers
from harness.storage.store import Store
from harness.storage.sweep_state import is_running


def status(store: Store, name: str, cells: Iterable[Cell]) -> str:
    """The progress of a sweep: a count per state, the failures with their reasons and remedies, and the drivers that run it."""
    state = store.sweep_state(name) or {}
    running = bool(state) and is_running(state)
    lines, counts = [], {"done": 0, "partly": 0, "waiting": 0, "failed": 0}
    for cell in cells:
        record, now = store.record(cell), state.get("cells", {}).get(cell_key(cell), {})
        if record.complete:
            counts["done"] += 1
            continue
        if record.failures:
            kind = "failed"
            last = record.failures[-1]
            reason = with_remedy(last.get("reason", ""), last.get("kind", ""))
            lines.append(f"FAIL    {cell.title}    {reason}    harness show {record.cell_key[:8]}")
        else:
            kind = "partly" if record.manifest is not None or record.scores else "waiting"
        if running and now.get("state") in ("quantizing", "evaluating"):
            step = (
                f"{now['stage']} {now['step']}/{now['steps']}" if now.get("stage") else now["state"]
            )
            lines.append(f"now     {cell.title}    {step}")
        counts[kind] += 1
    total = sum(counts.values())
    words = [f"{counts['done']} of {total} cells done"] + [
        f"{n} {kind}" for kind, n in counts.items() if n and kind != "done"
    ]
    if running:
        since = time.strftime("%H:%M:%S", time.localtime(state["started"]))
        words.append(f"running since {since} (process {state['owner']['pid']})")
    for each in active_drivers(store):
        if each["sweep"] == name and (each["priority"] or each["behind"]):
            waits = f", waiting for {each['behind']}" if each["behind"] else ""
            lines.append(
                f"order   process {each['owner']['pid']}: priority {each['priority']}{waits}"
            )
    return "\n".join([f"status  {name}: {' · '.join(words)}", *lines])
