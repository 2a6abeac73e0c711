"""Shell completion: names of sweeps, keys and values of overrides, keys of cells, export formats."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterator

from harness.config import axes

VALUES = tuple(axes.GROUPS.values())  # keys whose values are the files of conf/<key>/
GROUPS = ("sweeps", *axes.GROUPS, "evaluators")
WITHOUT_YAML = [
    ("lm_eval:", "any task of lm-eval by its name"),
    ("text:", "the perplexity of a text file"),
]
COMPUTED = ("name", "digest", "settings")  # fields that nobody sets by an override


def _fields() -> dict[str, type]:
    """Key -> the dataclass whose fields follow it after a dot. Imported on use: every command loads this module."""
    from harness.core.cell import Calibration
    from harness.core.sweep import Cluster, StoreLimits, Tracking

    return {
        "calibration": Calibration,
        "cluster": Cluster,
        "tracking": Tracking,
        "store": StoreLimits,
    }


def keys() -> list[str]:
    """Keys that an override may set, without those of plugins and of single evaluations."""
    from harness.core.sweep import Runtime

    own = {key for key in VALUES if key != "evaluation"}
    runtime = [field.name for field in dataclasses.fields(Runtime) if field.name != "data_root"]
    plain = [*axes.AXES, "evaluations", "evaluations.limit", "baseline", "data.root", *runtime]
    dotted = [
        f"{key}.{field.name}"
        for key, kind in _fields().items()
        for field in dataclasses.fields(kind)
        if field.name not in COMPUTED
    ]
    return list(dict.fromkeys([*plain, *own.difference(plain), *dotted]))


def values_of(key: str) -> list[tuple[str, str]]:
    """(value, title) pairs that a key takes: names of conf/, choices of a field, true and false; empty where any value fits."""
    from harness.config.locations import list_names
    from harness.config.typed import hints_of
    from harness.core.sweep import Runtime

    if key == "evaluations" or key in VALUES:
        group = "evaluation" if key == "evaluations" else key
        entries = [(entry.name, entry.title) for entry in list_names(group)]
        return entries + (WITHOUT_YAML if group == "evaluation" else [])
    if key == "inputs":
        return [(name, "") for name in axes.INPUTS]
    if key == "baseline":
        return [("true", ""), ("false", "")]
    head, _, rest = key.partition(".")
    kind = _fields().get(head) if rest else Runtime
    hint = hints_of(kind).get(rest or head) if kind is not None else None
    if hint is bool:
        return [("true", ""), ("false", "")]
    return [(name, "") for name in typing.get_args(hint) if isinstance(name, str)]


def complete_sweep(incomplete: str) -> Iterator[tuple[str, str]]:
    """Names of sweeps and, as the first word may be one too, overrides."""
    from harness.config.locations import list_names

    yield from (
        (entry.name, entry.title)
        for entry in list_names("sweeps")
        if entry.name.startswith(incomplete)
    )
    yield from complete_override(incomplete)


def complete_override(incomplete: str) -> Iterator[tuple[str, str]]:
    """Keys of overrides, with a leading "+" if one was typed; after "=" and after each comma of a list, the values of the key."""
    broken = _broken_at_equals()
    if broken is not None:
        whole = complete_words("=".join(broken))
        yield from ((word.partition("=")[2], title) for word, title in whole)
    else:
        yield from complete_words(incomplete)


def complete_words(incomplete: str) -> Iterator[tuple[str, str]]:
    """The same for a word that no shell has broken."""
    key, equals, value = incomplete.partition("=")
    plus = "+" if key.startswith("+") else ""
    key = key.removeprefix("+")
    if not equals:
        yield from ((f"{plus}{name}=", "") for name in keys() if name.startswith(key))
        return
    chosen, comma, last = value.rpartition(",")
    opened = "[" if not chosen and last.startswith("[") else ""
    taken = chosen.lstrip("[").split(",")
    yield from (
        (f"{plus}{key}={chosen}{comma}{opened}{name}", title)
        for name, title in values_of(key)
        if name.startswith(last.removeprefix(opened)) and name not in taken
    )


def _broken_at_equals() -> tuple[str, str] | None:
    """(key, what stands behind its "="), where bash has broken the word that is completed at "="; else None.

    bash breaks words at "=" by default, passes them in COMP_WORDS, and wants back what follows the "=" alone.
    """
    words, place = os.environ.get("COMP_WORDS", "").split(), os.environ.get("COMP_CWORD", "")
    if not place.isdigit() or not 0 < int(place) <= len(words):
        return None
    *before, current = [*words, ""][: int(place) + 1]
    if current == "=":
        return before[-1], ""
    return (before[-2], current) if len(before) > 1 and before[-1] == "=" else None


def complete_group(incomplete: str) -> list[str]:
    """Groups of `harness list`."""
    return [group for group in GROUPS if group.startswith(incomplete)]


def complete_key(incomplete: str) -> Iterator[tuple[str, str]]:
    """Cells in ./runs, by the first digits of their keys, and names of sweeps."""
    from harness.config.locations import list_names
    from harness.storage.store import Store

    for entry in list_names("sweeps"):
        if entry.name.startswith(incomplete):
            yield entry.name, entry.title

    store = Store("runs")
    for key in store.cell_keys():
        cell = store.cell(key) if key.startswith(incomplete) else None
        if cell is not None:
            yield key[:12], cell.title


def complete_layout(incomplete: str) -> list[str]:
    """Formats of `harness export`."""
    from harness.quantization.export import layouts

    return [name for name in layouts() if name.startswith(incomplete)]
