"""Where a store lies: a folder or a URL."""

from __future__ import annotations

import re
from pathlib import Path


def is_url(place: object) -> bool:
    """Whether a store is in an object store rather than in a folder."""
    return (
        isinstance(place, str)
        and re.match(r"[a-z][a-z0-9+.-]*://", place) is not None
        and not place.startswith("file://")
    )


def place_of(text: str) -> Path | str:
    """What `runs=` names: the URL of an object store as it is, or the absolute path of a folder."""
    return text if is_url(text) else Path(text.removeprefix("file://")).expanduser().absolute()
