"""What a sweep will do before it does anything: done, missing and refused cells, passes, evaluations, time, memory and disk.

A plan reads no weights: shapes come from a model's config.json, keys from the cells, and what is done from the store. Every
reason that any cell cannot run is collected before one is shown, so that one reading of the list repairs the whole sweep.

Cells with one quantize_key share one checkpoint. Checkpoints of one model and one draw of calibration windows share a pass: each
block is read once for all of them, and cells with the same input stream share its forward pass and its statistics.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from harness import plugins, sources
from harness.cell import Calibration, Cell, Evaluation, Model, Part, cell_key, quantize_key, score_key, to_json
from harness.errors import ConfigError, HarnessError, PlanError
from harness.files import bytes_of
from harness.store import Store
from harness.sweep import Runtime, Sweep

if TYPE_CHECKING:
    import pandas

    from harness.methods.protocols import Shapes

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CHECKPOINTS_PER_PASS = 16                       # more would save reading alone, and every stream waits on the CPU
FLOPS_PER_THREAD = 2e10                         # float32 matrix products of one CPU thread, as seen on a 2-core cloud machine
FLOPS_PER_GPU = 5e13                            # sustained in float32 accumulation; an order of magnitude, until records exist
ASSUMED_SLOTS = 4                               # of a cluster elsewhere, in estimates
MEMORY_SHARE = 0.9                              # of what is free; the rest is for the process and the allocator's gaps

T = TypeVar("T")


@dataclass(frozen=True)
class Refusal:
    """A cell that cannot run, and every reason for it."""

    cell: Cell
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Pass:
    """One walk through a model's blocks.

    cells    every cell whose checkpoint it makes; cells of one quantize_key share the checkpoint
    sharing  in words, what the cells have in common
    seconds  of work, None where neither a record nor a shape tells; peak_memory_bytes on device and CPU together; disk_bytes of its
             checkpoints
    apart    memory ran out for its like before: nothing may run beside it
    whole    it takes a GPU of its own where tasks share them
    rank     0 for what the sweep wants first; a pass has cells of one rank
    limit    checkpoints that memory allows in one pass of its kind; passes are joined up to it while no slot is free
    """

    cells: tuple[Cell, ...]
    sharing: str
    seconds: float | None
    peak_memory_bytes: int
    disk_bytes: int
    apart: bool = False
    whole: bool = False
    rank: int = 0
    limit: int = CHECKPOINTS_PER_PASS

    @property
    def checkpoints(self) -> tuple[Cell, ...]:
        """One cell per checkpoint, in order."""
        return tuple({quantize_key(cell): cell for cell in reversed(self.cells)}.values())[::-1]


@dataclass(frozen=True)
class Scoring:
    """The missing evaluations of one model's cells; evaluations[i] belong to cells[i]. seconds as in `Pass`.

    devices     GPUs of one node to begin with: what its size takes (least), or more where memory ran out for its like before
    whole       it takes a GPU of its own where tasks share them
    batch_size  1 where memory ran out in larger batches; 0: as the sweep says
    offload     memory ran out on all GPUs that there are: blocks wait in main memory
    """

    cells: tuple[Cell, ...]
    evaluations: tuple[tuple[Evaluation, ...], ...]
    seconds: float | None
    peak_memory_bytes: int
    devices: int = 1
    least: int = 1
    whole: bool = False
    batch_size: int = 0
    offload: bool = False

    @property
    def count(self) -> int:
        return sum(map(len, self.evaluations))


@dataclass(frozen=True)
class Plan:
    """done and missing partition the cells that can run; problems concern the sweep as a whole (disk, an unwritable store)."""

    sweep: Sweep
    done: tuple[Cell, ...]
    missing: tuple[Cell, ...]
    refused: tuple[Refusal, ...]
    passes: tuple[Pass, ...]
    scorings: tuple[Scoring, ...]
    problems: tuple[str, ...]
    workers: int
    notes: tuple[str, ...] = ()                 # what families say of the models to quantize: parts left alone, scales not folded
    used_bytes: int = 0                         # of the store, where it has a quota

    @property
    def checkpoints(self) -> int:
        return sum(len(each.checkpoints) for each in self.passes)

    @property
    def evaluations(self) -> int:
        return sum(scoring.count for scoring in self.scorings)

    @property
    def seconds(self) -> float | None:
        """Wall time, were the work spread evenly over the workers; None while some part of it has neither record nor formula."""
        parts = [*(each.seconds for each in self.passes), *(scoring.seconds for scoring in self.scorings)]
        known = [part for part in parts if part is not None]
        return sum(known) / max(1, self.workers) if len(known) == len(parts) else None

    @property
    def disk_bytes(self) -> int:
        return sum(each.disk_bytes for each in self.passes)

    def require(self) -> None:
        """Raise PlanError with every refusal at once, unless all cells can run."""
        if self.refused or self.problems:
            raise PlanError(render_refusals(self))

    def frame(self) -> pandas.DataFrame:
        """One row per cell: model, method, scheme, state, missing evaluations, reasons, key."""
        import pandas

        scores = {
            cell_key(cell): tuple(evaluation.name for evaluation in wanted)
            for scoring in self.scorings for cell, wanted in zip(scoring.cells, scoring.evaluations, strict=True)
        }
        reasons = {id(refusal.cell): refusal.reasons for refusal in self.refused}
        waiting = {cell_key(cell) for each in self.passes for cell in each.cells}
        rows = []
        for cell in self.sweep.cells:
            key = cell_key(cell)
            state = "refused" if id(cell) in reasons else "quantize" if key in waiting else "evaluate" if key in scores else "done"
            rows.append({
                "model": cell.model.name, "method": cell.method.name, "scheme": cell.scheme.name, "state": state,
                "missing": ", ".join(scores.get(key, ())), "reasons": "; ".join(reasons.get(id(cell), ())), "key": key[:12],
            })
        return pandas.DataFrame(rows, columns=["model", "method", "scheme", "state", "missing", "reasons", "key"])


def make(sweep: Sweep, store: Store) -> Plan:
    """Plan a sweep against what the store already holds. Starts nothing, reads no weights."""
    checker = _Checker(sweep.runtime)
    refused = tuple(Refusal(cell, reasons) for cell in sweep.cells if (reasons := tuple(checker.reasons(cell))))
    stopped = {id(refusal.cell) for refusal in refused}
    able = [cell for cell in sweep.cells if id(cell) not in stopped]

    live, store = store, store.snapshot(able)
    manifests = {key: store.manifest(key) for key in dict.fromkeys(map(quantize_key, able))}
    unmade = [cell for cell in able if manifests[quantize_key(cell)] is None]
    unscored = {
        id(cell): tuple(e for e in cell.evaluations if store.score(cell_key(cell), score_key(cell, e)) is None) for cell in able
    }
    missing = tuple(cell for cell in able if manifests[quantize_key(cell)] is None or unscored[id(cell)])
    pending = {id(cell) for cell in missing}

    workers = count_workers(sweep.runtime)
    history = _History(store if store is live else live.snapshot()) if missing else None
    passes = tuple(_passes(unmade, sweep, checker, history, workers)) if history else ()
    scorings = tuple(_scorings(missing, unscored, sweep, checker, history)) if history else ()
    used = store.used_bytes() if sweep.runtime.store.quota and passes else 0
    problems = _problems(sweep.runtime, store, passes, scorings, used)
    done = tuple(cell for cell in able if id(cell) not in pending)
    warned = history.warnings(unmade, scorings, checker) if history else []
    notes = dict.fromkeys(
        f"{cell.model.name}: {note}"
        for cell in unmade if not cell.method.is_baseline and (shapes := checker.shapes(cell.model)) is not None
        for note in shapes.notes
    )
    return Plan(sweep, done, missing, refused, passes, scorings, problems, workers, (*notes, *warned), used)


def within(plan: Plan, seconds: float) -> tuple[Plan, tuple[Cell, ...]]:
    """The plan of what fits into so much wall time: in the order of `first:`, baselines, then the cheapest; and the cells left out.

    What has neither record nor formula counts nothing here: it is tried, and the clock decides.
    """
    costs: dict[str, float] = collections.defaultdict(float)
    for each in plan.passes:
        for cell in each.cells:
            costs[cell_key(cell)] += (each.seconds or 0.0) / len(each.cells)
    for scoring in plan.scorings:
        for cell, wanted in zip(scoring.cells, scoring.evaluations, strict=True):
            costs[cell_key(cell)] += (scoring.seconds or 0.0) * len(wanted) / max(1, scoring.count)
    left, room = set(), seconds * max(1, plan.workers)
    rank = plan.sweep.rank
    for cell in sorted(plan.missing, key=lambda c: (rank(cell_key(c)), not c.method.is_baseline, costs[cell_key(c)])):
        room -= costs[cell_key(cell)]
        if room < 0:
            left.add(cell_key(cell))
    if not left:
        return plan, ()
    passes = []
    for each in plan.passes:
        cells = tuple(cell for cell in each.cells if cell_key(cell) not in left)
        share = len(cells) / len(each.cells)
        if cells:
            cost = None if each.seconds is None else each.seconds * share
            passes.append(dataclasses.replace(each, cells=cells, seconds=cost, disk_bytes=int(each.disk_bytes * share)))
    scorings = []
    for scoring in plan.scorings:
        pairs = [(c, e) for c, e in zip(scoring.cells, scoring.evaluations, strict=True) if cell_key(c) not in left]
        if pairs:
            cost = None if scoring.seconds is None else scoring.seconds * sum(len(e) for _, e in pairs) / max(1, scoring.count)
            cells, evaluations = tuple(c for c, _ in pairs), tuple(e for _, e in pairs)
            scorings.append(dataclasses.replace(scoring, cells=cells, evaluations=evaluations, seconds=cost))
    missing = tuple(cell for cell in plan.missing if cell_key(cell) not in left)
    smaller = dataclasses.replace(plan, missing=missing, passes=tuple(passes), scorings=tuple(scorings))
    return smaller, tuple(cell for cell in plan.missing if cell_key(cell) in left)


def count_workers(runtime: Runtime) -> int:
    """Tasks that run at once on this machine: as configured, else one per share of a GPU, else one per two cores.

    A cluster at an address decides for itself how many it runs; for it this is 4 per configured default, used in estimates alone.
    """
    if runtime.cluster.workers:
        return runtime.cluster.workers
    if runtime.cluster.address:
        return ASSUMED_SLOTS
    if uses_gpu(runtime):
        return max(1, int(count_gpus() / max(runtime.cluster.gpus_per_task, 1 / 16)))
    return max(1, count_cores() // 2)


def count_cores() -> int:
    """Cores that this process may use; a container or a batch system may allow fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:                      # no affinity on this operating system
        return os.cpu_count() or 1


