"""JSON lines: the one reader of every text and of every task's items.

It reads what the official loader reads (`datasets.load_dataset("json")`, which lm-eval uses), with the same values, and refuses
the rest with the file and the line:

    rows        JSON objects one after another, separated by blanks, tabs, \\n or \\r: \\n, \\r\\n and \\r all end a line, an
                empty line holds no row, the last one needs no end, and an object may go on over several lines
    characters  UTF-8, with or without a byte-order mark at the start. U+2028, U+0085 and others that Python counts as line ends are
                characters like any other inside a string
    numbers     NaN, Infinity and -Infinity are read; an integer beyond 64 bits is a float; one too large for a float is refused
    refused     a key that an object holds twice, half a surrogate pair, a control character inside a string, a row that is no
                object, and a file that is one array, whose numbers the official loader rounds
    compressed  gzip, told by the file's first bytes

One difference is intended: a string stays a string. The official loader turns a column that holds nothing but dates into time
stamps, which would change the prompts of a data set whose fields are strings on the hub. Loads without torch.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from harness.core.errors import DataError

Row = dict[str, Any]
BLANKS = " \t\r\n"  # between JSON values
GZIP = b"\x1f\x8b"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
POINTER = b"version https://git-lfs"  # the first bytes of a pointer file of Git LFS
# escaped; whether its other half follows is asked of the decoded text
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def rows(path: Path, kind: str = "") -> Iterator[tuple[int, Row]]:
    """The rows of a file, each with the number of the line that it begins on, from 1.

    kind: what the file is, for messages ("text", "task data"). Raises DataError that names file, line and remedy.
    """
    where = f"{kind} {path}".strip()
    found = False
    try:
        with _open(path) as file:
            for number, row in _rows(file, where, path):
                found = found or bool(row)
                yield number, row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: cannot be read: {error}") from error
    if not found:
        raise DataError(f'{where}: holds no rows; {{"field": value, …}}, one per line, is expected')


def plain_text(path: Path, kind: str = "") -> str:
    """A plain text, verbatim. Raises DataError as `rows` does."""
    where = f"{kind} {path}".strip()
    try:
        with _open(path) as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: cannot be read: {error}") from error
    _refuse_other_kinds(data, where, path)
    return _decoded(data, 1, where, path)


def filled(found: Sequence[Row]) -> list[Row]:
    """Rows that all have the same keys, with None for those that a row lacks: what a table makes of them."""
    names = dict.fromkeys(name for row in found for name in row)
    return [{name: row.get(name) for name in names} for row in found]


def summary(path: Path, subject: str | None = None, kind: str = "") -> tuple[int, int]:
    """(number of rows, how often the most frequent row occurs), of one subject or of all; read once while the file stays as it is.

    Raises DataError as `rows` does: it reads the whole file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{kind} {path}: cannot be read: {error}".strip()) from error
    by_subject = _summaries(path, status.st_size, status.st_mtime_ns, kind)
    if subject is None:
        return by_subject[None]
    return by_subject.get(subject, (0, 0))


@functools.lru_cache(maxsize=256)
def _summaries(
    path: Path, size: int, modified: int, kind: str
) -> Mapping[str | None, tuple[int, int]]:
    """By subject (None: all rows)."""
    counts: dict[str | None, Counter[int]] = {}
    for _, row in rows(path, kind):
        identity = hash(json.dumps(row, sort_keys=True))
        subject = row.get("subject")
        for name in (None, subject) if isinstance(subject, str) else (None,):
            counts.setdefault(name, Counter())[identity] += 1
    return {name: (own.total(), max(own.values())) for name, own in counts.items()}


