"""Sweeps of model × method × bit width for quantized language models, from a notebook:

    import harness
    harness.plan("demo")                            # one row per cell: done, to do, or refused and why
    records = harness.run("demo", "cluster=local")  # carries it out, or finishes it; one row per cell with every metric
    harness.table("demo")                           # the sweep's table at full precision

Overrides are those of the shell. Everything is imported when it is used: importing the package takes no time.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

__all__ = ["__version__", "plan", "run", "table"]
__version__ = "0.1.0"

# Idle threads of torch sleep at barriers. By default they spin, and beside other busy processes an operation then waits for
# threads that do not run: a pass can take a hundred times as long. OpenMP reads this once, when torch is loaded, and this
# package is imported first on every road: shell, workers, notebooks.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def plan(sweep: str | None = None, *overrides: str) -> pandas.DataFrame:
    """What a sweep would do, one row per cell: state (done, evaluate, quantize, refused), missing evaluations, reasons.

    `.attrs["text"]` is the plan as `harness plan` prints it. Raises ConfigError when the sweep itself is wrong.
    """
    from harness.config.grid import load_sweep
    from harness.planning.planner import make
    from harness.planning.render import render
    from harness.storage.store import Store

    loaded = load_sweep(*_split(sweep, overrides))
    made = make(loaded, Store(loaded.runtime.runs))
    frame = made.frame()
    frame.attrs["text"] = render(made)
    return frame


def run(sweep: str | None = None, *overrides: str) -> pandas.DataFrame:
    """Carry a sweep out, or finish it; one row per cell with its metrics and, where it failed, the reason.

    Raises PlanError with every refusal before anything starts. `.attrs["summary"]` is the summary that `harness run` prints.
    """
    from harness.config.grid import load_sweep
    from harness.execution import driver

    summary = driver.run(load_sweep(*_split(sweep, overrides)))
    frame = driver.frame(summary.records)
    frame.attrs["summary"] = summary.text
    return frame


def table(sweep: str, *overrides: str, name: str = "") -> pandas.DataFrame:
    """A table of a sweep, its first when no name is given: numbers at full precision, published ones beside ours."""
    from harness.config.grid import load_sweep
    from harness.core.errors import ConfigError, unknown_name
    from harness.reporting.render import frame
    from harness.reporting.tables import build
    from harness.storage.store import Store

    loaded = load_sweep(*_split(sweep, overrides))
    store = Store(loaded.runtime.runs)
    chosen = next((each for each in loaded.shown_tables if not name or each.name == name), None)
    if chosen is None:
        raise ConfigError(
            unknown_name(
                "table", name, [each.name for each in loaded.shown_tables], f"sweep {loaded.name}"
            )
        )
    return frame(build(loaded, chosen, [store.record(cell) for cell in loaded.cells], store))


def _split(sweep: str | None, overrides: tuple[str, ...]) -> tuple[str | None, list[str]]:
    from harness.config.overrides import split_arguments

    return split_arguments(sweep, list(overrides))
