"""Digests of files, cached between runs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import HarnessError


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; remembered by path, size and modification time, since a model's weights take minutes to read."""
    try:
        status = path.stat()
        name, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        known = _file_digests().get(name)
        if known is not None and known[:2] == stamp:
            return str(known[2])
        with path.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HarnessError(f"{path}: cannot be read: {error}") from error
    if status.st_size > 1 << 20:  # below a megabyte, hashing again is cheaper than remembering
        _file_digests()[name] = [*stamp, value]
        write_cache(cache_folder() / "digests.json", _file_digests())
    return value


def cache_folder() -> Path:
    """HARNESS_CACHE, or ~/.cache/quantization-harness."""
    return Path(os.environ.get("HARNESS_CACHE") or "~/.cache/quantization-harness").expanduser()


@functools.cache
def _file_digests() -> dict[str, list[Any]]:
    try:
        known = json.loads((cache_folder() / "digests.json").read_text())
    except (OSError, ValueError):
        return {}  # a lost cache costs time alone
    return known if isinstance(known, dict) else {}


def write_cache(path: Path, content: Mapping[str, Any]) -> None:
    """Written under another name and renamed; skipped where the home folder is read-only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".json", delete=False
        ) as file:
            json.dump(content, file)
        os.replace(file.name, path)
    except OSError:
        pass  # it is found out again next time
