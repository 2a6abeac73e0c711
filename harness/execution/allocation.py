"""The body of an allocation task: choose and measure the assemblies of one bit budget, and store what was chosen.

    candidates' checkpoints → costs, tables of values → proposals, each the exact choice for its table → the best of proposals and
    uniform cells by measured divergence → swaps, each measured → an ordinary cell; where exact, its checkpoint too

Every measured divergence is kept in the store, so that a task that was killed goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.budget import Size, budget_key
from harness.core.cell import Cell, cell_key, digest, quantize_key, to_json
from harness.core.errors import HarnessError, PlanError
from harness.core.events import Allocated, Event, Progress, failure
from harness.data import model_folders
from harness.execution import provenance
from harness.execution.checkpoints import fingerprint, load_tokenizer
from harness.execution.process import device_name, release, thread_count
from harness.execution.tasks import AllocateTask
from harness.planning.allocation import (
    Choice,
    Matrix,
    bits_of,
    choose,
    costs_of,
    groups_of,
    improve,
    matrices_in,
    misfit,
    mixed_cell,
)
from harness.storage.budgets import chosen_cell, needs_measuring, outcome
from harness.storage.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from harness.quantization.pipeline.assembly import Assembly, Candidates

MEASURED = ".measured"  # folder of runs/budgets/ with divergences, shared by all sweeps
SAVE_SECONDS = 10.0  # between two writes of the measurements
Table = list[list[float]]


def allocate(task: AllocateTask, store: Store, device: str) -> Iterator[Event]:
    """Choose for every size of the task's budget that has no choice yet; an Allocated event for each.

    Failed, naming a candidate, where one has no checkpoint; and for a size that no assembly has.
    """
    budget, keys = task.budget, tuple(map(cell_key, task.budget.candidates))
    with store.lock(f"budget-{digest([task.sweep, budget.name])}"):
        try:
            with ExitStack() as stack:
                work = _Work(task, store, device, stack)
                for number, size in enumerate(budget.sizes):
                    yield Progress(time.time(), keys, budget.name, number, len(budget.sizes))
                    name, content = budget.name_of(size), outcome(store, task.sweep, budget, size)
                    if content is None:
                        content = work.choose(size)
                    elif needs_measuring(content, budget, store):
                        content = {**content, "divergence_made": work.measure_made(content)}
                    else:
                        continue
                    store.write_budget(task.sweep, name, content)
                    yield Allocated(time.time(), keys, budget=name, record=content)
        except Exception as error:  # a layout's code may raise anything
            yield failure(error, keys, f"budget {budget.name}")
        release(device)


class _Work:
    """One budget while it is chosen: candidates, costs, tables, and the assemblies measured so far."""

    def __init__(self, task: AllocateTask, store: Store, device: str, stack: ExitStack) -> None:
        from harness.quantization import models
        from harness.quantization.pipeline.assembly import Candidates, is_exact

        self.task, self.budget, self.store, self.device = task, task.budget, store, device
        cells = self.budget.candidates
        missing = [cell.title for cell in cells if store.manifest(quantize_key(cell)) is None]
        if missing:
            raise HarnessError(
                f"candidates without a checkpoint: {', '.join(missing)}; run the sweep again to make them"
            )
        self.folder = model_folders.model_folder(cells[0].model)
        self._stack = stack
        self.candidates: Candidates = Candidates(
            [stack.enter_context(store.reading(quantize_key(cell))) for cell in cells]
        )
        manifests = [checkpoint.manifest for checkpoint in self.candidates.checkpoints]
        shapes = models.shapes(self.folder)
        self.groups = groups_of(matrices_in(manifests[0]), shapes.linears, self.budget.together)
        self.costs, self.weights = costs_of(self.groups, manifests)
        self.exact = all(map(is_exact, cells))
        self.measured = _Measured(task, store)
        self._assembly: Assembly | None = None
        self._held: dict[Matrix, int] | None = None
        self._fisher: Table | None = None

    # --- measuring --------------------------------------------------------------------------------------------------------------

    def windows(self) -> Tensor:
        """The calibration windows of the measurement: the last ones of the draw."""
        from harness.quantization.calibration import draw_windows

        calibration, model = self.budget.calibration, self.budget.candidates[0].model
        if calibration is None:
            raise PlanError(
                f"budget {self.budget.name} measures on calibration windows, and there are none; add calibration to `of`"
            )
        tokenizer = load_tokenizer(self.folder, model.trust_remote_code)
        return draw_windows(calibration, tokenizer)[-self.budget.windows :]

    def assembly(self) -> Assembly:
        from harness.quantization.pipeline.assembly import Assembly

        if self._assembly is None:
            dtype = self.budget.candidates[0].model.dtype
            self._assembly = self._stack.enter_context(
                Assembly(self.folder, dtype, self.candidates, self.windows(), self.device)
            )
        return self._assembly

    def parts(self, choice: Choice) -> dict[Matrix, int]:
        """The candidate of each matrix."""
        return {
            matrix: candidate
            for members, candidate in zip(self.groups, choice, strict=True)
            for matrix in members
        }

    def divergence(self, choice: Choice) -> float:
        """Measured, or read back from an earlier measurement."""
        known = self.measured.get(choice)
        if known is None:
            if self._held is not None:
                self.assembly().hold(self._held)
            known = self.assembly().divergence(self.parts(choice))
            self.measured.add(choice, known)
        return known

    def hold(self, choice: Choice) -> None:
        """Later assemblies resemble this one."""
        self._held = self.parts(choice)

    def measure_made(self, content: Mapping[str, Any]) -> float:
        """The divergence of the checkpoint that a pass made of a choice."""
        from harness.quantization.pipeline.assembly import Assembly, Candidates

        cell = chosen_cell(content, self.budget)
        with self.store.reading(quantize_key(cell)) as place:
            made = Candidates([place])
            parts = dict.fromkeys(self.parts(tuple(content["choice"])), 0)
            with Assembly(
                self.folder, cell.model.dtype, made, self.windows(), self.device
            ) as assembly:
                return assembly.divergence(parts)

    # --- tables -----------------------------------------------------------------------------------------------------------------

    def table(self, name: str, anchor: Choice) -> Table:
        """Values [groups][candidates] of one proposal, lower is better."""
        if name == "output_error":
            return self._output_errors()
        if name == "fisher":
            if self._fisher is None:
                self._fisher = self._fisher_table()
            return self._fisher
        return self._divergences(anchor)

    def _output_errors(self) -> Table:
        errors = [
            {
                (entry["block"], entry["linear"]): entry
                for entry in checkpoint.manifest["layer_errors"]
            }
            for checkpoint in self.candidates.checkpoints
        ]
        # an expert that no token reached has no output error: its rounding cannot be told apart
        return [
            [sum(own[matrix].get("output_error", 0.0) for matrix in members) for own in errors]
            for members in self.groups
        ]

    def _fisher_table(self) -> Table:
        from harness.quantization.pipeline.assembly import fisher_table

        kept = self.measured.tables.get("fisher")
        if kept is not None:
            return kept
        with tempfile.TemporaryDirectory(prefix="harness-") as scratch:
            found = fisher_table(
                self.folder,
                self.budget.candidates[0].model.dtype,
                self.candidates,
                self.windows(),
                self.device,
                Path(scratch),
            )
        columns = range(len(self.budget.candidates))
        table = [
            [sum(found[matrix][k] for matrix in members) for k in columns]
            for members in self.groups
        ]
        self.measured.tables["fisher"] = table
        self.measured.save()
        return table

    def _divergences(self, anchor: Choice) -> Table:
        """Changes of the anchor's divergence, one group moved at a time."""
        self.hold(anchor)
        start = self.divergence(anchor)
        table = []
        for group, own in enumerate(anchor):
            row = []
            for candidate in range(len(self.budget.candidates)):
                moved = (*anchor[:group], candidate, *anchor[group + 1 :])
                row.append(0.0 if candidate == own else self.divergence(moved) - start)
            table.append(row)
        return table

    # --- the choice -------------------------------------------------------------------------------------------------------------

    def choose(self, size: Size) -> dict[str, Any]:
        """The content of a size's file."""
        budget = self.budget
        limit = size.limit(sum(self.weights))
        if reason := misfit(limit, self.costs, sum(self.weights)):
            raise PlanError(f"{size.label} is {reason}")
        count = len(budget.candidates)
        uniform = {k: (k,) * len(self.groups) for k in range(count)}
        within = [k for k in range(count) if bits_of(self.costs, uniform[k]) <= limit]
        names = budget.propose if budget.trials else budget.propose[:1]
        measures = budget.trials > 0 or "kl" in names
        known = {k: self.divergence(uniform[k]) for k in range(count)} if measures else {}
        if within and known:
            anchor = uniform[min(within, key=lambda k: (known[k], k))]
        elif within:
            anchor = uniform[max(within, key=lambda k: (bits_of(self.costs, uniform[k]), -k))]
        else:  # the assembly that takes most bits
            dear = [[float(max(row) - cost) for cost in row] for row in self.costs]
            anchor = choose(self.costs, dear, limit).choice
        tables: dict[str, Table] = {}
        proposals: dict[str, dict[str, Any]] = {}
        for name in names:
            tables[name] = self.table(name, anchor)
            found = choose(self.costs, tables[name], limit)
            proposals[name] = {
                "choice": list(found.choice),
                "bits": found.bits,
                "lost_bits": found.lost_bits,
                "divergence": self.divergence(found.choice) if budget.trials else None,
            }
        trials: list[dict[str, Any]] = []
        divergence: float | None = None
        if budget.trials:
            starts = [anchor, *(tuple(each["choice"]) for each in proposals.values())]
            start = min(starts, key=lambda choice: (self.divergence(choice), starts.index(choice)))
            self.hold(start)
            choice, divergence, tried = improve(
                start,
                self.divergence(start),
                self.costs,
                list(tables.values()),
                limit,
                self.divergence,
                budget.trials,
                self.hold,
            )
            trials = [to_json(trial) for trial in tried]
        else:
            choice = tuple(proposals[budget.propose[0]]["choice"])
        self.measured.save()
        base, cell = mixed_cell(
            budget.candidates, self.groups, self.weights, choice, budget.name_of(size)
        )
        made = len(set(choice)) == 1 or (self.exact and self._store(cell, choice))
        return {
            "key": budget_key(budget, size),
            "sweep": self.task.sweep,
            "command": self.task.again,
            "budget": budget.name,
            "size": to_json(size),
            "limit_bits": limit,
            "weights": sum(self.weights),
            "candidates": [
                {
                    "title": each.title,
                    "cell_key": cell_key(each),
                    "quantize_key": quantize_key(each),
                    "bits": bits_of(self.costs, uniform[k]),
                    "divergence": known.get(k),
                }
                for k, each in enumerate(budget.candidates)
            ],
            "uniform": anchor[0] if within and len(set(anchor)) == 1 else None,
            "groups": [
                {"weights": weights, "matrices": [list(matrix) for matrix in members]}
                for members, weights in zip(self.groups, self.weights, strict=True)
            ],
            "costs": self.costs,
            "tables": tables,
            "proposals": proposals,
            "trials": trials,
            "choice": list(choice),
            "bits": bits_of(self.costs, choice),
            "divergence": divergence,
            "exact": made,
            "base": base,
            "method": to_json(cell.method),
            "scheme": to_json(cell.scheme),
            "cell_key": cell_key(cell),
            "quantize_key": quantize_key(cell),
        }

    def _store(self, cell: Cell, choice: Choice) -> bool:
        """Write the checkpoint of an exact assembly; False where a pass would make another one."""
        from harness.quantization.formats.native import CheckpointWriter
        from harness.quantization.pipeline.assembly import write

        key = quantize_key(cell)
        with self.store.lock(f"checkpoint-{key}"):
            if self.store.manifest(key) is not None:
                return True
            with self.store.making(key) as place:
                writer = CheckpointWriter(place, fingerprint(cell), self.store.files.upload)
                written = write(self.candidates, self.parts(choice), cell, writer) is not None
        if written:
            facts = provenance.collect(
                device_name(self.device), thread_count(), self.task.command, self.store
            )
            self.store.write_provenance(self.store.open_cell(cell), {"quantize": facts})
        return written


class _Measured:
    """Divergences of assemblies, and tables that take long, kept in the store under a key of what they depend on."""

    def __init__(self, task: AllocateTask, store: Store) -> None:
        self._store = store
        sizeless = dataclasses.replace(task.budget, sizes=(), propose=(), trials=1)
        self._key = budget_key(sizeless, Size())
        kept = store.budget(MEASURED, self._key) or {}
        same = kept.get("key") == self._key
        self._values: dict[str, float] = dict(kept["divergences"]) if same else {}
        self.tables: dict[str, Table] = dict(kept["tables"]) if same else {}
        self._saved = time.monotonic()

    @staticmethod
    def _text(choice: Choice) -> str:
        return "".join(map(str, choice))  # of at most 8 candidates

    def get(self, choice: Choice) -> float | None:
        return self._values.get(self._text(choice))

    def add(self, choice: Choice, divergence: float) -> None:
        self._values[self._text(choice)] = divergence
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        content = {"key": self._key, "divergences": self._values, "tables": self.tables}
        self._store.write_budget(MEASURED, self._key, content)
        self._saved = time.monotonic()


__all__ = ["allocate"]
