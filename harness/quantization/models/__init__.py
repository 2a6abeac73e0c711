"""Model families: how the blocks, matrices and ends of an architecture are found. One file per family.

family_of(config)       the family of a config.json
read_config(folder)     that config.json
shapes(folder)          what a plan knows of a model, without its weights
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core import plugins
from harness.core.errors import ModelError, unknown_name
from harness.core.shapes import Shapes
from harness.quantization.models.protocols import DecoderFamily

__all__ = ["family_of", "read_config", "shapes"]

ANY = "*"  # in `architectures`: serves what no other family names


def family_of(config: Mapping[str, Any]) -> DecoderFamily:
    """The family that names the config's architecture. Raises ModelError with the nearest known one when none does."""
    wanted = config.get("architectures") or ()
    by_architecture = {
        a: name
        for name, facts in plugins.find("family").items()
        for a in facts.get("architectures", ())
    }
    name = next(
        (by_architecture[a] for a in wanted if a in by_architecture), by_architecture.get(ANY)
    )
    if name is None:
        named = wanted[0] if wanted else "(config.json names none)"
        raise ModelError(
            unknown_name("model family for the architecture", named, set(by_architecture))
            + ". Add one as harness/quantization/models/<name>.py (docs: how to add a model)"
        )
    return plugins.load("family", name)()


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises ModelError when it is missing or not JSON."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a model's config: {error}") from error


def shapes(folder: Path) -> Shapes:
    """Shapes of the model in a folder, from its config.json only."""
    path = folder / "config.json"
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    return _shapes(folder, stamp)


@functools.lru_cache(maxsize=64)
def _shapes(folder: Path, stamp: int) -> Shapes:
    config = read_config(folder)
    try:
        return family_of(config).shapes(config)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
