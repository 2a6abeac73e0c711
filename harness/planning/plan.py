"""The types of a plan: refusals, passes, scorings, and the plan that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.core.cell import Cell, Evaluation, cell_key, quantize_key
from harness.core.sweep import Sweep

if TYPE_CHECKING:
    import pandas


CHECKPOINTS_PER_PASS = 16  # a larger pass would save only reading, and the activations of every input stream wait on the CPU


@dataclass(frozen=True)
class Refusal:
    """A cell that cannot run, and every reason for it."""

    cell: Cell
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Pass:
    """One pass over the blocks of a model.

    cells    every cell whose checkpoint it makes; cells of one quantize_key share the checkpoint
    sharing  what the cells have in common, in words
    seconds  of work, None where neither records nor shapes give an estimate
    peak_memory_bytes  on device and CPU together; disk_bytes: of its checkpoints
    exclusive          no other task may run at the same time, because a similar pass ran out of memory before
    needs_full_gpu     it takes a GPU of its own where tasks share GPUs
    priority_tier      0 for the first entry of the sweep's `first:`; all cells of a pass are of one tier
    limit              checkpoints that memory allows in one such pass; passes are joined up to it while no slot is free
    """

    cells: tuple[Cell, ...]
    sharing: str
    seconds: float | None
    peak_memory_bytes: int
    disk_bytes: int
    exclusive: bool = False
    needs_full_gpu: bool = False
    priority_tier: int = 0
    limit: int = CHECKPOINTS_PER_PASS

    @property
    def checkpoints(self) -> tuple[Cell, ...]:
        """One cell per checkpoint, in order."""
        return tuple({quantize_key(cell): cell for cell in reversed(self.cells)}.values())[::-1]


@dataclass(frozen=True)
class Scoring:
    """The missing evaluations of one model's cells; evaluations[i] belong to cells[i]. seconds as in `Pass`.

    devices         GPUs of one node for the first try: min_gpus, or more where a similar evaluation ran out of memory before
    min_gpus        GPUs that the size of the model takes
    needs_full_gpu  it takes a GPU of its own where tasks share GPUs
    batch_size      1 where memory ran out in larger batches; 0: as the sweep says
    offload         memory ran out on all GPUs of a node: blocks stay in main memory
    """

    cells: tuple[Cell, ...]
    evaluations: tuple[tuple[Evaluation, ...], ...]
    seconds: float | None
    peak_memory_bytes: int
    devices: int = 1
    min_gpus: int = 1
    needs_full_gpu: bool = False
    batch_size: int = 0
    offload: bool = False

    @property
    def count(self) -> int:
        return sum(map(len, self.evaluations))


@dataclass(frozen=True)
class Plan:
    """What a run of a sweep will do.

    done, missing  partition the cells that can run
    problems       of the sweep as a whole: disk, a store that cannot be written
    notes          on the models to quantize (parts that stay as they are, scales that are not folded), warnings of methods, and on
                   memory that ran out
    used_bytes     of the store, where it has a quota
    """

    sweep: Sweep
    done: tuple[Cell, ...]
    missing: tuple[Cell, ...]
    refused: tuple[Refusal, ...]
    passes: tuple[Pass, ...]
    scorings: tuple[Scoring, ...]
    problems: tuple[str, ...]
    workers: int
    notes: tuple[str, ...] = ()
    used_bytes: int = 0

    @property
    def checkpoints(self) -> int:
        return sum(len(each.checkpoints) for each in self.passes)

    @property
    def evaluations(self) -> int:
        return sum(scoring.count for scoring in self.scorings)

    @property
    def seconds(self) -> float | None:
        """Wall time with the work spread evenly over the workers; None while a part of it has neither record nor formula."""
        parts = [
            *(each.seconds for each in self.passes),
            *(scoring.seconds for scoring in self.scorings),
        ]
        known = [part for part in parts if part is not None]
        return sum(known) / max(1, self.workers) if len(known) == len(parts) else None

    @property
    def disk_bytes(self) -> int:
        return sum(each.disk_bytes for each in self.passes)

    def frame(self) -> pandas.DataFrame:
        """One row per cell: model, method, scheme, state, missing evaluations, reasons, key."""
        import pandas

        names = ["model", "method", "scheme", "state", "missing", "reasons", "key"]
        return pandas.DataFrame(self.rows(), columns=names)

    def facts(self) -> dict[str, Any]:
        """The plan as JSON values: cells, passes, evaluations, problems, notes, costs."""
        return {
            "sweep": self.sweep.name,
            "cells": self.rows(),
            "done": len(self.done),
            "missing": len(self.missing),
            "refused": len(self.refused),
            "passes": [
                {
                    "model": each.cells[0].model.name,
                    "cells": [cell_key(cell) for cell in each.cells],
                    "sharing": each.sharing,
                    "seconds": each.seconds,
                    "peak_memory_bytes": each.peak_memory_bytes,
                    "disk_bytes": each.disk_bytes,
                }
                for each in self.passes
            ],
            "scorings": [
                {
                    "model": each.cells[0].model.name,
                    "evaluations": each.count,
                    "seconds": each.seconds,
                    "peak_memory_bytes": each.peak_memory_bytes,
                }
                for each in self.scorings
            ],
            "skipped": {skip.reason: list(skip.titles) for skip in self.sweep.skips},
            "problems": list(self.problems),
            "notes": list(self.notes),
            "workers": self.workers,
            "seconds": self.seconds,
            "disk_bytes": self.disk_bytes,
        }

    def rows(self) -> list[dict[str, str]]:
        """One mapping per cell, as in `frame`."""
        scores = {
            cell_key(cell): tuple(evaluation.name for evaluation in wanted)
            for scoring in self.scorings
            for cell, wanted in zip(scoring.cells, scoring.evaluations, strict=True)
        }
        reasons = {id(refusal.cell): refusal.reasons for refusal in self.refused}
        waiting = {cell_key(cell) for each in self.passes for cell in each.cells}
        rows = []
        for cell in self.sweep.cells:
            key = cell_key(cell)
            state = (
                "refused"
                if id(cell) in reasons
                else "quantize"
                if key in waiting
                else "evaluate"
                if key in scores
                else "done"
            )
            rows.append(
                {
                    "model": cell.model.name,
                    "method": cell.method.name,
                    "scheme": cell.scheme.name,
                    "state": state,
                    "missing": ", ".join(scores.get(key, ())),
                    "reasons": "; ".join(reasons.get(id(cell), ())),
                    "key": key[:12],
                }
            )
        return rows