@functools.cache
def count_gpus() -> int:
    """CUDA devices that torch can use on this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


# --- refusals --------------------------------------------------------------------------------------------------------------------


class _Checker:
    """Asks every part of a cell once per distinct question: 1,000 cells are a few models, methods and schemes."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._answers: dict[Hashable, Any] = {}

    def reasons(self, cell: Cell) -> list[str]:
        found = list(self._once(("model", cell.model), lambda: self._model_reasons(cell.model)))
        if cell.method.needs:
            found += self._once(("calibration", cell.calibration, cell.method.needs), lambda: self._calibration_reasons(cell))
        for slot, part in _slots(cell):
            question = ("part", slot, part, cell.method.transform, cell.scheme, cell.model)
            found += self._once(question, functools.partial(self._part_reasons, slot, part, cell))
        if self.runtime.export and not cell.method.is_baseline:
            found += self._once(("export", cell.scheme, cell.method, cell.model), lambda: self._export_reasons(cell))
        if cell.scheme.activation is not None or cell.scheme.kv is not None:
            found += self._once(("execution", cell.scheme, cell.model), lambda: self._execution_reasons(cell))
        for evaluation in cell.evaluations:
            ask = functools.partial(self._evaluation_reasons, evaluation, cell.model)
            found += self._once(("evaluation", evaluation, cell.model), ask)
        return list(dict.fromkeys(found))

    def shapes(self, model: Model) -> Shapes | None:
        """Shapes of a model, or None where its config cannot be read (which is a refusal of its own)."""
        return self._once(("shapes", model), lambda: self._shapes(model))[0]

    def devices(self, model: Model) -> int | None:
        """GPUs over which a model is spread: the fewest whose shares, and one block more, fit. None where no number is enough.

        1 without GPUs here, and on a cluster elsewhere unless `cluster.gpu_memory` says how large its GPUs are.
        """
        return self._once(("devices", model), lambda: self._devices(model))

    def is_whole(self, model: Model) -> bool:
        """A model that one GPU holds, and a task's share of one does not."""
        shapes, free = self.shapes(model), self.gpu_bytes()
        if shapes is None or free is None or self.devices(model) != 1 or model.dtype not in DTYPE_BYTES:
            return False
        return DTYPE_BYTES[model.dtype] * shapes.parameters > free * MEMORY_SHARE * gpu_share(self.runtime)

    def _devices(self, model: Model) -> int | None:
        shapes, free = self.shapes(model), self.gpu_bytes()
        if shapes is None or free is None or model.dtype not in DTYPE_BYTES:
            return 1
        need, block = (
            DTYPE_BYTES[model.dtype] * number
            for number in (shapes.parameters, sum(linear.out_features * linear.in_features for linear in shapes.linears))
        )
        if need <= free * MEMORY_SHARE:
            return 1
        fits = (count for count in range(2, shapes.blocks + 1) if need / count + block <= free * MEMORY_SHARE)
        return next(fits, None)

    def _gpus(self) -> int:
        return count_gpus() if uses_gpu(self.runtime) else 0

    def gpu_bytes(self) -> int | None:
        """Free on one GPU; None where there is none, and where nobody has said how large those of a cluster are."""
        return self._once("GPU", self._gpu_bytes)

    def _gpu_bytes(self) -> int | None:
        cluster = self.runtime.cluster
        if cluster.address:
            return bytes_of(cluster.gpu_memory, "cluster.gpu_memory") if cluster.gpu_memory else None
        return free_memory(self.runtime)[0] if uses_gpu(self.runtime) else None

    def _once(self, question: Hashable, ask: Callable[[], T]) -> T:
        if question not in self._answers:
            self._answers[question] = ask()
        return self._answers[question]

    def _shapes(self, model: Model) -> tuple[Shapes | None, list[str]]:
        from harness import models

        try:
            return models.shapes(sources.config_folder(model)), []
        except HarnessError as error:
            return None, [str(error)]

    def _model_reasons(self, model: Model) -> list[str]:
        shapes, reasons = self._once(("shapes", model), lambda: self._shapes(model))
        if shapes is None:
            return reasons
        if model.dtype not in DTYPE_BYTES:
            reasons = [*reasons, f'model "{model.name}": dtype "{model.dtype}" is none of {", ".join(DTYPE_BYTES)}']
        free, where = free_memory(self.runtime)
        need = shapes.parameters * DTYPE_BYTES.get(model.dtype, 4)
        devices = self.devices(model)
        if free is not None and need > free * MEMORY_SHARE and (devices is None or devices > self._gpus()):
            takes = f'model "{model.name}" takes {size(need)} as {model.dtype} to evaluate'
            if uses_gpu(self.runtime):
                number = f"{devices} GPUs" if devices else "no number of GPUs is enough"
                takes, where = f"{takes}: {number}", f"this machine has {_count(self._gpus(), 'GPU')}, of which the fullest"
            reasons = [*reasons, f"{takes}; {where} has {size(free)} free"]
        return reasons

    def _calibration_reasons(self, cell: Cell) -> list[str]:
        needs = ", ".join(cell.method.needs)
        if cell.calibration is None:
            return [f'method "{cell.method.name}" needs calibration data ({needs}); set `calibration:`']
        calibration = cell.calibration
        reasons = []
        if calibration.samples < 1 or calibration.length < 2:
            windows = f"{calibration.samples} windows of {calibration.length} tokens"
            reasons.append(f"calibration {calibration.name}: {windows} hold no text")
        missing = sources.missing_text(calibration.source, calibration.split)
        return [*reasons, *(f"calibration {calibration.name}: {reason}" for reason in missing)]

    def _part_reasons(self, slot: str, part: Part, cell: Cell) -> list[str]:
        if slot == "tuning" and cell.method.rounding is None:
            return [f"tuning {part.name}: trains what a rounding made, and there is none; choose a rounding"]
        try:
            plugin = plugins.build(slot, part.name, to_json(part)["settings"])
        except HarnessError as error:
            return [str(error)]
        shapes = self.shapes(cell.model)
        if shapes is None:
            return []
        reasons = [f"{slot} {part.name}: {reason}" for reason in plugin.check(cell.scheme, shapes)]
        if slot == "rounding" and "squared_gradient" in part.needs and cell.method.transform is not None:
            reasons.append(
                f"rounding {part.name}: squared gradients are of the model's own weights, which transform "
                f"{cell.method.transform.name} changes; use no transform"
            )
        fused = [linear.name for linear in shapes.linears if linear.fused]
        if slot == "tuning" and fused:
            reasons.append(f"tuning {part.name}: trains whole linears; of this model {', '.join(fused)} are parts of fused ones")
        return reasons

    def _export_reasons(self, cell: Cell) -> list[str]:
        from harness import export

        shapes, name = self.shapes(cell.model), self.runtime.export
        try:
            return [] if shapes is None else [f"export {name}: {reason}" for reason in export.refusals(cell, shapes, name)]
        except HarnessError as error:
            return [str(error)]

    def _execution_reasons(self, cell: Cell) -> list[str]:
        """Why activations or the cache cannot be rounded as the scheme says."""
        from harness.runtime import activations, kv_cache

        shapes = self.shapes(cell.model)
        if shapes is None:
            return []
        cache = kv_cache.check(cell.scheme.kv, shapes) if cell.scheme.kv is not None else []
        return activations.check(cell.scheme, shapes) + cache

    def _evaluation_reasons(self, evaluation: Evaluation, model: Model) -> list[str]:
        try:
            evaluator = plugins.build("evaluator", evaluation.evaluator, to_json(evaluation)["settings"])
            reasons = evaluator.check(evaluation, model)
        except HarnessError as error:
            return [f"evaluation {evaluation.name}: {error}"]
        if self.devices(model) != 1 and measures_device(evaluation):
            reasons = [*reasons, "measures one GPU, and the model takes several"]
        return [f"evaluation {evaluation.name}: {reason}" for reason in reasons]


