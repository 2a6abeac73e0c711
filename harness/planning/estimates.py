"""Estimates of time, memory and disk, from shapes and from past records."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.cell import Cell, Evaluation, WeightScheme
from harness.core.labels import budget_of
from harness.core.sweep import Runtime
from harness.planning import resources
from harness.planning.checks import Checker
from harness.planning.plan import Scoring
from harness.planning.resources import (
    DTYPE_BYTES,
    MEMORY_SHARE,
    count_cores,
    gpu_fraction,
    uses_gpu,
)
from harness.planning.streams import stream_of
from harness.storage.store import Store

if TYPE_CHECKING:
    from harness.core.shapes import LinearShape, Shapes


# float32 matrix products of one CPU thread, as seen on a 2-core cloud machine
FLOPS_PER_THREAD = 2e10
# sustained in float32 accumulation; an order of magnitude, until records exist
FLOPS_PER_GPU = 5e13


def checkpoint_bytes(cell: Cell, shapes: Shapes) -> int:
    """Estimated bytes of a checkpoint: codes, one scale per group, a zero point where the scheme has them, and low-rank parts."""
    if not cell.method.quantizes:
        return 4096
    bits, beside = 0.0, _low_rank_bits(cell)
    for block in range(shapes.blocks):
        for linear in shapes.linears:
            bits += matrix_bits(linear, cell.scheme.weight_for(block, linear.name))
            bits += beside * (linear.out_features + linear.in_features)
        if not cell.scheme.overrides:
            bits *= shapes.blocks
            break
    return int(bits / 8) + 65536


def matrix_bits(linear: LinearShape, scheme: WeightScheme) -> float:
    """Estimated bits of one matrix: codes, one scale per group and, where the scheme has zero points, one of them."""
    group = scheme.group_size if scheme.group_size > 0 else linear.in_features
    overhead = (16 + (0 if scheme.symmetric else scheme.bits)) / group
    return linear.out_features * linear.in_features * (scheme.bits + overhead)


def _low_rank_bits(cell: Cell) -> float:
    """Bits of the low-rank parts that a method stores beside a matrix, per output and input of it; an upper bound."""
    total = 0.0
    for part in cell.method.parts:
        settings = dict(part.settings)
        if settings.keys() >= {"rank", "adapter_dtype"}:
            total += 8 * DTYPE_BYTES.get(settings["adapter_dtype"], 2) * settings["rank"]
    return total


def reduced_bytes(cells: Sequence[Cell], shapes: Shapes) -> int:
    """Bytes of the smaller model that the reduction of these cells stores; 0 without one. shapes: of the smaller model."""
    first = cells[0]
    return shapes.parameters * DTYPE_BYTES[first.model.dtype] if first.method.reduction else 0


def pass_memory(cells: Sequence[Cell], shapes: Shapes) -> tuple[int, int]:
    """Peak bytes of a pass on its device, and of the activations that wait on the CPU.

    On the device: three copies of a block (six with a fine-tune's base and singular vectors), the statistics of its groups and
    their factorisation; where a cell is tuned, the whole model, its teacher, and three float32 copies of its matrices. On the CPU:
    one copy of every sequence per input stream, twice where inputs themselves are kept.
    """
    block = 4 * sum(linear.out_features * linear.in_features for linear in shapes.linears)
    calibrated = [cell for cell in cells if cell.method.needs_calibration]
    # of a fine-tune: the base's block too, and both sides of singular vectors
    copies = 6 if any(cell.method.needs_base for cell in cells) else 3
    if not calibrated:
        return copies * block, 0
    tuned = [cell.method.tuning for cell in calibrated if cell.method.tuning is not None]
    if tuned:
        models = 2 if any("teacher" in tuning.needs for tuning in tuned) else 1
        trained = 3 * block * shapes.blocks  # what makes each matrix, the matrix, its gradient
        tuning_bytes = models * shapes.parameters * DTYPE_BYTES[calibrated[0].model.dtype] + trained
    else:
        tuning_bytes = 0
    calibration, dtype = calibrated[0].calibration, calibrated[0].model.dtype
    assert calibration is not None, "a cell that needs calibration and has none is refused"
    widths = {linear.group: linear.in_features for linear in shapes.linears}
    squares = 4 * sum(width**2 for width in widths.values())
    statistics = 3 * squares if any("hessian" in c.method.needs for c in calibrated) else 0
    statistics += 3 * squares if any("cross" in c.method.needs for c in calibrated) else 0
    tokens = calibration.samples * calibration.length
    stream = tokens * shapes.hidden_size * DTYPE_BYTES[dtype]
    kept = (
        tokens * sum(widths.values()) * DTYPE_BYTES[dtype]
        if any("inputs" in c.method.needs for c in calibrated)
        else 0
    )
    streams = len({stream_of(cell) for cell in calibrated})
    return max(copies * block + statistics, tuning_bytes), stream * (1 + 2 * streams) + kept


def fits_in_memory(cells: Sequence[Cell], shapes: Shapes, checker: Checker, workers: int) -> bool:
    """Whether a task's fraction of a GPU, and of the main memory of this machine, holds a pass."""
    device, host = pass_memory(cells, shapes)
    gpu = checker.gpu_bytes()
    if gpu is not None and device > gpu * MEMORY_SHARE * gpu_fraction(checker.runtime):
        return False
    if checker.runtime.cluster.address:
        return True
    return (
        host + (device if gpu is None else 0)
        <= resources.available_memory() * MEMORY_SHARE / workers
    )


class History:
    """Facts from the records of a store: median seconds by model and method or evaluation, and memory that ran out."""

    def __init__(self, store: Store) -> None:
        quantized: dict[Hashable, list[float]] = collections.defaultdict(list)
        scored: dict[Hashable, list[float]] = collections.defaultdict(list)
        # (stage, cell, its mark) of every cell that ran out of memory
        self._marks: list[tuple[str, Cell, Mapping[str, Any]]] = []
        for record in store.records():
            for stage in ("quantize", "evaluate"):
                if isinstance(mark := record.provenance.get(f"out_of_memory_{stage}"), dict):
                    self._marks.append((stage, record.cell, mark))
            model = record.cell.model.digest
            mixed = bool(budget_of(record.cell)[0])  # copied, not rounded
            if not mixed and record.manifest and (seconds := record.manifest.get("seconds")):
                quantized[model, record.cell.method.name].append(float(seconds))
            for name, score in record.scores.items():
                if seconds := score.get("seconds"):
                    scored[model, name].append(float(seconds))
        self.quantized = {key: statistics.median(values) for key, values in quantized.items()}
        self.scored = {key: statistics.median(values) for key, values in scored.items()}

    def ran_out(self, cell: Cell, stage: str, checker: Checker) -> int | None:
        """The fewest checkpoints made together for which a cell or a sibling ran out of memory; None where none did.

        A sibling has the same method, where the method matters, and a model of as many parameters or fewer.
        """
        return min(
            (int(mark.get("beside", 2)) for mark, _ in self._siblings(cell, stage, checker)),
            default=None,
        )

    def scoring_defaults(self, cell: Cell, checker: Checker) -> tuple[int, int, bool]:
        """(batch size, GPUs, blocks in main memory) for the first try of scoring a model; (0, 1, False) by default."""
        marks = [mark for mark, _ in self._siblings(cell, "evaluate", checker)]
        devices = max(
            (2 * int(mark.get("devices", 0)) for mark in marks if mark.get("beside") == 1),
            default=1,
        )
        return int(bool(marks)), max(1, devices), any(mark.get("offload") for mark in marks)

    def _siblings(
        self, cell: Cell, stage: str, checker: Checker
    ) -> Iterable[tuple[Mapping[str, Any], Cell]]:
        for marked, other, mark in self._marks:
            if marked != stage or (stage == "quantize" and other.method.name != cell.method.name):
                continue
            mine, theirs = checker.shapes(cell.model), checker.shapes(other.model)
            if other.model.digest == cell.model.digest or (
                mine and theirs and theirs.parameters <= mine.parameters
            ):
                yield mark, other

    def warnings(
        self, unmade: Sequence[Cell], scorings: Sequence[Scoring], checker: Checker
    ) -> list[str]:
        """Notes of the plan on cells that are planned differently because they or a sibling ran out of memory."""
        notes: dict[str, None] = {}
        for cell in unmade:
            for _, other in self._worst_sibling(cell, "quantize", checker):
                notes.setdefault(
                    f"{cell.title} is quantized in a pass of its own, because {other.title} ran out of memory"
                )
        for scoring in scorings:
            if scoring.batch_size:
                ways = ["in batches of 1"]
                ways += [f"on {scoring.devices} GPUs"] if scoring.devices > scoring.min_gpus else []
                ways += ["with its blocks in main memory"] if scoring.offload else []
                for cell in scoring.cells:
                    for _, other in self._worst_sibling(cell, "evaluate", checker):
                        notes.setdefault(
                            f"{cell.title} is scored {', '.join(ways)}, because {other.title} ran out of memory"
                        )
        return list(notes)

    def _worst_sibling(
        self, cell: Cell, stage: str, checker: Checker
    ) -> list[tuple[Mapping[str, Any], Cell]]:
        """The sibling that ran out of memory with the fewest checkpoints made together, if there is one."""
        return sorted(
            self._siblings(cell, stage, checker), key=lambda pair: int(pair[0].get("beside", 2))
        )[:1]

    def quantize_seconds(self, cells: Sequence[Cell], shapes: Shapes, runtime: Runtime) -> float:
        known = [self.quantized.get((cell.model.digest, cell.method.name)) for cell in cells]
        rate = FLOPS_PER_GPU if uses_gpu(runtime) else FLOPS_PER_THREAD * max(1, count_cores() // 2)
        return sum(
            quantize_flops(c, shapes) / rate + 0.01 if k is None else k
            for c, k in zip(cells, known, strict=True)
        )

    def evaluate_seconds(
        self, cells: Sequence[Cell], evaluations: Sequence[Sequence[Evaluation]]
    ) -> float | None:
        """None where an evaluation was never run on the model: its cost depends on data that a plan does not read."""
        known = [
            self.scored.get((cell.model.digest, evaluation.name))
            for cell, wanted in zip(cells, evaluations, strict=True)
            for evaluation in wanted
        ]
        return None if None in known else sum(value for value in known if value is not None)


def quantize_flops(cell: Cell, shapes: Shapes) -> float:
    """Floating-point operations of one checkpoint: two forward passes over the windows, Hessians, rounding, training epochs; of a
    reduction one more forward pass, or its training (of the smaller model, a lower bound)."""
    weights = sum(linear.out_features * linear.in_features for linear in shapes.linears)
    surveyed = 0.0
    if cell.method.reduction is not None and cell.calibration is not None:
        length, tokens = cell.calibration.length, cell.calibration.samples * cell.calibration.length
        surveyed = 2.0 * weights * tokens
        if "tokens" in cell.method.reduction.needs:
            settings = dict(cell.method.reduction.settings)
            surveyed = 6.0 * weights * _trained_tokens(settings, tokens, length)
    if not cell.method.quantizes:
        return surveyed * shapes.blocks
    widths = {linear.group: linear.in_features for linear in shapes.linears}
    total = 20.0 * weights + surveyed
    if cell.method.needs_base:  # a singular value decomposition of each matrix
        total += sum(
            20.0
            * linear.out_features
            * linear.in_features
            * min(linear.out_features, linear.in_features)
            for linear in shapes.linears
        )
    if cell.method.needs_calibration and cell.calibration is not None:
        length = cell.calibration.length
        tokens = cell.calibration.samples * length
        total += 2 * 2.0 * weights * tokens
        if "hessian" in cell.method.needs:
            total += 2.0 * tokens * sum(width**2 for width in widths.values())
            total += sum(
                2.0 * linear.out_features * linear.in_features**2 for linear in shapes.linears
            )
            total += sum(float(width) ** 3 for width in widths.values())
        if "cross" in cell.method.needs:  # both models, in each of four stages
            total += 4 * 2 * 2.0 * weights * tokens
            total += 2.0 * tokens * sum(width**2 for width in widths.values())
        for part in cell.method.parts:
            total += 6.0 * weights * _trained_tokens(dict(part.settings), tokens, length)
    return total * shapes.blocks


def _trained_tokens(settings: Mapping[str, Any], tokens: int, length: int) -> float:
    """Tokens that a part of a method trains on: epochs over the windows, iterations or steps of a batch of windows of `length`, or
    steps of a batch of texts (an upper bound)."""
    if settings.keys() >= {"iterations", "batch"}:
        return float(settings["iterations"] * min(settings["batch"] * length, tokens))
    if settings.keys() >= {"steps", "batch", "prompt_length", "answer_length"}:
        return float(
            settings["steps"]
            * settings["batch"]
            * (settings["prompt_length"] + settings["answer_length"])
        )
    if settings.keys() >= {"steps", "batch"}:
        return float(settings["steps"] * min(settings["batch"] * length, tokens))
    epochs = settings.get("epochs", 0)
    return tokens * epochs if isinstance(epochs, int | float) else 0.0
