"""One way to say where the results lie: `--runs PLACE` and `runs=PLACE` mean the same for every command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

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