def _slots(cell: Cell) -> Iterable[tuple[str, Part]]:
    method = cell.method
    return [(s, p) for s, p in (("transform", method.transform), ("rounding", method.rounding), ("tuning", method.tuning)) if p]


def free_memory(runtime: Runtime) -> tuple[int | None, str]:
    """Bytes free on the device that tasks of this machine would use, and its name; None for a cluster that is elsewhere."""
    if runtime.cluster.address:
        return None, "the cluster"
    if uses_gpu(runtime):
        import torch

        return min(torch.cuda.mem_get_info(index)[0] for index in range(count_gpus())), "the GPU"
    return available_memory(), "this machine"


def available_memory() -> int:
    """Bytes of main memory that processes may still take."""
    import psutil

    return int(psutil.virtual_memory().available)


def measures_device(evaluation: Evaluation) -> bool:
    """It measures the device that it is on: several, or one that waits for main memory, are another."""
    facts = plugins.find("evaluator").get(evaluation.evaluator)
    return facts is not None and bool(facts.get("exclusive", False))


def uses_gpu(runtime: Runtime) -> bool:
    """Whether tasks on this machine run on a GPU."""
    return runtime.device != "cpu" and count_gpus() > 0


def gpu_share(runtime: Runtime) -> float:
    """The share of a GPU's memory that one task has; its process takes no more (`work.prepare`)."""
    cluster = runtime.cluster
    if cluster.kind == "local" and not cluster.address:
        return min(1.0, count_gpus() / count_workers(runtime)) if uses_gpu(runtime) else 1.0
    return min(1.0, cluster.gpus_per_task) or 1.0


