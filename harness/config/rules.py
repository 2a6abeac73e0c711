"""The rules of a sweep file: which cells are skipped, which come first."""

from __future__ import annotations

import fnmatch
from typing import Any

from harness.config.axes import SLOTS
from harness.core.cell import Cell, Part


def in_words(wanted: Any) -> str:
    """What a rule asks for, as a person reads it."""
    return " or ".join(map(str, wanted)) if isinstance(wanted, list) else str(wanted)


def matches(cell: Cell, key: str, wanted: Any) -> bool:
    """Whether an axis of a rule fits the cell. One on calibration, or on a slot that the method leaves empty, fits null alone."""
    value: Any = cell
    for attribute in key.split("."):
        owner = cell.method if value is cell and attribute in SLOTS else value
        settings = dict(owner.settings) if isinstance(owner, Part) and attribute != "name" else None
        value = settings.get(attribute) if settings is not None else getattr(owner, attribute, None)
    value = getattr(value, "name", value)
    for choice in wanted if isinstance(wanted, list) else [wanted]:
        if isinstance(choice, str) and isinstance(value, str):
            if fnmatch.fnmatchcase(value, choice) or value.partition("[")[0] == choice:
                return True
        elif choice == value:
            return True
    return False
