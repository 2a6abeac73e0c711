"""Progress of a run, counted from its events, and the interface of a display."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from harness.core.cell import Cell, cell_key
from harness.core.events import Event, Failed, Progress, Quantized, Scored
from harness.planning.plan import Plan


class Tally:
    """The progress of a sweep: for each cell the checkpoint and evaluations that are pending, updated by events.

    Units of work are checkpoints and evaluations; a block or a batch is a fraction of one. The remaining time follows from them.
    """

    def __init__(self, plan: Plan) -> None:
        self.cells: dict[str, Cell] = {cell_key(cell): cell for cell in plan.sweep.cells}
        self.pending: dict[str, set[str]] = {cell_key(cell): set() for cell in plan.missing}
        for each in plan.passes:
            for cell in each.cells:
                self.pending[cell_key(cell)].add("checkpoint")
        for scoring in plan.scorings:
            for cell, evaluations in zip(scoring.cells, scoring.evaluations, strict=True):
                self.pending[cell_key(cell)] |= {evaluation.name for evaluation in evaluations}
        self.units = sum(map(len, self.pending.values()))
        self.failed: dict[str, Failed] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        self.running: dict[str, Progress] = {}
        self.began = time.monotonic()

    @property
    def done(self) -> list[str]:
        """Keys of the missing cells that are now complete."""
        return [key for key, waits in self.pending.items() if not waits and key not in self.failed]

    @property
    def fraction(self) -> float:
        """Fraction of the work that is done or has failed, 0 to 1."""
        if not self.units:
            return 1.0
        left = sum(len(waits) for key, waits in self.pending.items() if key not in self.failed)
        underway = sum(
            step.step / step.steps
            for key, step in self.running.items()
            if step.steps and key not in self.failed
        )
        return min(1.0, max(0.0, (self.units - left + min(underway, left)) / self.units))

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining seconds; None until 5 % is done."""
        fraction = self.fraction
        return (
            None if fraction < 0.05 else (time.monotonic() - self.began) * (1 - fraction) / fraction
        )

    def add(self, event: Event) -> list[str]:
        """Count an event; return the keys of the cells that it completes."""
        finished = []
        for key in event.cell_keys:
            if key not in self.pending:
                continue
            waits = self.pending[key]
            match event:
                case Progress():
                    self.running[key] = event
                case Quantized():
                    waits.discard("checkpoint")
                    self.running.pop(key, None)
                case Scored():
                    waits.discard(event.evaluation)
                    self.metrics.setdefault(key, {}).update(event.metrics)
                    self.running.pop(key, None)
                case Failed():
                    self.running.pop(key, None)
                    if not event.retry:
                        self.failed[key] = event
                case _:
                    continue
            if not waits and isinstance(event, Quantized | Scored) and key not in self.failed:
                finished.append(key)
        return finished


class Display(Protocol):
    """Shows a running sweep. event: called after the tally has counted the event; finished: keys of the cells that it completed.

    A display may have a method `interrupted()`: Ctrl-C arrived. It is called in the handler of the signal, while anything else
    may be printing.
    """

    def line(self, text: str) -> None: ...

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing: for notebooks and tests."""

    def line(self, text: str) -> None:
        pass

    def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        pass
