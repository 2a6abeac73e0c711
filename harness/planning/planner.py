"""Makes the plan of a sweep before anything starts: done, missing and refused cells, passes, evaluations, time, memory and disk.

A plan reads no weights: shapes come from a model's config.json, keys from the cells, and finished work from the store. All reasons
why cells cannot run are collected before any is shown, so that all of them can be repaired at once.

Cells with one quantize_key share one checkpoint. Checkpoints of one model and one draw of calibration windows share a pass: each
block is read once for all of them, and cells with the same input stream share its forward pass and its statistics.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from harness.core.cell import Cell, Model, base_of, cell_key, quantize_key, score_key
from harness.core.sweep import Runtime, Sweep
from harness.core.units import size
from harness.data import hub
from harness.planning import surroundings
from harness.planning.checks import Checker
from harness.planning.estimates import History
from harness.planning.passes import make_passes, make_scorings
from harness.planning.plan import Pass, Plan, Refusal, Scoring
from harness.planning.resources import count_workers, over_quota
from harness.storage.store import Store


def make(sweep: Sweep, store: Store) -> Plan:
    """Plan a sweep against what the store already holds. Starts nothing, reads no weights.

    Raises StoreError where the store can hold nothing: a file stands in its place, or it cannot be written.
    """
    store.check_place()
    checker = Checker(sweep.runtime)
    refused = tuple(
        Refusal(cell, reasons) for cell in sweep.cells if (reasons := tuple(checker.reasons(cell)))
    )
    stopped = {id(refusal.cell) for refusal in refused}
    # what lacks data of the hub alone is costed too: `harness data pull` on another machine makes it run
    stopped -= {
        id(refusal.cell)
        for refusal in refused
        if all(map(hub.needs_network, refusal.reasons))
        and checker.shapes(refusal.cell.model) is not None
    }
    considered = [cell for cell in sweep.cells if id(cell) not in stopped]
    able = [cell for cell in considered if id(cell) not in {id(each.cell) for each in refused}]

    live, store = store, store.snapshot(considered)
    manifests = {key: store.manifest(key) for key in dict.fromkeys(map(quantize_key, considered))}
    unmade = [cell for cell in considered if manifests[quantize_key(cell)] is None]
    unscored = {
        id(cell): tuple(
            e for e in cell.evaluations if store.score(cell_key(cell), score_key(cell, e)) is None
        )
        for cell in considered
    }
    to_do = tuple(
        cell for cell in considered if manifests[quantize_key(cell)] is None or unscored[id(cell)]
    )
    pending = {id(cell) for cell in to_do}
    missing = tuple(cell for cell in able if id(cell) in pending)

    workers = count_workers(sweep.runtime)
    history = History(store if store is live else live.snapshot()) if to_do else None
    passes = tuple(make_passes(unmade, sweep, checker, history, workers)) if history else ()
    scorings = tuple(make_scorings(to_do, unscored, sweep, checker, history)) if history else ()
    used = store.used_bytes() if sweep.runtime.store.quota and passes else 0
    problems = (
        *_problems(sweep.runtime, store, passes, scorings, used),
        *(surroundings.problems(sweep.runtime) if missing else ()),
    )
    done = tuple(cell for cell in able if id(cell) not in pending)
    warned = history.warnings(unmade, scorings, checker) if history else []
    notes = dict.fromkeys(
        f"{cell.model.name}: {note}"
        for cell in unmade
        if not cell.method.is_baseline and (shapes := checker.shapes(cell.model)) is not None
        for note in shapes.notes
    )
    files = dict.fromkeys(
        f"{model.name}: {note}"
        for model in dict.fromkeys(each for cell in to_do for each in _models_of(cell))
        for note in checker.notes(model)
    )
    cautions = dict.fromkeys(
        f"{cell.model.name}: {warning}" for cell in unmade for warning in checker.warnings(cell)
    )
    own_bases = dict.fromkeys(
        f"{cell.model.name}: it is its own base, so every difference is zero"
        for cell in unmade
        if cell.method.needs_base and cell.model.base_digest == cell.model.digest
    )
    around = surroundings.notes(sweep.runtime, passes) if missing else ()
    notes = files | notes | cautions | own_bases | dict.fromkeys(around)
    checker.save()
    return Plan(
        sweep, done, missing, refused, passes, scorings, problems, workers, (*notes, *warned), used
    )


def _models_of(cell: Cell) -> Iterator[Model]:
    """The model of a cell, and the base that its method compares it with."""
    yield cell.model
    if cell.method.needs_base and (base := base_of(cell.model)) is not None:
        yield base


def within(plan: Plan, seconds: float) -> tuple[Plan, tuple[Cell, ...]]:
    """The part of a plan that fits into a wall time, and the cells left out. Order: `first:`, baselines, then the cheapest cells.

    A cell whose cost has neither record nor formula counts as free: it is started, and the run ends when the time is over.
    """
    costs: dict[str, float] = collections.defaultdict(float)
    for each in plan.passes:
        for cell in each.cells:
            costs[cell_key(cell)] += (each.seconds or 0.0) / len(each.cells)
    for scoring in plan.scorings:
        for cell, wanted in zip(scoring.cells, scoring.evaluations, strict=True):
            costs[cell_key(cell)] += (scoring.seconds or 0.0) * len(wanted) / max(1, scoring.count)
    left, room = set(), seconds * max(1, plan.workers)
    priority_tier = plan.sweep.priority_tier
    for cell in sorted(
        plan.missing,
        key=lambda c: (priority_tier(cell_key(c)), not c.method.is_baseline, costs[cell_key(c)]),
    ):
        room -= costs[cell_key(cell)]
        if room < 0:
            left.add(cell_key(cell))
    if not left:
        return plan, ()
    passes = []
    for each in plan.passes:
        cells = tuple(cell for cell in each.cells if cell_key(cell) not in left)
        fraction = len(cells) / len(each.cells)
        if cells:
            cost = None if each.seconds is None else each.seconds * fraction
            passes.append(
                dataclasses.replace(
                    each, cells=cells, seconds=cost, disk_bytes=int(each.disk_bytes * fraction)
                )
            )
    scorings = []
    for scoring in plan.scorings:
        pairs = [
            (c, e)
            for c, e in zip(scoring.cells, scoring.evaluations, strict=True)
            if cell_key(c) not in left
        ]
        if pairs:
            cost = (
                None
                if scoring.seconds is None
                else scoring.seconds * sum(len(e) for _, e in pairs) / max(1, scoring.count)
            )
            cells, evaluations = tuple(c for c, _ in pairs), tuple(e for _, e in pairs)
            scorings.append(
                dataclasses.replace(scoring, cells=cells, evaluations=evaluations, seconds=cost)
            )
    missing = tuple(cell for cell in plan.missing if cell_key(cell) not in left)
    smaller = dataclasses.replace(
        plan, missing=missing, passes=tuple(passes), scorings=tuple(scorings)
    )
    return smaller, tuple(cell for cell in plan.missing if cell_key(cell) in left)


def _problems(
    runtime: Runtime, store: Store, passes: Sequence[Pass], scorings: Sequence[Scoring], used: int
) -> tuple[str, ...]:
    if not passes and not scorings:
        return ()
    found = []
    need, free = sum(each.disk_bytes for each in passes), store.files.free_bytes(store.root)
    if passes and (sentence := over_quota(runtime, used, need)):
        found.append(sentence)
    if free is not None and need > free:
        found.append(
            f"the checkpoints take about {size(need)}; {runtime.runs} has {size(free)} free. Set `runs=` to a larger disk"
        )
    return tuple(found)