def quota_bytes(runtime: Runtime) -> int | None:
    """What the store may take, or None."""
    return bytes_of(runtime.store.quota, "store.quota") if runtime.store.quota else None


def over_quota(runtime: Runtime, used: int, needed: int) -> str:
    """A sentence where the store would take more than its quota, else ""."""
    quota = quota_bytes(runtime)
    if quota is None or used + needed <= quota:
        return ""
    return (
        f"the checkpoints take about {size(needed)}, and {runtime.runs} holds {size(used)} of its quota of {size(quota)}; "
        f"harness gc --dry-run --runs {runtime.runs} says what may go, and store.quota=SIZE raises the quota"
    )


def _problems(
    runtime: Runtime, store: Store, passes: Sequence[Pass], scorings: Sequence[Scoring], used: int
) -> tuple[str, ...]:
    if not passes and not scorings:
        return ()
    found = []
    try:
        store.check_writable()
    except HarnessError as error:
        found.append(str(error))
    need, free = sum(each.disk_bytes for each in passes), store.files.free_bytes(store.root)
    if passes and (sentence := over_quota(runtime, used, need)):
        found.append(sentence)
    if free is not None and need > free:
        found.append(f"the checkpoints take about {size(need)}; {runtime.runs} has {size(free)} free. Set `runs=` to a larger disk")
    return tuple(found)


