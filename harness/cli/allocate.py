"""`harness allocate`: the budgets that a command line asks for, and the sweep of their candidates."""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Sequence

from harness.config.budgets import Entry, budgets_of, sizes_of
from harness.core.budget import Budget, Size, Together
from harness.core.cell import Calibration, Cell, baseline_of, cell_key
from harness.core.errors import ConfigError, HarnessError, unknown_name
from harness.core.sweep import Sweep, command_line
from harness.storage.store import Store

WHERE = "harness allocate"


def asked_sizes(bits: str, size: str) -> tuple[Size, ...]:
    """The sizes of --bits and --bytes, each one or several with commas; empty where neither is given."""
    if not bits and not size:
        return ()
    try:
        numbers = tuple(float(text) for text in bits.split(",") if text)
    except ValueError:
        raise ConfigError(f"{WHERE}: --bits {bits}: numbers are expected, 3.2 or 2.8,3.2") from None
    texts = tuple(text for text in size.split(",") if text)
    return sizes_of(Entry("", numbers, texts), WHERE)


def run_allocation(
    sweep: Sweep, store: Store, bits: str, size: str, name: str, together: str, trials: int | None
) -> int:
    """Make the candidates that are missing, choose, and print the outcome; the exit code. Arguments are those of the command."""
    from harness.cli.progress import show_events
    from harness.execution.driver import run
    from harness.reporting.budgets import budget_rows, render_budgets

    narrowed = with_budgets(sweep, asked_sizes(bits, size), name, together, trials)
    summary = run(narrowed, show_events())
    print(summary.text)
    print(render_budgets(budget_rows(narrowed, store)), end="")
    return summary.exit_code


def with_budgets(
    sweep: Sweep, sizes: Sequence[Size], name: str, together: str, trials: int | None
) -> Sweep:
    """A sweep of the candidates and their baselines alone, with the budgets that are asked for.

    sizes   empty: those that the sweep's budgets state
    name    of one budget; "": all
    Raises ConfigError where there are no candidates, or no size.
    """
    known = sweep.budgets or _from_cells(sweep, sizes)
    chosen = [each for each in known if not name or each.name == name]
    if not chosen:
        raise ConfigError(unknown_name("budget", name, [each.name for each in known], sweep.name))
    if together and together not in typing.get_args(Together):
        raise ConfigError(unknown_name("--together", together, typing.get_args(Together), WHERE))
    if trials is not None and trials < 0:
        raise ConfigError(f"{WHERE}: --trials {trials}: a number from 0 is expected")
    budgets = tuple(
        dataclasses.replace(
            each,
            sizes=tuple(sizes) or each.sizes,
            together=typing.cast(Together, together or each.together),
            trials=each.trials if trials is None else trials,
        )
        for each in chosen
    )
    cells = {
        cell_key(cell): cell
        for budget in budgets
        for candidate in budget.candidates
        for cell in (baseline_of(candidate), candidate)
    }
    options = _options(sizes, name, together, trials)
    return dataclasses.replace(
        sweep,
        name=f"{sweep.name}-allocate",
        cells=tuple(cells.values()),
        skips=(),
        tables=(),
        findings=(),
        first=(),
        budgets=budgets,
        command=shlex.join([*shlex.split(command_line(sweep, "allocate")), *options]),
    )


def _from_cells(sweep: Sweep, sizes: Sequence[Size]) -> tuple[Budget, ...]:
    """Budgets of a sweep that states none: one for each method whose cells differ in their weight scheme alone."""
    if not sizes:
        raise ConfigError(
            f"sweep {sweep.name} states no budgets; say how large: {WHERE} {sweep.name} --bits 3.2"
        )
    windows = next((cell.calibration for cell in sweep.cells if cell.calibration is not None), None)
    by_method: dict[str, list[tuple[Cell, Calibration | None]]] = {}
    for cell in sweep.cells:
        if not cell.method.is_baseline:
            by_method.setdefault(cell.method.name, []).append((cell, cell.calibration or windows))
    entry = Entry("", bits=(1.0,))
    found: list[Budget] = []
    problems: list[str] = []
    for method, candidates in by_method.items():
        named = dataclasses.replace(entry, name=method)
        try:
            found += budgets_of(
                named, candidates, f"{sweep.name}: {method}", candidates[0][0].evaluations
            )
        except HarnessError as error:
            problems += str(error).splitlines()
    if not found:
        listed = "\n  ".join(problems or [f"{sweep.name}: no cells that are quantized"])
        raise ConfigError(
            f"no budget can be made of these cells:\n  {listed}\nNarrow them with method= and scheme=, or state `budgets:`."
        )
    return tuple(found)


def _options(sizes: Sequence[Size], name: str, together: str, trials: int | None) -> list[str]:
    bits = ",".join(f"{size.bits:g}" for size in sizes if size.bits)
    numbers = ",".join(str(size.bytes) for size in sizes if size.bytes)
    words = {
        "--bits": bits,
        "--bytes": numbers,
        "--budget": name,
        "--together": together,
        "--trials": "" if trials is None else str(trials),
    }
    return [word for option, value in words.items() if value for word in (option, value)]
