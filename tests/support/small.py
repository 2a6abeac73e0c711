"""Cells, windows and writers for passes over tiny models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.core.cell import (
    Calibration,
    Cell,
    Method,
    Model,
    Part,
    Scheme,
    WeightScheme,
    make_part,
    quantize_key,
)
from harness.core.events import Event, Failed
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.pipeline.passes import run_pass

CALIBRATION = Calibration("tiny", "demo", samples=6, length=40, digest="tiny")


def windows(samples: int = 6, length: int = 40, vocabulary: int = 256, seed: int = 0) -> Tensor:
    return torch.randint(
        0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed)
    )


def part(name: str, kind: str = "rounding", **settings: Any) -> Part:
    """A part with the facts of its plugin, as a config makes it."""
    return make_part(kind, name, settings)


RTN = Method("rtn", rounding=part("rtn"))
GPTQ = Method("gptq", rounding=part("gptq"))
SEQUENTIAL = Method("gptq_sequential", rounding=part("gptq", sequential=True))


def cell(folder: Path, method: Method, bits: int = 4, group_size: int = 32, **fields: Any) -> Cell:
    scheme = Scheme(f"w{bits}g{group_size}", WeightScheme(bits=bits, group_size=group_size))
    model = Model("tiny", str(folder), digest=folder.name, dtype=fields.pop("dtype", "float32"))
    return dataclasses.replace(Cell(model, method, scheme, CALIBRATION), **fields)


def quantize(
    cells: Sequence[Cell],
    folder: Path,
    store: Path,
    tokens: Tensor | None = None,
    stop_after: int | None = None,
) -> list[Event]:
    """Run a pass, every checkpoint in store/<quantize_key>; stop_after: close the generator after so many blocks."""
    writers = {
        quantize_key(c): CheckpointWriter(store / quantize_key(c), {"key": quantize_key(c)})
        for c in cells
    }
    events: list[Event] = []
    walk = run_pass(cells, folder, windows() if tokens is None else tokens, writers)
    for event in walk:
        events.append(event)
        if stop_after is not None and getattr(event, "step", 0) >= stop_after:
            walk.close()
            break
    return events


def failures(events: Sequence[Event]) -> list[Failed]:
    return [event for event in events if isinstance(event, Failed)]


def content(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint by name: bytes, and the manifest without its timings."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    if "manifest.json" in found:
        found["manifest.json"] = {
            k: v for k, v in json.loads(found["manifest.json"]).items() if k != "seconds"
        }
    return found
