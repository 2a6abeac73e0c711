"""Cells grouped into passes and scorings."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from harness.core.cell import Calibration, Cell, Evaluation, Model, cell_key, quantize_key
from harness.core.sweep import Sweep
from harness.planning import resources
from harness.planning.checks import Checker
from harness.planning.estimates import History, checkpoint_bytes, fits_in_memory, pass_memory
from harness.planning.plan import CHECKPOINTS_PER_PASS, Pass, Scoring
from harness.planning.resources import DTYPE_BYTES, gpu_share, uses_gpu
from harness.planning.streams import by_stream, chunk_size, stream_of

if TYPE_CHECKING:
    from harness.core.shapes import Shapes


def make_passes(
    unmade: Sequence[Cell], sweep: Sweep, checker: Checker, history: History, workers: int
) -> Iterable[Pass]:
    """Group what is not quantized by rank, model and calibration windows, and cut each group for memory and the workers known now.

    A run cuts anew for the slots that it finds (`board`).
    """
    by_key: dict[str, list[Cell]] = {}
    for cell in unmade:
        by_key.setdefault(quantize_key(cell), []).append(cell)
    by_walk: dict[tuple[int, Model, Calibration | None, str], list[list[Cell]]] = {}
    for (
        key,
        cells,
    ) in by_key.items():  # what ran out of memory before, here or in a smaller sibling, walks alone
        first = cells[0]
        rank, alone = (
            min(sweep.rank(cell_key(cell)) for cell in cells),
            history.ran_out(first, "quantize", checker) is not None,
        )
        walk = (
            rank,
            first.model,
            first.calibration if first.method.needs else None,
            key if alone else "",
        )
        by_walk.setdefault(walk, []).append(cells)
    for (rank, model, _, single), group in sorted(by_walk.items(), key=lambda item: item[0][0]):
        shapes, checkpoints = checker.shapes(model), by_stream(group)
        assert shapes is not None, "a model without shapes is refused"
        limit = (
            1 if single else _limit([cells[0] for cells in checkpoints], shapes, checker, workers)
        )
        share = max(1, workers // len(by_walk))
        while checkpoints:
            count = chunk_size(
                [stream_of(cells[0]) for cells in checkpoints], -(-len(checkpoints) // share), limit
            )
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
                whole=len(made) == 1
                and not fits_in_memory(made, shapes, checker, workers)
                and gpu_share(checker.runtime) < 1,
                rank=rank,
                limit=limit,
            )


def _limit(checkpoints: Sequence[Cell], shapes: Shapes, checker: Checker, workers: int) -> int:
    """Checkpoints, side by side in this order, that memory allows in one pass."""
    limit = CHECKPOINTS_PER_PASS
    while limit > 1 and not all(
        fits_in_memory(checkpoints[start : start + limit], shapes, checker, workers)
        for start in range(max(1, len(checkpoints) - limit + 1))
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
        words += [
            "statistics of block 0 shared"
            if not shared
            else f"one input stream shared by {max(shared)}"
        ]
    return ", ".join(words)


def make_scorings(
    missing: Sequence[Cell],
    unscored: Mapping[int, tuple[Evaluation, ...]],
    sweep: Sweep,
    checker: Checker,
    history: History,
) -> Iterable[Scoring]:
    """The missing evaluations, one group per model."""
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
        if (
            devices > least
            and uses_gpu(sweep.runtime)
            and not sweep.runtime.cluster.address
            and devices > resources.count_gpus()
        ):
            devices, offload = least, True
        yield Scoring(
            tuple(cells),
            evaluations,
            seconds,
            need,
            max(devices, least),
            least,
            checker.is_whole(model),
            batch_size,
            offload,
        )
