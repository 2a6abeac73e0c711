"""Values from YAML, checked by pydantic against the annotations of the dataclasses that they end in.

The limits of a field stand beside the field, in core/cell.py, core/sweep.py and in the Settings of a plugin, whose source is read
and not imported. All errors are collected and reported together, each with its dotted path and the nearest name that exists.
pydantic is imported when the first value is checked: lists and completion do without it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le

from harness.core import plugins
from harness.core.cell import Settings, freeze
from harness.core.errors import ConfigError, HarnessError, unknown_name

EXPECTED = {  # kind of error that pydantic reports -> what was expected
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "path_type": "a path",
}
PLAIN_TYPES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple)},
    "Any": Any,
    "Literal": typing.Literal,
    "Annotated": Annotated,
    "Ge": Ge,
    "Le": Le,
}  # what annotations of a plugin's settings consist of
REQUIRED = object()  # default of a setting that has none

T = TypeVar("T")


class Problems:
    """The errors found so far, each sentence once, in order."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}

    def add(self, problem: str) -> None:
        self.found.setdefault(problem)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """A context that turns a HarnessError of its body into problems, one per line."""
        try:
            yield
        except HarnessError as error:
            for line in str(error).split("\n"):
                self.add(line)

    def check(self) -> None:
        """Raises ConfigError with all problems if there are any."""
        if self.found:
            count = len(self.found)
            head = "" if count == 1 else f"{count} problems:\n  "
            raise ConfigError(head + "\n  ".join(self.found) + "\nNothing was started.")


def typed(kind: type[T], content: Any, where: str, problems: Problems) -> T | None:
    """A dataclass from a mapping, its fields checked against their annotations by pydantic; None if something is wrong.

    Every error goes to `problems` with its dotted path. Values keep what keys hash: a whole number stays an int in a float field.
    """
    value, errors = _validated(kind, content)
    for error in errors:
        problems.add(_sentence(error, kind, where))
    return typing.cast(T | None, value)


def _validated(kind: Any, value: Any) -> tuple[Any, Sequence[Mapping[str, Any]]]:
    """The value in its type, and no error; or None and the errors that pydantic reports."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value), ()
    except ValidationError as error:
        return None, typing.cast(Any, error.errors(include_url=False))


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(_strict(kind))


def _strict(kind: Any) -> Any:
    """The pydantic type of an annotation: text never becomes a number, and one value stands for a list of one.

    A union means its first type, and null if that is among the others: `Path | str` is read as a path.
    """
    from pydantic import AfterValidator, BeforeValidator, Strict

    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind == Settings:
        return Annotated[dict[str, Any], Strict(), AfterValidator(freeze)]
    if origin is Annotated:
        return Annotated[(_strict(arguments[0]), *arguments[1:])]
    if origin in (typing.Union, types.UnionType):
        inner = _strict(next(each for each in arguments if each is not type(None)))
        return inner | None if type(None) in arguments else inner
    if origin is tuple:
        return Annotated[tuple[_strict(arguments[0]), ...], BeforeValidator(_as_list)]  # type: ignore[misc]
    if dataclasses.is_dataclass(kind):
        return _strict_fields(typing.cast(type, kind))
    if kind is float:
        return Annotated[float, Strict(), AfterValidator(_whole)]
    return Annotated[kind, Strict()] if kind in (bool, int, str) or origin is dict else kind


def _strict_fields(kind: type) -> Any:
    """A pydantic model with the fields of a dataclass, that becomes the dataclass; defaults stay the dataclass's own."""
    from pydantic import AfterValidator, ConfigDict, create_model

    fields: dict[str, Any] = {}
    for each in dataclasses.fields(kind):
        has_default = (
            each.default is not dataclasses.MISSING
            or each.default_factory is not dataclasses.MISSING
        )
        fields[each.name] = (_strict(hints_of(kind)[each.name]), None if has_default else ...)
    forbidding = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)
    model = create_model(kind.__name__, __config__=forbidding, **fields)

    def made(checked: Any) -> Any:
        return kind(**{name: getattr(checked, name) for name in checked.model_fields_set})

    return Annotated[model, AfterValidator(made)]


def _as_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _whole(value: float) -> float:
    """A whole number as int, so that 4 and 4.0 are one value and one key."""
    return int(value) if value.is_integer() else value


