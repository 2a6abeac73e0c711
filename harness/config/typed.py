"""Values from YAML, checked against the types they end in; everything that is wrong is collected and said at once.

Dataclasses are checked field by field against their annotations, settings of plugins against the defaults that their source and
their YAML state. Imports no library: Hydra's own structured configs can be neither frozen nor limited to choices.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from harness.core import plugins
from harness.core.cell import (
    ActivationScheme,
    Calibration,
    KVScheme,
    Model,
    Settings,
    WeightScheme,
    freeze,
)
from harness.core.errors import ConfigError, HarnessError, unknown_name
from harness.core.number_formats import DOUBLE_QUANTIZED, SCALE_TYPES
from harness.core.sweep import Cluster, Tracking

CHOICES: dict[tuple[type, str], tuple[Any, ...]] = {
    (Model, "dtype"): ("float32", "float16", "bfloat16"),
    (WeightScheme, "scale_dtype"): (*SCALE_TYPES, DOUBLE_QUANTIZED, "e8m0"),
    (WeightScheme, "zero_point"): ("integer", "float"),
    (ActivationScheme, "granularity"): ("token", "tensor", "group"),
    (Calibration, "packing"): ("window", "document", "join"),
    (Cluster, "kind"): ("local", "ray"),
    (Tracking, "kind"): ("sqlite", "server", "none"),
}
LEAST = {  # smallest value of a number
    (WeightScheme, "bits"): 1,
    (ActivationScheme, "bits"): 2,
    (KVScheme, "bits"): 1,
    (KVScheme, "group_size"): 1,
    (Calibration, "samples"): 1,
    (Calibration, "length"): 2,
    (Cluster, "workers"): 0,
    (Cluster, "gpus_per_task"): 0,
}
REQUIRED = object()  # default of a setting that has none
EXAMPLES: dict[str, Any] = {"bool": False, "int": 0, "float": 0.0, "str": ""}

T = TypeVar("T")


class Problems:
    """Everything that is wrong so far, each sentence once."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}

    def add(self, problem: str) -> None:
        self.found.setdefault(problem)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Turns a HarnessError of the body into problems."""
        try:
            yield
        except HarnessError as error:
            for line in str(error).split("\n"):
                self.add(line)

    def check(self) -> None:
        """Raises ConfigError if there are any."""
        if self.found:
            count = len(self.found)
            head = "" if count == 1 else f"{count} problems:\n  "
            raise ConfigError(head + "\n  ".join(self.found) + "\nNothing was started.")


def typed(kind: type[T], content: Mapping[str, Any], where: str, problems: Problems) -> T | None:
    """A dataclass from a mapping, every field checked against its annotation; None when something is wrong, said in `problems`."""
    before = len(problems.found)
    value = _typed(kind, content, where, problems)
    return typing.cast(T, value) if len(problems.found) == before else None


def _typed(kind: Any, value: Any, where: str, problems: Problems) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if kind == Settings:
        return (
            freeze(value)
            if isinstance(value, dict)
            else _wrong(value, "a mapping", where, problems)
        )
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return None if value is None else _typed(inner[0], value, where, problems)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(
            _typed(typing.get_args(kind)[0], item, f"{where}[{n}]", problems)
            for n, item in enumerate(items)
        )
    if origin is dict:
        return (
            dict(value) if isinstance(value, dict) else _wrong(value, "a mapping", where, problems)
        )
    if dataclasses.is_dataclass(kind):
        return _typed_fields(typing.cast(type, kind), value, where, problems)
    if kind is bool:
        return value if isinstance(value, bool) else _wrong(value, "true or false", where, problems)
    if kind is int:
        return value if type(value) is int else _wrong(value, "a whole number", where, problems)
    if kind is float:
        if type(value) not in (int, float):
            return _wrong(value, "a number", where, problems)
        return int(value) if value == int(value) else value  # 4 and 4.0 are one value and one key
    if kind is Path:
        return Path(value) if isinstance(value, str) else _wrong(value, "a path", where, problems)
    assert kind is str, kind
    return value if isinstance(value, str) else _wrong(value, "text", where, problems)


def _typed_fields(kind: type, value: Any, where: str, problems: Problems) -> Any:
    if not isinstance(value, dict):
        return _wrong(value, "a mapping", where, problems)
    hints, fields = hints_of(kind), {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, item in value.items():
        if key not in fields:
            problems.add(unknown_name("field", str(key), fields, where))
            continue
        checked = _typed(hints[key], item, f"{where}: {key}", problems)
        choices, least = CHOICES.get((kind, key)), LEAST.get((kind, key))
        if choices is not None and checked is not None and checked not in choices:
            problems.add(unknown_name(key, str(checked), choices, where))
        if least is not None and isinstance(checked, int | float) and checked < least:
            problems.add(f"{where}: {key}: {checked} is below {least}")
        values[key] = checked
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    for name in missing:
        problems.add(f"{where}: {name} is missing")
    return None if missing else kind(**values)


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The field types of a dataclass, resolved."""
    return typing.get_type_hints(kind)


def _wrong(value: Any, expected: str, where: str, problems: Problems) -> None:
    problems.add(f"{where}: {expected} is expected, not {value!r}")


