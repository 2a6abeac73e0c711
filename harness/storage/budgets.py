"""What bit budgets chose, as the store holds it: the cells that they add to a sweep, and which budgets have work left.

runs/budgets/<sweep>/<budget>@<size>.json holds one choice:

    command        that runs the sweep
    key            of what it was made from (`core.budget.budget_key`); a file with another key counts as missing
    candidates     title, key, bits and divergence of each; `groups`, `costs` and `tables` (costs in bits, values of proposals)
    proposals      the choice of each table, with its bits and its divergence
    trials         every measured swap
    choice, bits   the result; `divergence` in nats per token, null where nothing was measured
    base           the candidate that gives the cell of the choice all but its method and scheme; cell_key: of that cell
    method, scheme those of a candidate, or with overrides
    exact          whether the cell's checkpoint has exactly the matrices that were measured; where not, `divergence_made` is that
                   of its checkpoint, once it was made
    verdict        the comparison with the uniform cell, once both have scores

runs/budgets/.measured/<key>.json holds every measured divergence, for a choice that was interrupted and for other sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from harness.core.budget import Budget, Size, budget_key
from harness.core.cell import Cell, Method, Scheme, cell_key, from_json, quantize_key
from harness.core.labels import with_variants
from harness.core.sweep import Sweep
from harness.storage.store import Store


def outcome(store: Store, sweep: str, budget: Budget, size: Size) -> dict[str, Any] | None:
    """The stored choice of one size; None where there is none, or it was made from something else."""
    content = store.budget(sweep, budget.name_of(size))
    return (
        content if content is not None and content.get("key") == budget_key(budget, size) else None
    )


def chosen_cell(content: Mapping[str, Any], budget: Budget) -> Cell:
    """The cell of a choice, with the evaluations of its candidates."""
    base = budget.candidates[content["base"]]
    if len(set(content["choice"])) == 1:
        return base
    used = (budget.candidates[candidate] for candidate in sorted(set(content["choice"])))
    return dataclasses.replace(
        base,
        method=from_json(Method, content["method"]),
        scheme=from_json(Scheme, content["scheme"]),
        calibration=base.calibration
        or next((cell.calibration for cell in used if cell.calibration is not None), None),
        variant="",
    )


def resolved(sweep: Sweep, store: Store) -> Sweep:
    """The sweep with the cells that its budgets have chosen so far, after all others."""
    cells = {cell_key(cell): cell for cell in sweep.cells}
    for budget, size in _sizes(sweep):
        content = outcome(store, sweep.name, budget, size)
        if content is not None:
            cell = chosen_cell(content, budget)
            cells.setdefault(cell_key(cell), cell)
    if len(cells) == len({cell_key(cell) for cell in sweep.cells}):
        return sweep
    known = {cell_key(cell) for cell in sweep.cells}
    added = [cell for key, cell in cells.items() if key not in known]
    return dataclasses.replace(sweep, cells=with_variants([*sweep.cells, *added]))


def unfinished(sweep: Sweep, store: Store) -> tuple[Budget, ...]:
    """Budgets that have something to choose or to measure now: their candidates are made, and a result is missing."""
    found = []
    for budget in sweep.budgets:
        made = [store.manifest(quantize_key(cell)) is not None for cell in budget.candidates]
        if all(made) and any(_is_open(store, sweep.name, budget, size) for size in budget.sizes):
            found.append(budget)
    return tuple(found)


def _is_open(store: Store, sweep: str, budget: Budget, size: Size) -> bool:
    content = outcome(store, sweep, budget, size)
    return content is None or needs_measuring(content, budget, store)


def needs_measuring(content: Mapping[str, Any], budget: Budget, store: Store) -> bool:
    """Whether the cell of a choice was rounded anew since, and its divergence is not known."""
    if content["exact"] or content["divergence"] is None or "divergence_made" in content:
        return False
    return store.manifest(quantize_key(chosen_cell(content, budget))) is not None


def budgets_of_cell(store: Store, cell: Cell) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(sweep, name, content) of every choice in the store whose cell this is."""
    key = cell_key(cell)
    for sweep, name in store.budget_names():
        content = store.budget(sweep, name)
        if content is not None and content.get("cell_key") == key:
            yield sweep, name, content


def _sizes(sweep: Sweep) -> Iterator[tuple[Budget, Size]]:
    for budget in sweep.budgets:
        for size in budget.sizes:
            yield budget, size