# --- passes and evaluations ------------------------------------------------------------------------------------------------------


def _passes(unmade: Sequence[Cell], sweep: Sweep, checker: _Checker, history: _History, workers: int) -> Iterable[Pass]:
    """Group what is not quantized by rank, model and calibration windows, and cut each group for memory and the workers known now.

    A run cuts anew for the slots that it finds (`board`).
    """
    by_key: dict[str, list[Cell]] = {}
    for cell in unmade:
        by_key.setdefault(quantize_key(cell), []).append(cell)
    by_walk: dict[tuple[int, Model, Calibration | None, str], list[list[Cell]]] = {}
    for key, cells in by_key.items():           # what ran out of memory before, here or in a smaller sibling, walks alone
        first = cells[0]
        rank, alone = min(sweep.rank(cell_key(cell)) for cell in cells), history.ran_out(first, "quantize", checker) is not None
        walk = (rank, first.model, first.calibration if first.method.needs else None, key if alone else "")
        by_walk.setdefault(walk, []).append(cells)
    for (rank, model, _, single), group in sorted(by_walk.items(), key=lambda item: item[0][0]):
        shapes, checkpoints = checker.shapes(model), _by_stream(group)
        assert shapes is not None, "a model without shapes is refused"
        limit = 1 if single else _limit([cells[0] for cells in checkpoints], shapes, checker, workers)
        share = max(1, workers // len(by_walk))
        while checkpoints:
            count = piece([stream_of(cells[0]) for cells in checkpoints], -(-len(checkpoints) // share), limit)
            part, checkpoints, share = checkpoints[:count], checkpoints[count:], max(1, share - 1)
            made = [cells[0] for cells in part]
            together = history.ran_out(made[0], "quantize", checker)
            yield Pass(
                tuple(cell for cells in part for cell in cells),
                _sharing(made, shapes),
                history.quantize_seconds(made, shapes, checker.runtime),
                sum(pass_memory(made, shapes)),
                sum(checkpoint_bytes(cell, shapes) for cell in made),
                apart=together is not None and together < 2,
                whole=len(made) == 1 and not _fits(made, shapes, checker, workers) and gpu_share(checker.runtime) < 1,
                rank=rank,
                limit=limit,
            )


def _by_stream(checkpoints: list[list[Cell]]) -> list[list[Cell]]:
    """In the sweep's order, but for those that share a stream, which become neighbours."""
    order = {stream: number for number, stream in enumerate(dict.fromkeys(stream_of(cells[0]) for cells in checkpoints))}
    return sorted(checkpoints, key=lambda cells: order[stream_of(cells[0])])


def stream_of(cell: Cell) -> tuple[Any, ...]:
    """What must be equal for two cells to see the same inputs in every block."""
    if not cell.method.reads_inputs or cell.inputs == "full_precision":
        return (0, cell.inputs)
    return (1, cell.method.name, cell.scheme.name)


def piece(streams: Sequence[Hashable], count: int, limit: int) -> int:
    """How many checkpoints, from the first, make one walk of those whose input streams these are.

    About `count`, at most `limit`. A stream is cut for the limit alone, because its checkpoints share every forward pass; others
    share nothing after block 0 but the reading, so idle slots are worth more.
    """
    count = min(max(1, count), -(-len(streams) // -(-len(streams) // limit)))
    lengths = [len(list(same)) for _, same in itertools.groupby(streams)]
    if lengths[0] > limit:
        return -(-lengths[0] // -(-lengths[0] // limit))
    taken = 0
    for length in lengths:
        if taken and taken + length > count:
            break
        taken += length
    return taken


def _limit(checkpoints: Sequence[Cell], shapes: Shapes, checker: _Checker, workers: int) -> int:
    """Checkpoints, side by side in this order, that memory allows in one pass."""
    limit = CHECKPOINTS_PER_PASS
    while limit > 1 and not all(
        _fits(checkpoints[start: start + limit], shapes, checker, workers) for start in range(max(1, len(checkpoints) - limit + 1))
    ):
        limit -= 1
    return limit


def _sharing(cells: Sequence[Cell], shapes: Shapes) -> str:
    if all(cell.method.is_baseline for cell in cells):
        return "full precision, nothing to quantize"
    streams = collections.Counter(stream_of(cell) for cell in cells if cell.method.reads_inputs)
    gradients = sum("squared_gradient" in cell.method.needs for cell in cells)
    words = [f"{shapes.blocks} blocks read once" if len(cells) > 1 else f"{shapes.blocks} blocks"]
    if not any(cell.method.needs for cell in cells):
        return words[0] + ", data-free"
    if gradients > 1:
        words.append(f"squared gradients shared by {gradients}")
    if streams.total() > 1:
        shared = [count for count in streams.values() if count > 1]
        words += ["statistics of block 0 shared" if not shared else f"one input stream shared by {max(shared)}"]
    return ", ".join(words)


def _scorings(
    missing: Sequence[Cell], unscored: Mapping[int, tuple[Evaluation, ...]], sweep: Sweep, checker: _Checker, history: _History
) -> Iterable[Scoring]:
    by_model: dict[Model, list[Cell]] = {}
    for cell in missing:
        if unscored[id(cell)]:
            by_model.setdefault(cell.model, []).append(cell)
    for model, cells in by_model.items():
        # What others are compared with comes first; otherwise in the sweep's order.
        cells.sort(key=lambda cell: (sweep.rank(cell_key(cell)), not cell.method.is_baseline))
        evaluations = tuple(unscored[id(cell)] for cell in cells)
        shapes = checker.shapes(model)
        assert shapes is not None, "a model without shapes is refused"
        seconds = history.evaluate_seconds(cells, evaluations)
        need, least = shapes.parameters * DTYPE_BYTES[model.dtype], checker.devices(model) or 1
        batch_size, devices, offload = history.room(cells[0], checker)
        if devices > least and uses_gpu(sweep.runtime) and not sweep.runtime.cluster.address and devices > count_gpus():
            devices, offload = least, True
        yield Scoring(
            tuple(cells), evaluations, seconds, need, max(devices, least), least, checker.is_whole(model), batch_size, offload
        )


# --- estimates -------------------------------------------------------------------------------------------------------------------


def checkpoint_bytes(cell: Cell, shapes: Shapes) -> int:
    """About how large a checkpoint is: codes, one scale per group and, where there are zero points, one of them."""
    if cell.method.is_baseline:
        return 4096
    bits = 0.0
    for block in range(shapes.blocks):
        for linear in shapes.linears:
            scheme = cell.scheme.weight_for(block, linear.name)
            group = scheme.group_size if scheme.group_size > 0 else linear.in_features
            overhead = (16 + (0 if scheme.symmetric else scheme.bits)) / group
            bits += linear.out_features * linear.in_features * (scheme.bits + overhead)
        if not cell.scheme.overrides:
            bits *= shapes.blocks
            break
    return int(bits / 8) + 65536


def pass_memory(cells: Sequence[Cell], shapes: Shapes) -> tuple[int, int]:
    """Peak bytes of a pass on its device, and of the activations that wait on the CPU.

    On the device: three copies of a block, the statistics of its groups and their factorisation; where a cell is tuned, the whole
    model, its teacher, and three float32 copies of its matrices. On the CPU: one copy of every sequence per input stream, twice
    where inputs themselves are kept.
    """
    block = 4 * sum(linear.out_features * linear.in_features for linear in shapes.linears)
    calibrated = [cell for cell in cells if cell.method.needs]
    if not calibrated:
        return 3 * block, 0
    tuned = [cell.method.tuning for cell in calibrated if cell.method.tuning is not None]
    if tuned:
        models = 2 if any("teacher" in tuning.needs for tuning in tuned) else 1
        trained = 3 * block * shapes.blocks             # what makes each matrix, the matrix, its gradient
        tuning_bytes = models * shapes.parameters * DTYPE_BYTES[calibrated[0].model.dtype] + trained
    else:
        tuning_bytes = 0
    calibration, dtype = calibrated[0].calibration, calibrated[0].model.dtype
    assert calibration is not None, "a cell that needs calibration and has none is refused"
    widths = {linear.group: linear.in_features for linear in shapes.linears}
    statistics = 4 * 3 * sum(width**2 for width in widths.values()) if any("hessian" in c.method.needs for c in calibrated) else 0
    tokens = calibration.samples * calibration.length
    stream = tokens * shapes.hidden_size * DTYPE_BYTES[dtype]
    kept = tokens * sum(widths.values()) * DTYPE_BYTES[dtype] if any("inputs" in c.method.needs for c in calibrated) else 0
    streams = len({stream_of(cell) for cell in calibrated})
    return max(3 * block + statistics, tuning_bytes), stream * (1 + 2 * streams) + kept


def _fits(cells: Sequence[Cell], shapes: Shapes, checker: _Checker, workers: int) -> bool:
    """Whether a task's share of a GPU, and of the main memory of this machine, holds a pass."""
    device, host = pass_memory(cells, shapes)
    gpu = checker.gpu_bytes()
    if gpu is not None and device > gpu * MEMORY_SHARE * gpu_share(checker.runtime):
        return False
    if checker.runtime.cluster.address:
        return True
    return host + (device if gpu is None else 0) <= available_memory() * MEMORY_SHARE / workers


class _History:
    """Seconds that past records of the store took: medians by model and method, and by model and evaluation."""

    def __init__(self, store: Store) -> None:
        quantized: dict[Hashable, list[float]] = collections.defaultdict(list)
        scored: dict[Hashable, list[float]] = collections.defaultdict(list)
        self._short: list[tuple[str, Cell, Mapping[str, Any]]] = []             # stage, cell, what was noted of it
        for record in store.records():
            for stage in ("quantize", "evaluate"):
                if isinstance(mark := record.provenance.get(f"out_of_memory_{stage}"), dict):
                    self._short.append((stage, record.cell, mark))
            model = record.cell.model.digest
            if record.manifest and (seconds := record.manifest.get("seconds")):
                quantized[model, record.cell.method.name].append(float(seconds))
            for name, score in record.scores.items():
                if seconds := score.get("seconds"):
                    scored[model, name].append(float(seconds))
        self.quantized = {key: statistics.median(values) for key, values in quantized.items()}
        self.scored = {key: statistics.median(values) for key, values in scored.items()}

    def ran_out(self, cell: Cell, stage: str, checker: _Checker) -> int | None:
        """With how many together memory ran out for a cell or a sibling that needs no more; None where it never did.

        A sibling has the same method, where the method matters, and a model with as many parameters or fewer.
        """
        return min((int(mark.get("beside", 2)) for mark, _ in self._siblings(cell, stage, checker)), default=None)

    def room(self, cell: Cell, checker: _Checker) -> tuple[int, int, bool]:
        """(batch size, GPUs, blocks in main memory) with which to score a model at first; 0 and 1 where memory never ran out."""
        marks = [mark for mark, _ in self._siblings(cell, "evaluate", checker)]
        devices = max((2 * int(mark.get("devices", 0)) for mark in marks if mark.get("beside") == 1), default=1)
        return int(bool(marks)), max(1, devices), any(mark.get("offload") for mark in marks)

    def _siblings(self, cell: Cell, stage: str, checker: _Checker) -> Iterable[tuple[Mapping[str, Any], Cell]]:
        for marked, other, mark in self._short:
            if marked != stage or (stage == "quantize" and other.method.name != cell.method.name):
                continue
            mine, theirs = checker.shapes(cell.model), checker.shapes(other.model)
            if other.model.digest == cell.model.digest or (mine and theirs and theirs.parameters <= mine.parameters):
                yield mark, other

    def warnings(self, unmade: Sequence[Cell], scorings: Sequence[Scoring], checker: _Checker) -> list[str]:
        """What the plan says of cells whose like ran out of memory."""
        said: dict[str, None] = {}
        for cell in unmade:
            for _, other in self._least(cell, "quantize", checker):
                said.setdefault(f"{cell.title} walks alone: memory ran out for {other.title}")
        for scoring in scorings:
            if scoring.batch_size:
                ways = ["in batches of 1"]
                ways += [f"on {scoring.devices} GPUs"] if scoring.devices > scoring.least else []
                ways += ["with its blocks in main memory"] if scoring.offload else []
                for cell in scoring.cells:
                    for _, other in self._least(cell, "evaluate", checker):
                        said.setdefault(f"{cell.title} is scored {', '.join(ways)}: memory ran out for {other.title}")
        return list(said)

    def _least(self, cell: Cell, stage: str, checker: _Checker) -> list[tuple[Mapping[str, Any], Cell]]:
        """The one sibling for which memory ran out with the fewest together."""
        return sorted(self._siblings(cell, stage, checker), key=lambda pair: int(pair[0].get("beside", 2)))[:1]

    def quantize_seconds(self, cells: Sequence[Cell], shapes: Shapes, runtime: Runtime) -> float:
        known = [self.quantized.get((cell.model.digest, cell.method.name)) for cell in cells]
        rate = FLOPS_PER_GPU if uses_gpu(runtime) else FLOPS_PER_THREAD * max(1, count_cores() // 2)
        return sum(quantize_flops(c, shapes) / rate + 0.01 if k is None else k for c, k in zip(cells, known, strict=True))

    def evaluate_seconds(self, cells: Sequence[Cell], evaluations: Sequence[Sequence[Evaluation]]) -> float | None:
        """None when some evaluation was never run on the model: its cost depends on data that a plan does not read."""
        known = [
            self.scored.get((cell.model.digest, evaluation.name))
            for cell, wanted in zip(cells, evaluations, strict=True) for evaluation in wanted
        ]
        return None if None in known else sum(value for value in known if value is not None)


def quantize_flops(cell: Cell, shapes: Shapes) -> float:
    """Floating-point operations of one checkpoint: two forward passes over the windows, Hessians, rounding, training epochs."""
    if cell.method.is_baseline:
        return 0.0
    weights = sum(linear.out_features * linear.in_features for linear in shapes.linears)
    widths = {linear.group: linear.in_features for linear in shapes.linears}
    total = 20.0 * weights
    if cell.method.needs and cell.calibration is not None:
        tokens = cell.calibration.samples * cell.calibration.length
        total += 2 * 2.0 * weights * tokens
        if "hessian" in cell.method.needs:
            total += 2.0 * tokens * sum(width**2 for width in widths.values())
            total += sum(2.0 * linear.out_features * linear.in_features**2 for linear in shapes.linears)
            total += sum(float(width) ** 3 for width in widths.values())
        for part in cell.method.parts:
            total += 6.0 * weights * _trained_tokens(dict(part.settings), tokens)
    return total * shapes.blocks


def _trained_tokens(settings: Mapping[str, Any], tokens: int) -> float:
    """Of a part with epochs over the windows, or with steps of a batch of texts (at most: texts may be short)."""
    if settings.keys() >= {"steps", "batch", "prompt_length", "answer_length"}:
        return float(settings["steps"] * settings["batch"] * (settings["prompt_length"] + settings["answer_length"]))
    epochs = settings.get("epochs", 0)
    return tokens * epochs if isinstance(epochs, int | float) else 0.0


# --- in words --------------------------------------------------------------------------------------------------------------------


def render(plan: Plan) -> str:
    """The plan as a person reads it: one line of counts, one line per pass and per model to evaluate, then costs and places."""
    sweep, runtime = plan.sweep, plan.sweep.runtime
    todo = f"{len(plan.missing)} to do" if plan.missing else "nothing to do"
    head = [f"{_count(len(sweep.cells), 'cell')}", f"{len(plan.done)} done", todo]
    if plan.refused:
        head.append(f"{len(plan.refused)} refused")
    if sweep.skips:
        head.append(f"{sum(len(skip.titles) for skip in sweep.skips)} skipped")
    lines = [f"plan    {' · '.join(head)}"]
    for number, each in enumerate(plan.passes, start=1):
        cost = f"{duration(each.seconds)} · {size(each.peak_memory_bytes)} of memory · {size(each.disk_bytes)} of disk"
        made = f"{_count(len(each.checkpoints), 'checkpoint')}: {each.sharing}"
        lines.append(f"pass {number:<3}{each.cells[0].model.name}   {made}   {cost}")
    for scoring in plan.scorings:
        cost = f"{duration(scoring.seconds)} · {size(scoring.peak_memory_bytes)} of memory"
        cells = _count(len(scoring.cells), "cell")
        gpus = f" on {scoring.devices} GPUs each" if scoring.devices > 1 else ""
        lines.append(f"score   {scoring.cells[0].model.name}   {_count(scoring.count, 'evaluation')} of {cells}{gpus}   {cost}")
    keys = set(map(cell_key, sweep.cells)) if sweep.first else set()
    shared = sum(len(each.cells) - len(each.checkpoints) for each in plan.passes)
    if shared:
        lines.append(f"        {_count(shared, 'cell')} use the checkpoint of another (they differ in activation or KV bits alone)")
    ranks = collections.Counter(sweep.rank(cell_key(cell)) for cell in plan.missing)
    for rank, entry in enumerate(sweep.first):
        fits = f"{_count(ranks[rank], 'cell')} to do" if entry.keys & keys else "fits no cell of this run"
        lines.append(f"first   {rank + 1}. {entry.text}: {fits}")
    lines += [f"note    {note}" for note in plan.notes]
    lines += [f"skip    {len(skip.titles)} × {skip.reason}" for skip in sweep.skips]
    where = f"{_count(plan.workers, 'worker')} on this machine"
    if runtime.cluster.address:
        where = f"{runtime.cluster.address}, {plan.workers} slots assumed; passes are cut for those it has"
    lines.append(f"        {where} · results in {runtime.runs} · tracking {_tracking(runtime)}")
    if plan.passes and (quota := quota_bytes(runtime)) is not None:
        left = max(0, quota - plan.used_bytes)
        lines.append(f"        about {size(plan.disk_bytes)} to write · {size(left)} left of the quota of {size(quota)}")
    if plan.missing and plan.seconds is not None:
        lines.append(f"        about {duration(plan.seconds)[2:]} on these workers, start-up excluded")
    return "\n".join(lines)


def render_refusals(plan: Plan) -> str:
    """Every refusal at once, then the ways out."""
    lines = []
    if plan.refused:
        lines += [f"{len(plan.refused)} of {_count(len(plan.sweep.cells), 'cell')} cannot run. Nothing was started.", ""]
        width = max(len(refusal.cell.title) for refusal in plan.refused)
        for refusal in plan.refused:
            for index, reason in enumerate(refusal.reasons):
                lines.append(f"  {refusal.cell.title if index == 0 else '':<{width}}  {reason}")
        where = plan.sweep.path or "the overrides"
        lines += ["", f"Change these in {where}, or add the cells to its `skip:` list."]
    if plan.problems:
        lines += ["" if plan.refused else "The sweep cannot run. Nothing was started."]
        lines += [f"  {problem}" for problem in plan.problems]
    return "\n".join(lines)


def _tracking(runtime: Runtime) -> str:
    tracking = runtime.tracking
    return tracking.uri or {"sqlite": "mlflow.db", "none": "off"}.get(tracking.kind, tracking.kind)


def _count(number: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit a person would use: "3.2 h", "14 s"; a sentence where nothing is known."""
    if seconds is None:
        return "time unknown (no record yet)"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"≈ {seconds / length:.1f} {unit}"
    return f"≈ {max(1, round(seconds))} s"


def seconds_of(text: str) -> float:
    """The seconds of "8h", "90min", "2d", "45s" or a plain number. Raises ConfigError for anything else.

    >>> seconds_of("1.5h")
    5400.0
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    units = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
    if found is None or found[2] not in units:
        raise ConfigError(f'"{text}" is no time; write for example 45s, 90min, 8h or 2d')
    return float(found[1]) * units[found[2]]


def size(number: float) -> str:
    """Bytes in words, decimal units: 13.5 GB."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= length:
            return f"{number / length:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"
