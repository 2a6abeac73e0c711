"""Dataclasses of cells and sweeps as JSON values, and back. Settings are hashable pairs in memory and objects in JSON."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar

Settings = tuple[tuple[str, Any], ...]  # sorted (name, JSON value) pairs; lists become tuples
T = TypeVar("T")


def freeze(settings: dict[str, Any]) -> Settings:
    """Sorted, hashable form of a settings mapping whose values are JSON values."""
    return tuple((name, _freeze_value(value)) for name, value in sorted(settings.items()))


def _freeze_value(value: Any) -> Any:
    if isinstance(value, dict):
        return freeze(value)
    if isinstance(value, list | tuple):
        return tuple(_freeze_value(item) for item in value)
    return value


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, bool], ...] | None:
    """(name, whether it holds settings) of the fields of a dataclass; None for any other type."""
    if not dataclasses.is_dataclass(kind):
        return None
    hints = _hints(kind)
    return tuple((each.name, hints[each.name] == Settings) for each in dataclasses.fields(kind))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    # 0.1 ms each time, and a sweep computes tens of thousands of keys
    return typing.get_type_hints(kind)


def to_json(value: Any) -> Any:
    """A cell, or any part of one, as JSON values; settings become objects."""
    fields = _fields(value.__class__)
    if fields is not None:
        return {
            name: _thaw(getattr(value, name)) if holds_settings else to_json(getattr(value, name))
            for name, holds_settings in fields
        }
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def _thaw(settings: Settings) -> dict[str, Any]:
    return {name: _thaw_value(value) for name, value in settings}


def _thaw_value(value: Any) -> Any:
    if isinstance(value, tuple):
        is_mapping = bool(value) and all(
            isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value
        )
        return _thaw(value) if is_mapping else [_thaw_value(item) for item in value]
    return value


def from_json(kind: type[T], data: Any) -> T:
    """The inverse of `to_json` for a dataclass: from_json(Cell, to_json(cell)) == cell."""
    return typing.cast(T, _build(kind, data))


def _build(kind: Any, data: Any) -> Any:
    if kind == Settings:
        return freeze(data)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        (inner,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
        return _build(inner, data)
    if origin is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in data)
    if dataclasses.is_dataclass(kind):
        hints = _hints(typing.cast(type, kind))
        return typing.cast(type, kind)(
            **{name: _build(hints[name], item) for name, item in data.items()}
        )
    return data
