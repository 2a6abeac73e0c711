"""JSON files with NaN and infinities spelled out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.storage.atomic_write import write_aside

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_json(path: Path, content: Any, durable: bool = True) -> None:
    """Write readable JSON aside, then rename. Raises StoreError when the disk refuses."""
    text = json_text(content)
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"), durable)


def json_text(content: Any) -> str:
    """Readable JSON; what is not finite becomes a string."""
    return (
        json.dumps(encode_non_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def encode_non_finite(value: Any) -> Any:
    """JSON values with NaN and infinities as objects."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): encode_non_finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_non_finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str | int | float | bool):
        return encode_non_finite(value.item())  # a NumPy scalar
    return value


def decode_non_finite(value: Any) -> Any:
    """The inverse of `encode_non_finite`."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: decode_non_finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [decode_non_finite(item) for item in value]
    return value
