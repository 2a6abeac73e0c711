"""Output that any terminal can hold: a plain character in place of one that its encoding lacks.

Titles, tables and messages hold "·", "≈", "↓" and names that users chose. Where standard output is ASCII or Latin-1 (a POSIX
locale, PYTHONIOENCODING, a container without UTF-8), Python raises UnicodeEncodeError at the first of them and nothing starts.
Every mark has one plain character, so that columns stay aligned and the notes below a table explain the marks as printed.
"""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

ERRORS = "harness_plain"  # the name of the error handler
PLAIN = {
    "·": "-",
    "•": "*",
    "≈": "~",
    "≠": "#",
    "≤": "<",
    "≥": ">",
    "±": "+",
    "×": "x",
    "÷": "/",
    "−": "-",
    "√": "v",
    "Δ": "D",
    "Σ": "S",
    "†": "!",
    "‡": "!",
    "↓": "v",
    "↑": "^",
    "→": ">",
    "←": "<",
    "—": "-",
    "–": "-",
    "…": "...",
    "“": '"',
    "”": '"',
    "„": '"',
    "‘": "'",
    "’": "'",
    "²": "2",
    "³": "3",
    "µ": "u",
    "μ": "u",
    "─": "-",
    "━": "-",
    "│": "|",
    "┃": "|",
    "╸": "-",
    "╺": "-",
    "✓": "+",
    "✗": "x",
    "ß": "ss",
}


def plain(text: str) -> str:
    """Text in ASCII: marks by `PLAIN`, box corners as "+", letters without their accents, and "?" for the rest."""
    return "".join(_plain(character) for character in text)


def make_encodable() -> None:
    """Make standard output and error replace what they cannot hold. Streams that are no text files are left as they are."""
    codecs.register_error(ERRORS, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def _plain(character: str) -> str:
    if character.isascii():
        return character
    if character in PLAIN:
        return PLAIN[character]
    if 0x2500 <= ord(character) <= 0x257F:  # box drawing
        return "+"
    letters = unicodedata.normalize("NFKD", character)
    found = "".join(letter for letter in letters if letter.isascii())
    return found or ("" if unicodedata.combining(character) else "?")


def _replace(error: UnicodeError) -> tuple[str, int]:
    """What stands for the part of a text that could not be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end
