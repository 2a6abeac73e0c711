"""Which cells share an input stream, and how many checkpoints make one pass."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

from harness.core.cell import Cell


def by_stream(checkpoints: list[list[Cell]]) -> list[list[Cell]]:
    """Checkpoints in the sweep's order, except that those of one input stream become neighbours."""
    order = {
        stream: number
        for number, stream in enumerate(dict.fromkeys(stream_of(cells[0]) for cells in checkpoints))
    }
    return sorted(checkpoints, key=lambda cells: order[stream_of(cells[0])])


def stream_of(cell: Cell) -> tuple[Any, ...]:
    """The input stream of a cell: cells with equal streams see the same inputs in every block."""
    if not cell.method.reads_inputs or cell.inputs == "full_precision":
        return (0, cell.inputs)
    return (1, cell.method.name, cell.scheme.name)


def chunk_size(streams: Sequence[Hashable], count: int, limit: int) -> int:
    """How many checkpoints, from the first, make one pass. streams: the input stream of each checkpoint, equal ones side by side.

    About `count`, at most `limit`. A stream is cut only for the limit, because its checkpoints share every forward pass.
    Checkpoints of different streams share only the reading after block 0, which is worth less than idle slots.
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