def _sentence(error: Mapping[str, Any], kind: Any, where: str) -> str:
    """The message of one error: the dotted path of the field, and the value or the nearest name that exists."""
    *parents, last = error["loc"] or ("",)
    above, path = _path(where, parents), _path(where, error["loc"])
    value, context = error["input"], error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return unknown_name("field", str(last), field_names(kind, parents), above)
    if error["type"] == "literal_error":
        return unknown_name(
            str(last), str(value), re.findall("'(.*?)'", context["expected"]), above
        )
    if error["type"] == "missing":
        return f"{above}: {last} is missing"
    if error["type"] == "greater_than_equal":
        return f"{path}: {value} is below {context['ge']:g}"
    if error["type"] == "less_than_equal":
        return f"{path}: {value} is above {context['le']:g}"
    expected = EXPECTED.get(error["type"])
    return (
        f"{path}: {expected} is expected, not {value!r}" if expected else f"{path}: {error['msg']}"
    )


def _path(where: str, steps: Sequence[str | int]) -> str:
    """ "study.yaml", ("weight", "bits") -> "study.yaml: weight.bits"; a number is the place in a list: "columns[2]"."""
    dotted = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    if not dotted or dotted.startswith("["):
        return f"{where}{dotted}"
    return f"{where}: {dotted[1:]}"


def field_names(kind: Any, steps: Sequence[str | int]) -> Sequence[str]:
    """Names of the fields of the dataclass that lies at a path below another one; empty if there is none."""
    for step in steps:
        if isinstance(step, str) and dataclasses.is_dataclass(kind):
            kind = hints_of(typing.cast(type, kind)).get(step)
        while typing.get_args(kind):
            kind = typing.get_args(kind)[0]
    known = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return [each.name for each in known]


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The field types of a dataclass, resolved, with the limits that they state."""
    return typing.get_type_hints(kind, include_extras=True)


def settings_of(kind: str, name: str) -> Mapping[str, Any]:
    """Fields of a plugin's nested Settings with their literal defaults, read from its source; REQUIRED where there is none."""
    return {field: default for field, (default, _) in _settings_fields(kind, name).items()}


def types_of(kind: str, name: str) -> Mapping[str, Any]:
    """The same fields with the types of their annotations: {"outlier_threshold": float | None}."""
    return {field: accepted for field, (_, accepted) in _settings_fields(kind, name).items()}


@functools.cache
def _settings_fields(kind: str, name: str) -> Mapping[str, tuple[Any, Any]]:
    fact = plugins.facts(kind, name)
    tree = ast.parse(fact.path.read_text(encoding="utf-8"))
    plugin = _class_in(tree, plugins.KINDS[kind][1])
    settings = _class_in(plugin, "Settings") if plugin is not None else None
    return _fields(settings, tree) if settings is not None else {}


def _fields(settings: ast.ClassDef, tree: ast.Module) -> dict[str, tuple[Any, Any]]:
    """Fields of a dataclass, those of its bases first; a base is looked up in its file or where that imports it from."""
    found: dict[str, tuple[Any, Any]] = {}
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
            accepted = _annotated_type(statement.annotation, default)
            found[statement.target.id] = default, accepted
    return found


def _annotated_type(annotation: ast.expr, default: Any) -> Any:
    """The type that an annotation names, of PLAIN_TYPES alone; for any other annotation the type of the default."""
    try:
        return _type_of(annotation)
    except (KeyError, ValueError):
        return Any if default is REQUIRED or default is None else type(default)


def _type_of(node: ast.expr) -> Any:
    """The type that an expression names. Raises KeyError or ValueError for one that needs its module."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _type_of(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Constant) and node.value in (None, ...):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return typing.Union[_type_of(node.left), _type_of(node.right)]  # noqa: UP007
    if isinstance(node, ast.Call):
        return PLAIN_TYPES[ast.unparse(node.func)](*map(ast.literal_eval, node.args))
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        read = ast.literal_eval if ast.unparse(node.value) == "Literal" else _type_of
        return PLAIN_TYPES[ast.unparse(node.value)][tuple(map(read, inner))]
    return PLAIN_TYPES[ast.unparse(node)]


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
    types: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`given` over the defaults `known` of a plugin's settings, checked by pydantic. Raises ConfigError with every problem.

    types: what their annotations accept (`types_of`); a setting without one accepts values of its default's type.
    """
    problems = Problems()
    checked = {}
    for key, value in given.items():
        if key not in known:
            problems.add(unknown_name("setting", key, known, where))
            continue
        default = known[key]
        untyped = Any if default is None or default is REQUIRED else type(default)
        kind = (types or {}).get(key, untyped)
        found, errors = _validated(kind | None if default is None else kind, value)
        for error in errors:
            problems.add(_sentence({**error, "loc": (key, *error["loc"])}, kind, where))
        # keys hold what was written; a float where the default is one
        if isinstance(value, int | float):
            found = float(value) if isinstance(default, float) else value
        checked[key] = found
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
