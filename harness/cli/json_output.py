"""What `--json` prints: the facts that a command shows, as one JSON value."""

from __future__ import annotations

from typing import Any

from harness.storage import json_files


def json_text(value: Any) -> str:
    """A JSON value as text with sorted keys, without a line break at its end."""
    return json_files.json_text(value).rstrip()


def print_json(value: Any) -> None:
    """Print a JSON value."""
    print(json_text(value))
