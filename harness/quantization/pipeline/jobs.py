"""One checkpoint in the making, and a block after a transform."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from harness.core.cell import Cell, Part
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.pipeline.observers import Statistics

EMBEDDINGS, FULL = "embeddings", "full_precision"  # histories; all others are digests


@dataclass
class Job:
    """One checkpoint in the making. history: of the stream that it reads next."""

    cell: Cell
    key: str
    cell_keys: tuple[str, ...]
    writer: CheckpointWriter
    transform: Any = None
    rounding: Any = None
    finished: int = 0  # blocks in the writer
    history: str = EMBEDDINGS
    seconds: float = 0.0
    own_stream: bool = False  # its transform rewrites the ends, so its stream starts elsewhere
    added_bits: int = 0  # of parameters that the model does not have
    failed: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.cell.method.needs)

    @property
    def reads_stream(self) -> bool:
        return self.cell.method.reads_inputs

    def needs_of(self, part: Part | None) -> frozenset[str]:
        return frozenset(part.needs) if part is not None else frozenset()


@dataclass
class RewrittenBlock:
    """A block after a transform, shared by the cells of a stream that have the same one."""

    tensors: dict[str, Tensor]
    statistics: Statistics
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
