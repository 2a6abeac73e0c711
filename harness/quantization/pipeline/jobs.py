"""One checkpoint in the making, and the block as the cells of one stream see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.core import plugins
from harness.core.cell import Cell, Part, to_json
from harness.core.errors import MethodError
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.methods.protocols import Evidence
from harness.quantization.models.protocols import WeightLocation
from harness.quantization.pipeline.observers import OF_INPUTS, InputEvidence, Statistics

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
    overrides: dict[Part, Any] = field(default_factory=dict)  # roundings of single linears
    finished: int = 0  # blocks in the writer
    history: str = EMBEDDINGS
    seconds: float = 0.0
    own_stream: bool = False  # its transform rewrites the ends, so its stream starts elsewhere
    added_bits: int = 0  # bits of parameters that the model does not have
    failed: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.cell.method.needs)

    @property
    def reads_stream(self) -> bool:
        return self.cell.method.reads_inputs

    def needs_of(self, part: Part | None) -> frozenset[str]:
        return frozenset(part.needs) if part is not None else frozenset()

    @property
    def rounding_needs(self) -> frozenset[str]:
        """What any rounding of the cell needs."""
        method = self.cell.method
        own = [self.needs_of(override.rounding) for override in method.overrides]
        return self.needs_of(method.rounding).union(*own)

    def build(self) -> None:
        """Build the plugins of the cell's method. Raises ConfigError or MethodError for what cannot be built."""
        method = self.cell.method
        for kind in ("transform", "rounding"):
            part: Part | None = getattr(method, kind)
            if part is not None:
                setattr(self, kind, plugins.build(kind, part.name, to_json(part)["settings"]))
        for part in dict.fromkeys(override.rounding for override in method.overrides):
            self.overrides[part] = plugins.build("rounding", part.name, to_json(part)["settings"])
        several = [self.rounding, *self.overrides.values()] if self.overrides else []
        if any(hasattr(r, "round_block") or getattr(r, "sequential", False) for r in several):
            raise MethodError(
                f"{self.cell.title}: roundings can differ between matrices only where each works linear by linear on the "
                "unrounded block"
            )

    def evidence(
        self, block: BlockInStream, locations: Sequence[WeightLocation]
    ) -> tuple[dict[str, Evidence], dict[str, int]]:
        """What the roundings of these matrices need, by linear name; and those of which too few tokens were seen."""
        evidence: dict[str, Evidence] = {}
        too_few: dict[str, int] = {}
        for part, own in self.by_rounding(block.index, locations).items():
            if needs := self.needs_of(part):
                evidence |= block.evidence(own, needs, self.cell.inputs)
                too_few |= block.too_few_tokens(own, needs)
        return evidence, too_few

    def rounding_of(self, index: int, name: str) -> Any:
        """The rounding plugin of one linear of a block."""
        part = self.cell.method.rounding_for(index, name)
        if part is None or part == self.cell.method.rounding:
            return self.rounding
        return self.overrides[part]

    def by_rounding(
        self, index: int, locations: Sequence[WeightLocation]
    ) -> dict[Part | None, list[WeightLocation]]:
        """Matrices of a block by the rounding that they get."""
        found: dict[Part | None, list[WeightLocation]] = {}
        for location in locations:
            part = self.cell.method.rounding_for(index, location.name)
            found.setdefault(part, []).append(location)
        return found


@dataclass
class RewrittenBlock:
    """A block after a transform, shared by the cells of a stream that have the same one."""

    tensors: dict[str, Tensor]
    statistics: Statistics
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class BlockInStream:
    """One block of the model as the cells of one stream see it. Tensors are shared between cells: never write to them.

    index       position in the model, from 0
    original    the block's tensors as the model has them, by name
    tensors     the same as they stand: `original`, or what a transform made of it
    statistics  of the inputs of the block's groups, when the block has `tensors`
    hidden      the block's inputs in this stream, one [1, length, hidden] per sequence; None: the cells read no inputs
    references  outputs of the original block on full-precision inputs, alike; None where no cell of the pass reads them
    full        the block's inputs in the full-precision model; None where they are `hidden`, or no cell compares with them
    gradients   squared gradients of the original matrices, [out, in] by linear name; empty where no cell reads them
    base        matrices of the fine-tune's base, [out, in] float32 by linear name; empty where no cell reads them
    """

    index: int
    original: dict[str, Tensor]
    tensors: dict[str, Tensor]
    statistics: Statistics
    hidden: list[Tensor] | None
    references: list[Tensor] | None
    gradients: dict[str, Tensor]
    base: dict[str, Tensor] = field(default_factory=dict)
    full: list[Tensor] | None = None

    def after(self, made: RewrittenBlock) -> BlockInStream:
        """The block as a transform left it."""
        return dataclasses.replace(self, tensors=made.tensors, statistics=made.statistics)

    def evidence(
        self, locations: Sequence[WeightLocation], needs: frozenset[str], basis: str
    ) -> dict[str, Evidence]:
        """Evidence by linear name; linears of a group share one object, unless gradients or bases differ between them. Even with
        bases they share what they compute once.

        basis: "quantized" or "full_precision", the inputs of the cell that reads it.
        """
        by_group: dict[str, InputEvidence] = {}
        found: dict[str, Evidence] = {}
        more: dict[str, Callable[[], Tensor]] = {}
        if self.references is not None:
            more["reference"] = partial(torch.cat, self.references)
        for location in locations:
            of_group = self.statistics.get(location.group)
            if of_group is None:
                continue
            own: dict[str, Callable[[], Tensor]] = {}
            if "squared_gradient" in needs:
                own["squared_gradient"] = partial(self.gradients.__getitem__, location.name)
            if "base_weight" in needs:
                own["base_weight"] = partial(self.base.__getitem__, location.name)
            if own:
                memo_of = location.name if "squared_gradient" in needs else None
                found[location.name] = InputEvidence(
                    of_group, needs, basis, memo_of, {**more, **own}
                )
            else:
                found[location.name] = by_group.setdefault(
                    location.group, InputEvidence(of_group, needs, basis, None, more)
                )
        return found

    def too_few_tokens(
        self, locations: Sequence[WeightLocation], needs: Collection[str]
    ) -> dict[str, int]:
        """Matrices of experts that too few calibration tokens reached, with the number of these tokens.

        Too few is no token at all, or, for a method that reads the second moment of the inputs, fewer tokens than inputs: the
        moment is singular then.
        """
        found: dict[str, int] = {}
        for location in locations:
            if location.expert is None or not set(needs) & set(OF_INPUTS):
                continue
            inputs = location.view(self.tensors[location.parameter]).shape[1]
            enough = inputs if "hessian" in needs else 1
            of_group = self.statistics.get(location.group)
            tokens = of_group.tokens if of_group is not None else 0
            if tokens < enough:
                found[location.name] = tokens
        return found


def first_needs(jobs: Sequence[Job]) -> dict[str, frozenset[str]]:
    """Statistics of the original block that the jobs need: for their transforms, or for their roundings where they have none."""
    needs = frozenset(
        need
        for job in jobs
        for need in (
            job.needs_of(job.cell.method.transform)
            if job.transform is not None
            else job.rounding_needs
        )
    )
    return {"*": needs} if jobs else {}


def scheme_of(cell: Cell, with_execution: bool) -> Any:
    """A cell's scheme as JSON values without its name; with_execution: how activations and cache are rounded too."""
    scheme = to_json(cell.scheme)
    drop = {"name"} if with_execution else {"name", "activation", "kv"}
    return {key: value for key, value in scheme.items() if key not in drop}
