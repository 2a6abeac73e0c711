"""Every error that a user of the harness can meet.

    HarnessError
    ├── ConfigError        a sweep file, an override or a name is wrong                    exit 2
    ├── PlanError          cells that cannot run; lists every refusal                      exit 3
    ├── ModelError         a model folder or hub id cannot be read, or its family is unknown
    ├── DataError          a corpus, a task file or a data set is missing or malformed
    ├── MethodError        the numbers of a method broke down (singular Hessian, NaN, …)
    ├── EvaluationError    an evaluation could not be carried out
    ├── StoreError         runs/ cannot be read or written; a checkpoint is damaged
    ├── ScheduleError      a worker, a node or the cluster failed
    └── TrackingError      MLflow cannot be reached or refuses

A message says what went wrong, where, with which value, and what to do; all offenders in one message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HarnessError(Exception):
    """Base of all errors meant for the user; `exit_code` is what the shell returns for it."""

    exit_code = 1


class ConfigError(HarnessError):
    """A sweep file, an override or a name is wrong. Nothing was started."""

    exit_code = 2


class PlanError(HarnessError):
    """Some cells cannot run. Nothing was started."""

    exit_code = 3


class ModelError(HarnessError):
    """A model cannot be read, or its architecture has no family."""


class DataError(HarnessError):
    """A corpus, task file or data set is missing or malformed."""


class MethodError(HarnessError):
    """The numbers of a method broke down; the cell fails under its own name, with no substitute."""


class EvaluationError(HarnessError):
    """An evaluation could not be carried out."""


class StoreError(HarnessError):
    """The store cannot be read or written, or a checkpoint in it is damaged."""


class ScheduleError(HarnessError):
    """A worker, a node or the cluster failed."""


class TrackingError(HarnessError):
    """The tracking store cannot be reached or refuses a write."""


def unknown_name(
    kind: str, name: str, known: Iterable[str], where: str = "", command: str = ""
) -> str:
    """One sentence for a name that does not exist: the nearest valid one first, then the list.

    command: what lists all valid names; then the three nearest alone are named.

    >>> unknown_name("method", "gtpq", ["rtn", "gptq"])
    'no method "gtpq"; did you mean "gptq"? Known: gptq, rtn'
    >>> unknown_name("method", "gtpq", ["rtn", "gptq"], command="harness list methods")
    'no method "gtpq"; did you mean "gptq"? `harness list methods` lists all.'
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3 if command else 1, cutoff=0.5)
    quoted = ", ".join(f'"{each}"' for each in near)
    guess = f"; did you mean {quoted}?" if near else "."
    place = f"{where}: " if where else ""
    listed = f" Known: {', '.join(choices)}" if choices else " None are known."
    if command and choices:
        listed = f" `{command}` lists all."
    return f'{place}no {kind} "{name}"{guess}{listed}'
