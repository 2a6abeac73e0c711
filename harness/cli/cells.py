"""Finding cells by what people call them: a key's first digits, or a sweep and the names of a cell's parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from harness.cli.arguments import load
from harness.core.cell import Cell, cell_key
from harness.core.errors import ConfigError, unknown_name
from harness.storage.store import Store

SHOWN = 40  # cells in a list
KEY = re.compile(r"[0-9a-f]{3,64}")


def find_cells(words: Sequence[str], runs: str) -> tuple[Store, list[tuple[str, str, Cell | None]]]:
    """The store, and (key, title, cell or None) of the cells that the words name; all cells of the store where there are none.

    words: the first digits of a key; or a sweep (its name, its file, or the name of a grid in the store), then names of model,
    method, scheme or variant that the cell has, and overrides. Raises ConfigError where no cell fits.
    """
    store = Store(runs or "runs")
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if not words:
        return store, _of_store(store)
    if not names:
        return _of_sweep(None, overrides, (), runs)
    first, *parts = names
    if not parts and KEY.fullmatch(first) and any(k.startswith(first) for k in store.cell_keys()):
        key = store.find(first)
        cell = store.cell(key)
        return store, [(key, cell.title if cell is not None else "", cell)]
    from harness.config.locations import config_files

    if first in config_files("sweeps") or first.endswith((".yaml", ".yml")):
        return _of_sweep(first, overrides, parts, runs)
    state = store.sweep_state(first) if first in store.sweep_names() else None
    if state is not None:
        found = [(key, str(each["title"])) for key, each in state["cells"].items()]
        return store, [(k, t, store.cell(k)) for k, t in _fitting(found, parts, first)]
    if not parts and KEY.fullmatch(first):
        store.find(first)  # raises with the keys that there are
    known = [*config_files("sweeps"), *store.sweep_names()]
    raise ConfigError(
        f"{unknown_name('sweep', first, known, command='harness list sweeps')} "
        f"`harness show` lists the cells of {store.place}."
    )


def list_text(found: Sequence[tuple[str, str, Cell | None]], store: Store) -> str:
    """One line per cell: the digits of its key, how far it is, its title."""
    lines = [f"{key[:12]}  {_state(cell, store):<8}{title}" for key, title, cell in found[:SHOWN]]
    more = len(found) - SHOWN
    return "\n".join(lines + ([f"… and {more} more; --json lists all"] if more > 0 else []))


def list_facts(found: Sequence[tuple[str, str, Cell | None]], store: Store) -> list[dict[str, Any]]:
    """The same as JSON, of all cells."""
    return [{"key": k, "title": t, "state": _state(c, store)} for k, t, c in found]


def _state(cell: Cell | None, store: Store) -> str:
    if cell is None:
        return "waiting"
    record = store.record(cell)
    if record.complete:
        return "done"
    return "failed" if record.failures else "partly" if record.manifest else "waiting"


def _of_store(store: Store) -> list[tuple[str, str, Cell | None]]:
    found = [(key, store.cell(key)) for key in store.cell_keys()]
    named = [
        (key, cell.title if cell is not None else "(cell.json is missing)", cell)
        for key, cell in found
    ]
    return sorted(named, key=lambda each: each[1])


def _of_sweep(
    name: str | None, overrides: Sequence[str], parts: Sequence[str], runs: str
) -> tuple[Store, list[tuple[str, str, Cell | None]]]:
    sweep, store = load(name, overrides, runs)
    by_key = {cell_key(cell): cell for cell in sweep.cells}
    titles = [(key, cell.title) for key, cell in by_key.items()]
    chosen = _fitting(titles, parts, sweep.name)
    return store, [(key, title, by_key[key]) for key, title in chosen]


def _fitting(
    found: Sequence[tuple[str, str]], parts: Sequence[str], sweep: str
) -> list[tuple[str, str]]:
    """The cells whose titles have all these parts. Raises ConfigError with the parts that exist where none has."""
    chosen = [each for each in found if set(parts) <= set(each[1].split(" · "))]
    if not chosen:
        known = sorted({part for _, title in found for part in title.split(" · ")})
        wrong = [part for part in parts if part not in known]
        raise ConfigError(
            f"sweep {sweep} has no cell of {' '.join(wrong or parts)}; its cells are made of {', '.join(known)}"
        )
    return chosen