def _rows(file: IO[bytes], where: str, path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            _refuse_other_kinds(line, where, path)
            line = line.removeprefix(codecs.BOM_UTF8)
        text = _decoded(line, number, where, path)
        try:
            values = list(_values(text, number, where, path))
        except json.JSONDecodeError:
            # The value may go on in the next line. What follows is then read at once, and the error, if there is one, is final.
            rest = text + _decoded(file.read(), number + 1, where, path)
            try:
                yield from list(_values(rest, number, where, path))
            except json.JSONDecodeError as error:
                _refuse(error, number, where)
            return
        yield from values


def _values(text: str, number: int, where: str, path: Path) -> Iterator[tuple[int, Row]]:
    """The objects in a text that begins on line `number`."""
    position, counted = _skip(text, 0), 0
    while position < len(text):
        number, counted = number + text.count("\n", counted, position), position
        value, end = _decode(text, position, number, where)
        if not isinstance(value, dict):
            remedy = (
                f"; take an array apart: jq -c '.[]' '{path}' > rows.jsonl"
                if isinstance(value, list)
                else ""
            )
            raise DataError(
                f"{where}, line {number}: an object is expected, not {_kind(value)}: "
                f'{{"field": value, …}}, one per line{remedy}'
            )
        yield number, value
        position = _skip(text, end)


def _decode(text: str, position: int, number: int, where: str) -> tuple[Any, int]:
    """One JSON value and where it ends. Raises JSONDecodeError for what is no JSON, DataError for JSON that is refused."""
    try:
        value, end = DECODER.raw_decode(text, position)
        if SURROGATE.search(text, position, end):
            json.dumps(value, ensure_ascii=False).encode()
    except _Refused as error:
        raise DataError(f"{where}, line {number}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}, line {number}: nested too deep to be read") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}, line {number}: a \\ud… escape without its other half is no character; write the character itself, or both "
            "halves"
        ) from error
    return value, end


class _Refused(Exception):
    """Why a value is refused that Python's decoder would read."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _Refused(f'the key "{twice}" stands twice in one object; remove one')
    return value


def _real(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused(
            f"the number {text[:40]} is too large for a float; write a smaller one, or null"
        )
    return value


def _whole(text: str) -> int | float:
    if text == "-0" or len(text) > 20:
        return _real(text)
    value = int(text)
    return value if -(2**63) <= value < 2**63 else _real(text)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_real, parse_int=_whole)


def _decoded(data: bytes, number: int, where: str, path: Path) -> str:
    """The text of bytes that begin on line `number`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        start = data.rfind(b"\n", 0, error.start) + 1
        near = data[max(start, error.start - 20) : error.start + 20].split(b"\n")[0]
        raise DataError(
            f"{where}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; as Latin-1 it would read "
            f'"{near.decode("latin-1")}". If that is right, convert the file: '
            f"iconv -f LATIN1 -t UTF-8 '{path}' > converted.jsonl"
        ) from error


def _refuse_other_kinds(start: bytes, where: str, path: Path) -> None:
    """Raise DataError where a file's first bytes show that it is no UTF-8 text."""
    if start.startswith(POINTER):
        raise DataError(
            f"{where}: is a pointer file of Git LFS, not the data; fetch the data with `git lfs pull`"
        )
    if start.startswith(UTF16):
        raise DataError(
            f"{where}, line 1: is UTF-16, and UTF-8 is expected; convert it: "
            f"iconv -f UTF-16 -t UTF-8 '{path}' > converted{path.suffix}"
        )


def _refuse(error: json.JSONDecodeError, number: int, where: str) -> NoReturn:
    near = error.doc[max(0, error.pos - 20) : error.pos + 20].strip()
    what = error.msg.removesuffix(" at")
    raise DataError(
        f"{where}, line {number + error.lineno - 1}: not JSON: {what} at column {error.colno}, near {near!r}"
    ) from error


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in BLANKS:
        position += 1
    return position


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where it is compressed."""
    file = path.open("rb")
    packed = file.read(2) == GZIP
    file.seek(0)
    if not packed and path.suffix == ".gz":
        file.close()
        raise OSError(f"not a gzip file, though its name ends in {path.suffix}")
    if not packed:
        return file
    file.close()
    return gzip.open(path, "rb")  # type: ignore[return-value]