def _like(default: Any, value: Any, where: str, accepted: frozenset[str] = frozenset()) -> Any:
    """`value` in the type of a setting's default.

    accepted: names of the types in the setting's annotation. With "None" among them null is a value too; where the default says
    no type (null, or none) it is checked against the one other name, or not at all.
    """
    if value is None and ("None" in accepted or default is None):
        return value
    if default is None or default is REQUIRED:
        named = accepted - {"None"}
        if len(named) == 1 and named <= EXAMPLES.keys():
            _like(
                EXAMPLES[next(iter(named))], value, where
            )  # checked, not converted: keys hold what was written
        return value
    if isinstance(default, bool) or isinstance(value, bool):
        fits, expected = isinstance(default, bool) and isinstance(value, bool), "true or false"
    elif isinstance(default, float):
        fits, expected = isinstance(value, int | float), "a number"
        value = float(value) if fits else value
    elif isinstance(default, int):
        fits, expected = isinstance(value, int), "a whole number"
    elif isinstance(default, str):
        fits, expected = isinstance(value, str), "text"
    elif isinstance(default, list | tuple):
        fits, expected = isinstance(value, list | tuple), "a list"
    else:
        fits, expected = isinstance(value, dict), "a mapping"
    if not fits:
        kind = (
            "a number"
            if isinstance(default, int | float) and not isinstance(default, bool)
            else expected
        )
        raise ConfigError(
            f"{where}: {expected if not isinstance(value, bool) else kind} is expected, not {value!r}"
        )
    return value


def settings_of(kind: str, name: str) -> Mapping[str, Any]:
    """Fields of a plugin's nested Settings with their literal defaults, read from its source; REQUIRED where there is none."""
    return {field: default for field, (default, _) in _settings_fields(kind, name).items()}


def types_of(kind: str, name: str) -> Mapping[str, frozenset[str]]:
    """The same fields with the names of the types that their annotations join: {"outlier_threshold": {"float", "None"}}."""
    return {field: accepted for field, (_, accepted) in _settings_fields(kind, name).items()}


@functools.cache
def _settings_fields(kind: str, name: str) -> Mapping[str, tuple[Any, frozenset[str]]]:
    fact = plugins.facts(kind, name)
    tree = ast.parse(fact.path.read_text(encoding="utf-8"))
    plugin = _class_in(tree, plugins.KINDS[kind][1])
    settings = _class_in(plugin, "Settings") if plugin is not None else None
    return _fields(settings, tree) if settings is not None else {}


def _fields(settings: ast.ClassDef, tree: ast.Module) -> dict[str, tuple[Any, frozenset[str]]]:
    """Fields of a dataclass, those of its bases first; a base is looked up in its file or where that imports it from."""
    found: dict[str, tuple[Any, frozenset[str]]] = {}
    for base in settings.bases:
        if isinstance(base, ast.Name):
            home = _home(base.id, tree)
            inherited = _class_in(home, base.id)
            found.update(_fields(inherited, home) if inherited is not None else {})
    for statement in settings.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            try:
                default = REQUIRED if statement.value is None else ast.literal_eval(statement.value)
            except ValueError:
                default = REQUIRED  # computed: its type is the plugin's to check
            accepted = frozenset(
                part.strip() for part in ast.unparse(statement.annotation).strip("'\"").split("|")
            )
            found[statement.target.id] = default, accepted
    return found


def _home(name: str, tree: ast.Module) -> ast.Module:
    """The source that defines a class: this file, or the one it imports the class from, however many files pass it on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(
            (alias.asname or alias.name) == name for alias in node.names
        ):
            spec = importlib.util.find_spec(node.module or "")
            if spec is not None and spec.origin is not None:
                return _home(name, ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return tree


def _class_in(node: ast.Module | ast.ClassDef, name: str) -> ast.ClassDef | None:
    return next(
        (child for child in node.body if isinstance(child, ast.ClassDef) and child.name == name),
        None,
    )


def checked_settings(
    known: Mapping[str, Any],
    given: Mapping[str, Any],
    where: str,
    types: Mapping[str, frozenset[str]] | None = None,
) -> dict[str, Any]:
    """`given` with the types of `known`, a plugin's settings with their defaults. Raises ConfigError with every problem.

    types: what their annotations accept (`types_of`).
    """
    problems = Problems()
    checked = {}
    for key, value in given.items():
        with problems.collect():
            if key not in known:
                raise ConfigError(unknown_name("setting", key, known, where))
            checked[key] = _like(
                known[key], value, f"{where}: {key}", (types or {}).get(key, frozenset())
            )
    if problems.found:
        raise ConfigError("\n".join(problems.found))
    return {**{key: value for key, value in known.items() if value is not REQUIRED}, **checked}


def set_nested(content: dict[str, Any], dotted: str, value: Any) -> None:
    """content["a"]["b"] = value for "a.b", in place; mappings that are missing or null are made."""
    *parents, leaf = dotted.split(".")
    for parent in parents:
        if not isinstance(content.get(parent), dict):
            content[parent] = {}
        content = content[parent]
    content[leaf] = value
