"""`harness table`: the tables of a sweep as text, kept until a result, a published table or the sweep changes."""

from __future__ import annotations

from collections.abc import Sequence

from harness.core.sweep import Sweep
from harness.data import kept
from harness.execution.outputs import results_stamp, tables_question
from harness.storage.store import Store


def table_text(sweep: Sweep, store: Store, names: Sequence[str], form: str) -> str:
    """The tables of these names in a format, one after the other."""

    def make() -> str:
        from harness.reporting.render import render
        from harness.reporting.tables import build

        now = store.snapshot(sweep.cells)
        records = [now.record(cell) for cell in sweep.cells]
        chosen = [each for each in sweep.shown_tables if each.name in names]
        return "\n".join(render(build(sweep, each, records, now), form) for each in chosen)

    stamp = results_stamp(sweep, store)
    if stamp is None:
        return make()
    question = [*tables_question(sweep, stamp), list(names), form]
    return str(kept.answered("table", question, [stamp], make))
