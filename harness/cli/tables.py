"""`harness table`: the tables of a sweep as text, kept until a result, a published table or the sweep changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from harness.core.sweep import Sweep
from harness.data import kept
from harness.execution.outputs import results_stamp, tables_question
from harness.storage.json_files import json_text
from harness.storage.store import Store


def table_text(sweep: Sweep, store: Store, names: Sequence[str], form: str) -> str:
    """The tables of these names in a format, one after the other; "json" is a list of them with every value and its interval."""

    def make() -> str:
        from harness.reporting.render import render
        from harness.reporting.tables import build

        now = store.snapshot(sweep.cells)
        records = [now.record(cell) for cell in sweep.cells]
        chosen = [each for each in sweep.shown_tables if each.name in names]
        if form == "json":
            return json_text([asdict(build(sweep, each, records, now)) for each in chosen])
        return "\n".join(render(build(sweep, each, records, now), form) for each in chosen)

    stamp = results_stamp(sweep, store)
    if stamp is None:
        return make()
    question = [*tables_question(sweep, stamp), list(names), form]
    return str(kept.answered("table", question, [stamp], make))
