"""Cells grouped into passes and scorings."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from harness.core.cell import (
    Calibration,
    Cell,
    Evaluation,
    Model,
    cell_key,
    quantize_key,
    reduction_key,
)
from harness.core.sweep import Sweep
from harness.planning import resources
from harness.planning.checks import Checker
from harness.planning.estimates import History, checkpoint_bytes, fits_in_memory, pass_memory
from harness.planning.plan import CHECKPOINTS_PER_PASS, Pass, Scoring
from harness.planning.resources import DTYPE_BYTES, gpu_fraction, uses_gpu
from harness.planning.streams import by_stream, chunk_size, stream_of

if TYPE_CHECKING:
    from harness.core.shapes import Shapes


def make_passes(
    unmade: Sequence[Cell], sweep: Sweep, checker: Checker, history: History, workers: int
) -> Iterable[Pass]:
    """Group the missing checkpoints by priority tier, model and calibration windows, and cut each group for memory and workers.

    A run cuts the passes anew for the worker slots that it has (`execution.scheduler`).
    """
    by_key: dict[str, list[Cell]] = {}
    for cell in unmade:
        by_key.setdefault(quantize_key(cell), []).append(cell)
    by_group: dict[tuple[int, Model, Calibration | None, str, str], list[list[Cell]]] = {}
    # A checkpoint that ran out of memory before, itself or a smaller sibling, is made in a pass of its own.
    for key, cells in by_key.items():
        first = cells[0]
        priority_tier, alone = (
            min(sweep.priority_tier(cell_key(cell)) for cell in cells),
            history.ran_out(first, "quantize", checker) is not None,
        )
        group_key = (
            priority_tier,
            first.model,
            first.calibration if first.method.needs_calibration else None,
            key if alone else "",
            reduction_key(first) if first.method.reduction is not None else "",
        )
        by_group.setdefault(group_key, []).append(cells)
    for (priority_tier, _, _, single, _), group in sorted(
        by_group.items(), key=lambda item: item[0][0]
    ):
        shapes, checkpoints = checker.reduced_shapes(group[0][0]), by_stream(group)
        assert shapes is not None, "a model without shapes is refused"
        limit = (
            1 if single else _limit([cells[0] for cells in checkpoints], shapes, checker, workers)
        )
        group_workers = max(1, workers // len(by_group))
        while checkpoints:
            count = chunk_size(
                [stream_of(cells[0]) for cells in checkpoints],
                -(-len(checkpoints) // group_workers),
                limit,
            )
            part, checkpoints, group_workers = (
                checkpoints[:count],
                checkpoints[count:],
                max(1, group_workers - 1),
            )
            made = [cells[0] for cells in part]
            together = history.ran_out(made[0], "quantize", checker)
            yield Pass(
                tuple(cell for cells in part for cell in cells),
                _sharing(made, shapes),
                history.quantize_seconds(made, shapes, checker.runtime),
                sum(pass_memory(made, shapes)),
                sum(checkpoint_bytes(cell, shapes) for cell in made),
                exclusive=together is not None and together < 2,
                needs_full_gpu=len(made) == 1
                and not fits_in_memory(made, shapes, checker, workers)
                and gpu_fraction(checker.runtime) < 1,
                priority_tier=priority_tier,
                limit=limit,
            )


def _limit(checkpoints: Sequence[Cell], shapes: Shapes, checker: Checker, workers: int) -> int:
    """The largest number of neighbouring checkpoints, in this order, that memory allows in every pass."""
    limit = CHECKPOINTS_PER_PASS
    while limit > 1 and not all(
        fits_in_memory(checkpoints[start : start + limit], shapes, checker, workers)
        for start in range(max(1, len(checkpoints) - limit + 1))
    ):
        limit -= 1
    return limit


def _sharing(cells: Sequence[Cell], shapes: Shapes) -> str:
    reduction = cells[0].method.reduction
    if reduction is not None:  # one for all cells of a pass
        others = f", shared by {len(cells)}" if len(cells) > 1 else ""
        alone = all(not cell.method.quantizes for cell in cells)
        rest = "nothing to quantize" if alone else _sharing_of_parts(cells, shapes)
        return f"reduced by {reduction.name} first{others}, then {rest}"
    return _sharing_of_parts(cells, shapes)


def _sharing_of_parts(cells: Sequence[Cell], shapes: Shapes) -> str:
    if not any(cell.method.quantizes for cell in cells):
        return "full precision, nothing to quantize"
    streams = collections.Counter(stream_of(cell) for cell in cells if cell.method.reads_inputs)
    gradients = sum("squared_gradient" in cell.method.needs for cell in cells)
    words = [f"{shapes.blocks} blocks read once" if len(cells) > 1 else f"{shapes.blocks} blocks"]
    if any(cell.method.needs_base for cell in cells):
        words.append("with the base's beside them")
    if not any(cell.method.needs_calibration for cell in cells):
        return ", ".join([*words, "data-free"])
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
        # Baselines run first, because other cells are compared with them; otherwise the order of the sweep.
        cells.sort(
            key=lambda cell: (sweep.priority_tier(cell_key(cell)), not cell.method.is_baseline)
        )
        evaluations = tuple(unscored[id(cell)] for cell in cells)
        shapes = checker.shapes(model)
        assert shapes is not None, "a model without shapes is refused"
        seconds = history.evaluate_seconds(cells, evaluations)
        need, min_gpus = shapes.parameters * DTYPE_BYTES[model.dtype], checker.devices(model) or 1
        batch_size, devices, offload = history.scoring_defaults(cells[0], checker)
        if (
            devices > min_gpus
            and uses_gpu(sweep.runtime)
            and not sweep.runtime.cluster.address
            and devices > resources.count_gpus()
        ):
            devices, offload = min_gpus, True
        yield Scoring(
            tuple(cells),
            evaluations,
            seconds,
            need,
            max(devices, min_gpus),
            min_gpus,
            checker.needs_full_gpu(model),
            batch_size,
            offload,
        )
