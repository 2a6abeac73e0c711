"""Sweeps with a bit budget over the demo model, small enough for tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from harness.config.grid import load_sweep
from harness.core.sweep import Sweep
from harness.execution import driver
from harness.execution.allocation import allocate
from harness.execution.tasks import AllocateTask
from harness.storage.store import Store

SIZES = [2.9, 3.594]


def budget_sweep(folder: Path, *overrides: str, of: Any = None, **entry: Any) -> Sweep:
    """A sweep of the demo model with one budget over GPTQ at 2, 3 and 4 bits; `entry` changes its keys, `of` its candidates."""
    budget = {
        "name": "mixed",
        "of": {"method": "gptq", "scheme": ["w2g32", "w3g32", "w4g32"], **(of or {})},
        "bits": SIZES,
        "windows": 1,
        "trials": 6,
        **entry,
    }
    content = {
        "model": "demo",
        "calibration": "demo",
        "calibration.samples": 4,
        "calibration.length": 64,
        "inputs": "full_precision",
        "budgets": [budget],
        "evaluations": ["demo_perplexity"],
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    own = (f"runs={folder / 'runs'}", "tracking=none", "device=cpu", "cluster=local")
    return load_sweep(str(path), [*own, "cluster.workers=1", "evaluations.limit=16", *overrides])


def make_candidates(sweep: Sweep) -> Store:
    """Make and score the cells of a sweep without its budgets."""
    summary = driver.run(dataclasses.replace(sweep, budgets=()))
    assert summary.exit_code == 0, summary.text
    return Store(sweep.runtime.runs)


def choose(sweep: Sweep, store: Store) -> list[Any]:
    """The events of the allocation of the sweep's first budget."""
    return list(
        allocate(AllocateTask(sweep.budgets[0], sweep.name, str(store.place)), store, "cpu")
    )
