"""Numbers with units in words, and back: bytes, seconds, counts."""

from __future__ import annotations

import re

from harness.core.errors import ConfigError, StoreError


def bytes_of(text: str, where: str) -> int:
    """The bytes of "200GB", "1.5TB", "500 MB" or a plain number; units are decimal. Raises StoreError for anything else.

    >>> bytes_of("1.5GB", "store.quota")
    1500000000
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", str(text).lower())
    if found is None:
        raise StoreError(f'{where}: "{text}" is no size; write for example 500MB, 200GB or 1.5TB')
    return int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}[found[2]])


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 cell", "3 cells", "2 entries"."""
    plural = (
        noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith("s") else "s")
    )
    return f"{number:,} {noun if number == 1 else plural}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit a person would use: "3.2 h", "14 s"; a sentence where nothing is known."""
    if seconds is None:
        return "time unknown (no record yet)"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"≈ {seconds / length:.1f} {unit}"
    return f"≈ {max(1, round(seconds))} s"


def seconds_of(text: str) -> float:
    """The seconds of "8h", "90min", "2d", "45s" or a plain number. Raises ConfigError for anything else.

    >>> seconds_of("1.5h")
    5400.0
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    units = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
    if found is None or found[2] not in units:
        raise ConfigError(f'"{text}" is no time; write for example 45s, 90min, 8h or 2d')
    return float(found[1]) * units[found[2]]


def size(number: float) -> str:
    """Bytes in words, decimal units: 13.5 GB."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= length:
            return f"{number / length:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"
