"""Overrides in Hydra's grammar: parsed, and sorted into axes, evaluations and runtime settings."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.config.axes import AXES, EDITABLE, GROUPS, RUNTIME
from harness.config.locations import config_files, listing
from harness.config.renamed import current_key, current_names
from harness.config.typed import Problems
from harness.config.yaml_files import one_line
from harness.core.errors import ConfigError, unknown_name


def split_arguments(
    sweep: str | None, overrides: Sequence[str] | None
) -> tuple[str | None, list[str]]:
    """(sweep, overrides): the first word is an override, not a sweep, if it has a "=", "+" or "~" and is not a file."""
    rest = list(overrides or [])
    if (
        sweep is not None
        and ("=" in sweep or sweep.startswith(("+", "~")))
        and not os.path.exists(sweep)
    ):
        return None, [sweep, *rest]
    return sweep, rest


# an unquoted word with a character that the grammar reads in quotes alone
FOREIGN = re.compile(r"""[^\s,:()\[\]{}'"]*[^\x00-\x7f][^\s,:()\[\]{}'"]*""")


@dataclass
class Edits:
    """Parsed overrides. axes: axis or dotted field -> values; evaluations: replace, add; runtime: dotted key -> value."""

    axes: dict[str, list[Any]] = field(default_factory=dict)
    evaluations: list[Any] | None = None
    more_evaluations: list[Any] = field(default_factory=list)
    evaluation_settings: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    baseline: bool | None = None
    typed: list[tuple[str, str, list[Any]]] = field(default_factory=list)  # key, text, values

    def blamed(self, problem: str) -> str:
        """A problem with the override that was typed as its place, where one set the value that the problem names."""
        for key, text, values in self.typed:
            head, _, rest = key.partition(".")
            last = rest.rpartition(".")[2] or head
            kinds = "|".join(map(re.escape, {head, last, head.removesuffix("s")}))
            field_name = rf'no (?:field|setting|key)[\w ]* "(?:{re.escape(key)}|{re.escape(last)})"'
            absent = re.search(rf"(?:^|: )({field_name}.*)", problem, re.DOTALL)
            if absent and rest:
                return f"override {text}: {absent[1]}"
            for value in values:
                shown = re.escape(str(value))
                unknown = re.match(rf'(.*?: )?(no ({kinds}) "{shown}".*)', problem, re.DOTALL)
                if unknown:
                    return f"override {text}: {unknown[2]}"
                wanted = f"not {re.escape(repr(value))}|{shown} is (?:below|above) .*"
                named = rf"(^|: )({re.escape(key)}|{re.escape(last)}): (.*(?:{wanted}))$"
                wrong = re.search(named, problem, re.DOTALL)
                if wrong:
                    return f"override {text}: {last}: {wrong[3]}"
        return problem


def parse_overrides(overrides: Sequence[str], problems: Problems) -> Edits:
    """Overrides parsed by Hydra's grammar and sorted by what they change; errors go to `problems`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    parser, edits = OverridesParser.create(), Edits()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            problems.add(f"override {text}: {_unreadable(text, error, parser)}")
            continue
        if parsed.type == OverrideType.DEL:
            problems.add(
                f"override {text}: nothing can be deleted; set the key to the value that you want"
            )
            continue
        with problems.collect():
            values = override_values(parsed)
            key = current_key(str(parsed.key_or_group))
            if (key in AXES or key in GROUPS.values() or key == "evaluations") and "" in values:
                raise ConfigError(f"override {text}: no value; {_example(key)}")
            edits.typed.append((key, text, _flat(values)))
            _apply(edits, key, values, parsed.type == OverrideType.ADD, f"override {text}")
    return edits


def _example(key: str) -> str:
    """What to write where a key has no value."""
    group = "evaluation" if key == "evaluations" else key
    if group not in GROUPS.values():
        return f"write {key}=VALUE, or leave it out"
    return f"`{listing(group)}` lists what {key}= takes"


def _unreadable(text: str, error: Exception, parser: Any) -> str:
    """Why an override cannot be read and what to type instead, in plain words."""
    from hydra.errors import HydraException

    key, equals, value = text.partition("=")
    if not equals or not key.lstrip("+~"):
        return "no KEY=VALUE; write for example model=demo"
    for opening, closing in ("[]", "{}", "()"):
        if value.count(opening) != value.count(closing):
            missing = closing if value.count(opening) > value.count(closing) else opening
            return f"unbalanced bracket: a {missing} is missing"
    if value.endswith(","):
        return "a value is missing after the last comma"
    for quoted in (FOREIGN.sub(lambda found: _quoted(found[0]), value), _quoted(value)):
        with contextlib.suppress(HydraException):
            parser.parse_override(f"{key}={quoted}")
            return f"the value needs quotes; write {_shell_word(f'{key}={quoted}')}"
    return one_line(error).split("; See https")[0]


def _quoted(value: str) -> str:
    """A value as one quoted string of Hydra's grammar."""
    return "'" + value.replace("'", "\\'") + "'"


def _shell_word(word: str) -> str:
    """A word as one types it: in double quotes where the shell changes nothing between them."""
    return shlex.quote(word) if set(word) & set('"$`\\!') else f'"{word}"'


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
                f"override {parsed.input_line!r}: glob() matches only names of the groups {', '.join(GROUPS.values())}"
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
        raise ConfigError(f"{where}: only axes of the grid take several values; give one value")
    return values[0]


def _flat(values: Iterable[Any]) -> list[Any]:
    """Values of an axis with lists expanded: [a, b] and "a,b" both mean two values."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]
