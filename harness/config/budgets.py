"""The budgets that a sweep file states: their candidates, one budget per model and draw of calibration windows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from harness.config.context import Context
from harness.config.sweep_file import BudgetGrid
from harness.config.typed import typed
from harness.core.budget import PROPOSALS, Accept, Budget, Proposal, Size, Together
from harness.core.cell import Calibration, Cell, Evaluation, to_json
from harness.core.errors import ConfigError, HarnessError, unknown_name
from harness.core.labels import with_variants
from harness.core.units import bytes_of

FEWEST, MOST = 2, 8  # candidates
Candidate = tuple[Cell, Calibration | None]


@dataclass(frozen=True)
class Entry:
    """The keys of an entry of `budgets` besides `of`. bits and bytes: one or several; bytes as text, "1.2GB".

    propose empty: every table that the candidates allow.
    """

    name: str
    bits: tuple[Annotated[float, Ge(0)], ...] = ()
    bytes: tuple[str, ...] = ()
    together: Together = "serving"
    propose: tuple[Proposal, ...] = ()
    trials: Annotated[int, Ge(0)] = 64
    windows: Annotated[int, Ge(1)] = 8
    floor: bool = True
    accept: Accept = field(default_factory=Accept)


def read_budgets(
    context: Context,
    wanted: Sequence[tuple[BudgetGrid, Sequence[Candidate]]],
    evaluations: Sequence[Evaluation],
) -> tuple[Budget, ...]:
    """The budgets of a sweep file, with the candidates that each entry's `of` gave; errors go to the context's problems."""
    found: list[Budget] = []
    for grid, candidates in wanted:
        with context.problems.collect():
            found += _read(context, grid, candidates, evaluations)
    names = [budget.name for budget in found]
    for name in sorted({name for name in names if names.count(name) > 1}):
        context.problems.add(f"{context.file.where}: two budgets are called {name}")
    return tuple(found)


def budgets_of(
    entry: Entry, candidates: Sequence[Candidate], where: str, evaluations: Sequence[Evaluation]
) -> list[Budget]:
    """One budget for each model and draw of calibration windows. Raises ConfigError with every problem."""
    sizes = sizes_of(entry, where)
    known = [evaluation.name for evaluation in evaluations]
    if entry.accept.evaluation and entry.accept.evaluation not in known:
        raise ConfigError(
            unknown_name("evaluation", entry.accept.evaluation, known, f"{where}.accept")
        )
    sets: dict[Any, list[Candidate]] = {}
    for cell, calibration in candidates:
        sets.setdefault(_set_of(cell, calibration), []).append((cell, calibration))
    several = with_variants(
        [dataclasses.replace(members[0][0], variant="") for members in sets.values()]
    )
    made = []
    problems: list[str] = []
    for first, members in zip(several, sets.values(), strict=True):
        words = [entry.name]
        if len({cell.model.name for cell in several}) > 1:
            words.append(first.model.name)
        if len(sets) > 1 and first.variant:
            words.append(re.sub(r"[^\w.]+", "-", first.variant))
        cells = tuple(cell for cell, _ in members)
        if not FEWEST <= len(cells) <= MOST:
            listed = ", ".join(cell.title for cell in cells)
            problems.append(
                f"{where}: {len(cells)} candidates ({listed}); {FEWEST} to {MOST} are expected that differ in scheme.weight alone "
                "or in their rounding"
            )
            continue
        differences = [f"{where}: {each}" for each in _differences(cells)]
        if differences:
            problems += differences
            continue
        made.append(
            Budget(
                ".".join(words),
                cells,
                sizes,
                members[0][1],
                entry.together,
                entry.propose or _proposals(cells),
                entry.trials,
                entry.windows,
                entry.floor,
                entry.accept,
            )
        )
    if not candidates:
        problems.append(f"{where}: no candidates; a skip rule leaves all of them out")
    if problems:
        raise ConfigError("\n".join(problems))
    return made


def sizes_of(entry: Entry, where: str) -> tuple[Size, ...]:
    """The sizes that an entry asks for. Raises ConfigError where there is none, or both kinds."""
    if bool(entry.bits) == bool(entry.bytes):
        raise ConfigError(
            f"{where}: either bits (stored bits per weight, 3.2) or bytes (of the quantized matrices, 1.2GB) is expected"
        )
    try:
        sizes = tuple(Size(bits=bits) for bits in entry.bits) + tuple(
            Size(bytes=bytes_of(text, f"{where}.bytes")) for text in entry.bytes
        )
    except HarnessError as error:
        raise ConfigError(str(error)) from error
    if any(not (size.bits or size.bytes) for size in sizes):
        raise ConfigError(f"{where}: a size above 0 is expected")
    return tuple(dict.fromkeys(sizes))


def _read(
    context: Context,
    grid: BudgetGrid,
    candidates: Sequence[Candidate],
    evaluations: Sequence[Evaluation],
) -> list[Budget]:
    content = dict(grid.content)
    if "bytes" in content:
        given = content["bytes"] if isinstance(content["bytes"], list) else [content["bytes"]]
        content["bytes"] = [str(each) for each in given]
    entry = typed(Entry, content, grid.where, context.problems)
    if entry is None:
        return []
    if not re.fullmatch(r"\w[\w.-]*", entry.name):
        raise ConfigError(
            f'{grid.where}: name "{entry.name}": it becomes a file name and a part of scheme names; letters, digits, . _ - only'
        )
    replaced = context.edits.evaluations is not None
    if replaced and entry.accept.evaluation not in {each.name for each in evaluations}:
        entry = dataclasses.replace(entry, accept=dataclasses.replace(entry.accept, evaluation=""))
    return budgets_of(entry, candidates, grid.where, evaluations)


def _set_of(cell: Cell, calibration: Calibration | None) -> Any:
    """What tells budgets apart: with several models or draws of windows there is one budget for each."""
    return (cell.model, calibration, cell.inputs, cell.seed)


def _differences(cells: Sequence[Cell]) -> list[str]:
    """What candidates differ in besides their weight schemes and roundings, or have that a budget does not mix."""
    facts: dict[str, Callable[[Cell], Any]] = {
        "transform": lambda cell: cell.method.transform,
        "activation scheme": lambda cell: cell.scheme.activation,
        "KV scheme": lambda cell: cell.scheme.kv,
        "overrides of activations": lambda cell: [
            dataclasses.replace(override, weight=())
            for override in cell.scheme.overrides
            if override.activation
        ],
    }
    found = []
    for name, of in facts.items():
        if any(of(cell) != of(cells[0]) for cell in cells):
            shown = "; ".join(f"{cell.title}: {_shown(of(cell))}" for cell in cells)
            found.append(f"candidates differ in their {name} ({shown})")
    tuned = [cell.title for cell in cells if cell.method.tuning is not None]
    if tuned:
        found.append(
            f"candidates are tuned ({', '.join(tuned)}), and a tuning trains all matrices together"
        )
    return found


def _shown(value: Any) -> str:
    return str(getattr(value, "name", None) or (to_json(value) if value else "none"))


def _proposals(cells: Sequence[Cell]) -> tuple[Proposal, ...]:
    """The tables that candidates allow: output errors where every rounding reads Hessians, gradients where no transform is."""
    found: list[Proposal] = []
    for name in PROPOSALS:
        if name == "output_error" and not all("hessian" in cell.method.needs for cell in cells):
            continue
        if name == "fisher" and any(cell.method.transform is not None for cell in cells):
            continue
        found.append(name)  # type: ignore[arg-type]
    return tuple(found)
