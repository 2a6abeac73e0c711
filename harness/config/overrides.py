"""Overrides in Hydra's grammar: parsed, and sorted into axes, evaluations and runtime settings."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.config.axes import AXES, EDITABLE, GROUPS, RUNTIME
from harness.config.locations import config_files
from harness.config.renamed import current_key, current_names
from harness.config.typed import Problems
from harness.config.yaml_files import one_line
from harness.core.errors import ConfigError, unknown_name


def split_arguments(sweep: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """(name, overrides): the first word is an override when it has a "=" and is no file."""
    rest = list(overrides or [])
    if (
        sweep is not None
        and ("=" in sweep or sweep.startswith(("+", "~")))
        and not os.path.exists(sweep)
    ):
        return None, [sweep, *rest]
    return sweep, rest


@dataclass
class Edits:
    """Parsed overrides. axes: axis or dotted field -> values; evaluations: replace, add; runtime: dotted key -> value."""

    axes: dict[str, list[Any]] = field(default_factory=dict)
    evaluations: list[Any] | None = None
    more_evaluations: list[Any] = field(default_factory=list)
    evaluation_settings: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    baseline: bool | None = None


def parse_overrides(overrides: Sequence[str], problems: Problems) -> Edits:
    """Overrides as typed, parsed by Hydra's grammar; what is wrong goes to problems."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    parser, edits = OverridesParser.create(), Edits()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            problems.add(f"override {text!r}: {one_line(error).split('; See https')[0]}")
            continue
        if parsed.type == OverrideType.DEL:
            problems.add(
                f"override {text!r}: nothing can be deleted; give the value that is wanted instead"
            )
            continue
        with problems.collect():
            _apply(
                edits,
                parsed.key_or_group,
                override_values(parsed),
                parsed.type == OverrideType.ADD,
                f"override {text!r}",
            )
    return edits


def override_values(parsed: Any) -> list[Any]:
    """The values of one override: one, or those of a sweep such as range(2,5) or glob(w4*)."""
    from hydra.core.override_parser.types import Glob, Transformer
    from hydra.errors import HydraException

    if not parsed.is_sweep_override():
        return [_plain(parsed.value())]
    if isinstance(parsed.value(), Glob):
        folder = parsed.key_or_group
        if folder not in GROUPS.values():
            raise ConfigError(
                f"override {parsed.input_line!r}: glob() chooses among the files of {', '.join(GROUPS.values())}"
            )
        return list(parsed.value().filter(sorted(config_files(folder))))
    try:
        return [_plain(value) for value in parsed.sweep_iterator(transformer=Transformer.identity)]
    except HydraException as error:
        raise ConfigError(f"override {parsed.input_line!r}: {one_line(error)}") from error


def _plain(value: Any) -> Any:
    """Hydra's quoted strings as strings."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    return getattr(value, "text", value)


def _apply(edits: Edits, key: str, values: list[Any], add: bool, where: str) -> None:
    key = current_key(key)
    key = current_key(key)
    head, _, rest = key.partition(".")
    if key in AXES:
        edits.axes[key] = current_names(key, _flat(values))
    elif rest and head in EDITABLE:
        edits.axes[key] = values
    elif key == "evaluations":
        (
            edits.more_evaluations.extend
            if add
            else functools.partial(setattr, edits, "evaluations")
        )(_flat(values))
    elif head == "evaluations":
        edits.evaluation_settings[rest] = _single(values, where)
    elif key == "baseline":
        edits.baseline = bool(_single(values, where))
    elif head in RUNTIME:
        edits.runtime[key] = _single(values, where)
    else:
        known = [
            *AXES,
            *(f"{name}.<field>" for name in EDITABLE),
            "evaluations",
            "evaluations.limit",
            "baseline",
            *RUNTIME,
        ]
        raise ConfigError(unknown_name("key", key, known, where))


def _single(values: list[Any], where: str) -> Any:
    if len(values) != 1:
        raise ConfigError(f"{where}: only axes of the grid take several values; one is needed here")
    return values[0]


def _flat(values: Iterable[Any]) -> list[Any]:
    """[a, b] and "a,b" are both two values of an axis."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]
