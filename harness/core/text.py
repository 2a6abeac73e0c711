"""Small texts: first lines of errors, addresses without passwords."""

from __future__ import annotations

import re


def first_line(error: BaseException) -> str:
    """The first line of an error that says anything, else the name of its type."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


def without_password(text: str) -> str:
    """Text with the user and password left out of every address: what is shown or tracked goes through here."""
    return re.sub(r"(://)[^/\s]+@", r"\1", text)
