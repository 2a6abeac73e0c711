"""The rules of a sweep file: which cells are skipped and which are computed first."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from harness.config.axes import AXES, GROUPS, SLOTS
from harness.config.context import Context
from harness.config.locations import config_files, unknown_config
from harness.config.schemes import DELTA_NAME, FORMAT_NAME, SCHEME_NAME
from harness.config.sweep_file import is_axis
from harness.config.typed import field_names
from harness.core.cell import Calibration, Cell, Model, Part, Scheme, baseline_of, cell_key, to_json
from harness.core.errors import unknown_name
from harness.core.labels import without_settings
from harness.core.sweep import First


def in_words(wanted: Any) -> str:
    """The values that a rule accepts for an axis, as text: "w4 or w3"."""
    return " or ".join(map(str, wanted)) if isinstance(wanted, list) else str(wanted)


def matches(cell: Cell, key: str, wanted: Any) -> bool:
    """Whether a cell has one of the wanted values (names, patterns, null) of an axis or dotted field.

    A calibration or a part that the cell does not have equals null only.
    """
    value: Any = cell
    for attribute in key.split("."):
        owner = cell.method if value is cell and attribute in SLOTS else value
        if isinstance(owner, Part) and attribute != "name":
            value = to_json(owner)["settings"].get(attribute)
        elif isinstance(owner, dict):  # an entry of a setting that is a mapping
            value = owner.get(attribute)
        else:
            value = getattr(owner, attribute, None)
    value = getattr(value, "name", value)
    for choice in wanted if isinstance(wanted, list) else [wanted]:
        if isinstance(choice, str) and isinstance(value, str):
            if fnmatch.fnmatchcase(value, choice) or without_settings(value) == choice:
                return True
        elif choice == value:
            return True
    return False


def first_cells(context: Context, cells: Sequence[Cell]) -> tuple[First, ...]:
    """For each entry of `first`, the cells that match it and their full-precision baselines."""
    found = []
    for rule in filter(lambda rule: isinstance(rule, dict), context.file.first):
        fitting = [
            cell
            for cell in cells
            if all(matches(cell, key, wanted) for key, wanted in rule.items())
        ]
        keys = {cell_key(made) for cell in fitting for made in (cell, baseline_of(cell))}
        found.append(
            First(
                ", ".join(f"{key}: {in_words(wanted)}" for key, wanted in rule.items()),
                frozenset(keys),
            )
        )
    return tuple(found)


def skip_reason(context: Context, cell: Cell) -> str | None:
    """The reason of the first `skip` rule that matches a cell; None if no rule does."""
    for rule in context.file.skip:
        if isinstance(rule, dict) and isinstance(rule.get("reason"), str) and len(rule) > 1:
            if all(matches(cell, key, wanted) for key, wanted in rule.items() if key != "reason"):
                return str(rule["reason"]).strip()
    return None


def check_rules(context: Context) -> None:
    """Adds what is wrong with the `skip` and `first` rules to the problems."""
    for index, rule in enumerate(context.file.skip):
        where = f"{context.file.where}: skip[{index}]"
        if not isinstance(rule, dict) or len(rule) < 2 or not str(rule.get("reason") or "").strip():
            context.problems.add(f"{where}: axes to match and a reason are expected, not {rule!r}")
            continue
        _check_rule(
            context, {key: wanted for key, wanted in rule.items() if key != "reason"}, where
        )
    for index, rule in enumerate(context.file.first):
        where = f"{context.file.where}: first[{index}]"
        if not isinstance(rule, dict) or not rule:
            context.problems.add(f"{where}: axes to match are expected, not {rule!r}")
            continue
        _check_rule(context, rule, where)


def _check_rule(context: Context, rule: Mapping[str, Any], where: str) -> None:
    for key, wanted in rule.items():
        if not is_axis(key):
            context.problems.add(unknown_name("axis", key, AXES, where))
        elif key in GROUPS.values() and key not in ("model", "calibration"):
            _check_rule_names(context, key, wanted, where)
        elif "." in key:
            _check_rule_field(context, key, where)


def _check_rule_names(context: Context, group: str, wanted: Any, where: str) -> None:
    for name in wanted if isinstance(wanted, list) else [wanted]:
        known = config_files(group)
        parsed = (
            group == "scheme"
            and isinstance(name, str)
            and any(p.fullmatch(name) for p in (SCHEME_NAME, FORMAT_NAME, DELTA_NAME))
        )
        if (
            isinstance(name, str)
            and not parsed
            and not fnmatch.filter(known, name)
            and not set("*?[+") & set(name)
        ):
            context.problems.add(unknown_config(group, name, where))


def _check_rule_field(context: Context, key: str, where: str) -> None:
    head, *names = key.split(".")
    kind: Any = {"model": Model, "scheme": Scheme, "calibration": Calibration}.get(head)
    if kind is None:  # a part's settings
        if {"method", *SLOTS} & set(context.edits.axes):
            return  # an override left out the methods that the rule is about
        methods = [
            value
            for (axis, *_), value in context.values.items()
            if axis == "method" and value is not None
        ]
        parts = [part for part in (getattr(method, head) for method in methods) if part is not None]
        known = {setting for part in parts for setting, _ in part.settings}
        if methods and names[0] not in known:
            context.problems.add(
                unknown_name("setting", key, [f"{head}.{name}" for name in known], where)
            )
        return
    for depth, name in enumerate(names):
        fields = field_names(kind, names[:depth])
        if name not in fields:
            context.problems.add(unknown_name("field", name, fields, f"{where}: {key}"))
            return
