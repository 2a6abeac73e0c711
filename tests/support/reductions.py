"""Reduced models of tiny ones, and what they compute."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import small
import torch
from torch import Tensor

from harness.core.cell import Cell, Method, Scheme
from harness.quantization.inference.load import load
from harness.quantization.pipeline.reduction import run_reduction


def reducing(name: str, rounding: str | None = None, **settings: Any) -> Method:
    part = small.part(name, "reduction", **settings)
    return Method(name, reduction=part, rounding=small.part(rounding) if rounding else None)


def reduced_cell(folder: Path, method: Method, **fields: Any) -> Cell:
    cell = small.cell(folder, method, **fields)
    return cell if method.quantizes else dataclasses.replace(cell, scheme=Scheme("full"))


def reduce(folder: Path, target: Path, method: Method, windows: Tensor | None) -> dict[str, Any]:
    list(run_reduction(reduced_cell(folder, method), folder, windows, target))
    record: dict[str, Any] = json.loads((target / "reduction.json").read_text(encoding="utf-8"))
    return record


def logits(folder: Path, windows: Tensor) -> Tensor:
    baseline = small.cell(folder, Method("none"))
    model, _ = load(dataclasses.replace(baseline, scheme=Scheme("full")), folder, None)
    with torch.no_grad():
        found: Tensor = model(input_ids=windows, use_cache=False).logits
    return found
