"""JSON values in frozen and in canonical form: settings that can be hashed, and digests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from harness.core.errors import ConfigError

Settings = tuple[tuple[str, Any], ...]  # sorted (name, JSON value) pairs; lists become tuples


def freeze(settings: dict[str, Any]) -> Settings:
    """Sorted, hashable form of a settings mapping whose values are JSON values."""
    return tuple((name, _freeze_value(value)) for name, value in sorted(settings.items()))


def _freeze_value(value: Any) -> Any:
    if isinstance(value, dict):
        return freeze(value)
    if isinstance(value, list | tuple):
        return tuple(_freeze_value(item) for item in value)
    return value


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, as 64 hexadecimal digits.

    Raises ConfigError for NaN and infinity, which JSON lacks: what changes numbers must be one itself.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        found = ", ".join(f"{place}={number}" for place, number in _non_finite(value))
        raise ConfigError(
            f"{found or error}: a finite number is expected; change it where it was set (a YAML file or an override), "
            "or leave it out"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def _non_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Where in a JSON value NaN and infinities are."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _non_finite(item, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        pair = len(value) == 2 and isinstance(value[0], str)  # a setting with its value
        for number, item in enumerate(value):
            yield from _non_finite(item, f"{place}.{value[0] if pair else number}".lstrip("."))
