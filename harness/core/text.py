"""Small texts: first lines of errors, addresses without passwords, lists of names, names of files, settings, strings in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def first_line(error: BaseException) -> str:
    """The first line of an error that says anything, else the name of its type."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


def without_password(text: str) -> str:
    """Text with the user and password left out of every address: what is shown or tracked goes through here."""
    return re.sub(r"(://)[^/\s]+@", r"\1", text)


def short_list(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def file_name(text: str) -> str:
    """Text as a file's name: letters, digits and "_.-" stay, each run of other characters becomes "-"."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def letters_and_digits(text: str) -> str:
    """The lowercase letters a to z and digits of a text, so that "SliM-LLM" equals "slim_llm"."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def texts_in(value: Any) -> Iterator[str]:
    """Every string among the values of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def settings_text(settings: Iterable[tuple[str, Any]]) -> str:
    """Settings for a reader: 'length 2048, special_tokens yes, separator "\\n\\n"'. Settings that are None are left out.

    Strings with white space, and empty ones, stand in quotes with escapes. Settings inside a setting stand in parentheses.
    """
    return ", ".join(
        f"{name} {_value_text(value)}" for name, value in settings if value is not None
    )


def _value_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return (
            json.dumps(value, ensure_ascii=False) if not value or re.search(r"\s", value) else value
        )
    if isinstance(value, Mapping):
        return f"({settings_text(value.items())})"
    if isinstance(value, Sequence):
        if all(isinstance(each, tuple) and len(each) == 2 for each in value):
            return f"({settings_text(value)})"
        return f"[{', '.join(map(_value_text, value))}]"
    return str(value)
