"""The words of a command: the sweep that they name, and where the results lie.

`--runs PLACE` and `runs=PLACE` mean the same for every command.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from harness.core.errors import ConfigError

if TYPE_CHECKING:
    from harness.core.sweep import Sweep
    from harness.storage.store import Store

PLAIN = re.compile(r"[\w./:~+-]+")  # a value that needs no quotes in the grammar of overrides


class RunsCommand(TyperCommand):
    """A command without overrides: takes `runs=PLACE` for its option `--runs`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words with `runs=PLACE` as the option."""
        return super().parse_args(ctx, [word for each in args for word in _as_option(each)])


def _as_option(word: str) -> list[str]:
    return ["--runs", word.partition("=")[2]] if word.startswith("runs=") else [word]


def with_runs(overrides: Sequence[str] | None, runs: str) -> list[str]:
    """Overrides with the place that the option `--runs` names, "" for none; one that is typed as an override wins."""
    given = list(overrides or [])
    if not runs or any(word.startswith("runs=") for word in given):
        return given
    value = runs if PLAIN.fullmatch(runs) else "'" + runs.replace("'", "\\'") + "'"
    return [*given, f"runs={value}"]


def place_alone(
    sweep: str | None, overrides: Sequence[str] | None, runs: str
) -> tuple[str | None, str]:
    """(sweep, runs) of a command that works without a sweep: a single word `runs=PLACE` is no sweep but a place."""
    if sweep is not None and sweep.startswith("runs=") and not overrides:
        return None, sweep.partition("=")[2]
    return sweep, runs


def load(sweep: str | None, overrides: Sequence[str] | None, runs: str = "") -> tuple[Sweep, Store]:
    """The sweep that the words of a command name, with the cells that its bit budgets have chosen, and the store of its results.

    Raises ConfigError where the words name nothing.
    """
    from harness.config.kept_sweeps import load_sweep
    from harness.config.overrides import split_arguments
    from harness.storage.budgets import resolved
    from harness.storage.store import Store

    name, changes = split_arguments(sweep, overrides)
    if name is None and not changes:
        raise ConfigError(
            "name a sweep (`harness list sweeps`) or define a grid, e.g. model=demo method=rtn scheme=w4"
        )
    loaded = load_sweep(name, with_runs(changes, runs))
    store = Store(loaded.runtime.runs)
    return resolved(loaded, store), store
