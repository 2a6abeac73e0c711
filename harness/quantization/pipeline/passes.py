"""The loop over a model's blocks that quantizes many cells in one pass. It exists only here.

Each block is read once. Every cell belongs to a stream. The inputs of a block depend only on the stream's history, so cells with
the same history share the block's forward, its statistics and their transforms. Sharing never changes a number: a cell gives the
same bytes in a pass of its own and in a pass with other cells.

    history of a cell's stream     at block 0                  after it
    inputs: full_precision         the embeddings              outputs of the original blocks: one stream for all such cells
    inputs: quantized              the embeddings              outputs of the cell's own rounded blocks, one stream per distinct
                                                               (parts, schemes of the blocks so far)

Per block and cell: statistics of the original block → transform → statistics of the rewritten block → rounding, group by group
when true-sequential → the block is stored → its dequantized weights make the stream's next inputs.

Peak memory on the device: three copies of a block, the statistics of its groups, one sequence's activations. Activations of all
sequences wait on the CPU, one copy per stream.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import (
    BASE_WEIGHT,
    Cell,
    Scheme,
    WeightScheme,
    cell_key,
    digest,
    quantize_key,
    to_json,
)
from harness.core.errors import DataError, HarnessError, MethodError
from harness.core.events import Event, Failed, Progress, Quantized, failure
from harness.quantization.formats.base_model import BaseModel, with_base
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.methods.protocols import other_basis
from harness.quantization.models.protocols import WeightLocation, get_tensor
from harness.quantization.numerics.randomness import generator
from harness.quantization.numerics.weights import DenseWeight, QuantizedWeight
from harness.quantization.pipeline import report
from harness.quantization.pipeline.blocks import StreamedBlock
from harness.quantization.pipeline.fisher import SquaredGradients
from harness.quantization.pipeline.jobs import (
    EMBEDDINGS,
    FULL,
    BlockInStream,
    Job,
    RewrittenBlock,
    first_needs,
    scheme_of,
)
from harness.quantization.pipeline.model_gradients import StreamedModel
from harness.quantization.pipeline.observers import OF_INPUTS, GroupStatistics, Statistics
from harness.quantization.pipeline.walk import Walk


def run_pass(
    cells: Sequence[Cell],
    folder: Path,
    windows: Tensor | None,
    writers: Mapping[str, CheckpointWriter],
    device: str = "cpu",
    *,
    scratch: Path | None = None,
) -> Iterator[Event]:
    """Quantize every cell of one model, and write a checkpoint for each quantize_key.

    cells    of one model, and of one calibration where they have any
    folder   of the model
    windows  [samples, length] tokens; None when no cell's method needs data
    writers  by quantize_key; what they hold already is read back, not done again
    scratch  space for squared gradients; a temporary folder when None

    Yields Progress after each block, Quantized for each finished checkpoint, Failed for a cell that leaves the pass.
    Raises ModelError when the model cannot be read: then no cell could go on.
    """
    with ExitStack() as stack:
        space = (
            scratch
            if scratch is not None
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-")))
        )
        yield from _Pass(cells, folder, windows, writers, device, space).run()


class _Pass(Walk):
    def __init__(
        self,
        cells: Sequence[Cell],
        folder: Path,
        windows: Tensor | None,
        writers: Mapping[str, CheckpointWriter],
        device: str,
        scratch: Path,
    ) -> None:
        models = {(cell.model.digest, cell.model.source, cell.model.dtype) for cell in cells}
        assert len(models) == 1, f"one model per pass, not {sorted(models)}"
        bases = {cell.model.base_digest for cell in cells if cell.method.needs_base}
        assert len(bases) <= 1, f"one base per pass, not {sorted(bases)}"
        self.windows, self.scratch = windows, scratch
        super().__init__(folder, cells[0].model.dtype, device)
        self.base: BaseModel | None = None
        self.jobs = self._jobs(cells, writers)
        self.streams: dict[str, list[Tensor]] = {}
        self.gradients: SquaredGradients | None = None
        self.failures: list[Failed] = []
        self.shared = report.SharedSeconds()

    def _jobs(self, cells: Sequence[Cell], writers: Mapping[str, CheckpointWriter]) -> list[Job]:
        by_key: dict[str, list[Cell]] = {}
        for cell in cells:
            by_key.setdefault(quantize_key(cell), []).append(cell)
        missing = [members[0].title for key, members in by_key.items() if key not in writers]
        assert not missing, f"no writer for {missing}"
        jobs = []
        for key, members in by_key.items():
            names, writer = tuple(dict.fromkeys(cell_key(cell) for cell in members)), writers[key]
            jobs.append(
                Job(
                    members[0],
                    key,
                    names,
                    writer,
                    finished=writer.finished_blocks(),
                    seconds=writer.seconds(),
                )
            )
        return jobs

    # --- the loop -------------------------------------------------------------------------------------------------------------

    def run(self) -> Iterator[Event]:
        for job in self.jobs:
            self._try(job, "start", partial(self._open, job))
        yield from self._report_failures()
        for job in self._alive():
            if not job.cell.method.quantizes:
                yield from self._finish(job)
        yield from self._learn()
        self._start_streams()
        yield from self._report_failures()
        count = len(self.blocks)
        for index in range(count):
            if any(job.finished <= index for job in self._alive()) or self._streams_wanted():
                self._walk_block(index)
                yield from self._report_failures()
            for job in self._alive():
                if job.finished <= index:
                    job.writer.write_seconds(self.shared.cost_of(job))
            keys = tuple(key for job in self._alive() for key in job.cell_keys)
            if keys:
                yield Progress(time.time(), keys, "block", index + 1, count)
        for job in self._alive():
            if job.cell.method.quantizes:
                yield from self._finish(job)

    def _open(self, job: Job) -> None:
        """Build the plugins of a job. Raises MethodError or DataError for a cell that a pass cannot quantize."""
        method = job.cell.method
        if method.tuning is not None:
            raise MethodError(
                f"{job.cell.title}: a pass rounds and does not train; {method.tuning.name} starts from its checkpoint"
            )
        if not method.quantizes:
            return
        job.build()
        if method.needs_calibration and self.windows is None:
            needs = ", ".join(sorted(job.needs))
            raise DataError(
                f"{job.cell.title}: the method needs {needs} of calibration data, and the pass has none"
            )
        if method.needs_base and self.base is None:
            self.base = BaseModel.of(job.cell)
        job.own_stream = hasattr(job.transform, "rewrite_ends")
        if job.own_stream and (reason := other_basis(job.needs)):
            raise MethodError(f"{job.cell.title}: {reason}")
        for index in range(0 if job.writer.manifest() else job.finished):
            dense = job.writer.read_block(index).dense
            job.added_bits += report.added_bits(self.blocks, index, dense)

    def _learn(self) -> Iterator[Event]:
        """Let transforms learn from the whole model, before blocks are quantized; once for cells of one transform and scheme."""
        waiting: dict[str, list[Job]] = {}
        for job in self._alive():
            if hasattr(job.transform, "learn") and job.finished < len(self.blocks):
                part = job.cell.method.transform
                assert part is not None
                seed = job.cell.seed if part.stochastic else None
                waiting.setdefault(
                    digest([to_json(part), scheme_of(job.cell, part.activation_aware), seed]), []
                ).append(job)
        for jobs in waiting.values():
            began, held = time.monotonic(), [job.writer.learned() for job in jobs]
            learned = next((tensors for tensors in held if tensors is not None), None)
            if learned is None:
                try:
                    learned = yield from self._learn_once(jobs)
                except Exception as error:  # a method's code may raise anything
                    for job in jobs:
                        self._fail(job, "learning", error)
                    yield from self._report_failures()
                    continue
            for job, own in zip(jobs, held, strict=True):
                if own is None:
                    job.writer.write_learned(learned)
                    job.seconds += time.monotonic() - began
                job.transform.use(learned)

    def _learn_once(self, jobs: Sequence[Job]) -> Generator[Event, None, dict[str, Tensor]]:
        """Let the first job's transform learn, for all of them."""
        first, keys = jobs[0], tuple(key for job in jobs for key in job.cell_keys)
        assert self.windows is not None, "refused by _open"
        folder, dtype = self.blocks.folder, first.cell.model.dtype
        model = StreamedModel(
            folder, dtype, str(self.blocks.device), self.windows, first.cell.scheme.kv
        )
        learning = first.transform.learn(
            model, first.cell.scheme, generator(first.cell.seed, -1, "learning")
        )
        while True:
            try:
                step, steps = next(learning)
            except StopIteration as end:
                learned: dict[str, Tensor] = end.value
                return learned
            yield Progress(time.time(), keys, "learning", step, steps)

    def _start_streams(self) -> None:
        """Compute the first block's inputs and squared gradients, each only if an unfinished cell needs them."""
        unfinished = [job for job in self._alive() if job.finished < len(self.blocks)]
        if any(job.reads_stream for job in unfinished):
            assert self.windows is not None
            with self.shared.measure("stream"):
                embedded = self.blocks.start(self.windows)
                self.streams[EMBEDDINGS] = [h.to(self.storage) for h in embedded]
            del embedded
        if any("squared_gradient" in job.needs for job in unfinished):
            assert self.windows is not None
            with self.shared.measure("gradients"):
                self.gradients = SquaredGradients(self.blocks, self.windows, self.scratch)
        for job in [job for job in self._alive() if job.own_stream]:
            self._try(job, "ends", partial(self._rewrite_ends, job))

    def _rewrite_ends(self, job: Job) -> None:
        """A transform of the residual stream rewrites embeddings, final norm and head, and the stream starts from them.

        Optional method of a Transform: rewrite_ends(ends, shapes, scheme, rng) -> the tensors outside the blocks that it changed,
        by name; a tied head is given, and may be returned, as a tensor of its own.
        """
        ends = self.blocks.ends()
        changed = job.transform.rewrite_ends(
            dict(ends), self.blocks.shapes, job.cell.scheme, generator(job.cell.seed, -1, "ends")
        )
        job.writer.write_ends(changed)
        job.added_bits += sum(
            8 * t.numel() * t.element_size()
            for n, t in changed.items()
            if n not in self.blocks.parameters
        )
        if job.reads_stream and job.finished < len(self.blocks):
            assert self.windows is not None
            job.history = digest(
                [
                    EMBEDDINGS,
                    to_json(job.cell.method.transform),
                    to_json(job.cell.scheme),
                    job.cell.seed,
                ]
            )
            if job.history not in self.streams:
                self.streams[job.history] = [
                    h.to(self.storage) for h in self.blocks.start(self.windows, changed)
                ]

    def _alive(self) -> list[Job]:
        return [job for job in self.jobs if not job.failed]

    def _streams_wanted(self) -> bool:
        return any(job.reads_stream and job.finished < len(self.blocks) for job in self._alive())

    def _reads_full(self, job: Job, index: int) -> bool:
        """The job will read outputs of the original block `index`: as its inputs, or as what to come close to."""
        later = index + 1 < len(self.blocks) and job.finished < len(self.blocks)
        follows = job.reads_stream and job.cell.inputs == FULL and not job.own_stream
        return (later and (follows or "cross" in job.needs)) or (
            "reference" in job.needs and (job.finished <= index or later)
        )

    def _walk_block(self, index: int) -> None:
        blocks = self.blocks
        with self.shared.measure("stream"):
            original = blocks.tensors(index)
        with self.shared.measure("gradients"):
            gradients = self.gradients.read(index) if self.gradients is not None else {}
        alive = self._alive()
        base: dict[str, Tensor] = {}
        if self.base is not None and any(job.cell.method.needs_base for job in alive):
            with self.shared.measure("stream"):
                base = self.base.matrices(index, blocks.device)
        unobserved = self._without_stream(index, original, gradients, base)
        for job in alive:
            if not job.reads_stream and job.finished <= index:
                self._try(job, f"block {index}", partial(self._quantize, job, unobserved))
        first = EMBEDDINGS if index == 0 else FULL
        following: dict[str, list[Tensor]] = {}
        readers = [job for job in alive if job.reads_stream and job.finished < len(blocks)]
        histories = list(dict.fromkeys([first, *(job.history for job in readers)]))
        references: list[Tensor] | None = None
        inputs = self.streams.get(first)
        for history in histories:
            members = [job for job in readers if job.history == history and not job.failed]
            is_read = history == first and any(
                self._reads_full(job, index) for job in self._alive()
            )
            working = [job for job in members if job.finished <= index]
            if not (members or is_read):
                continue
            hidden = self.streams.pop(history)
            compares = history != first and any("cross" in job.needs for job in working)
            full = inputs if compares else None
            try:
                with self.shared.measure("stream"):
                    statistics, outputs = self._observe(
                        index,
                        blocks.build(index, original),
                        hidden,
                        first_needs(working),
                        is_read,
                        self._original(index, original, full),
                    )
            except Exception as error:  # nothing of this stream can go on
                for job in self._alive():
                    if job in members or (is_read and self._reads_full(job, index)):
                        self._fail(job, f"block {index}", error)
                continue
            if is_read:
                following[FULL] = references = outputs
            self._walk_stream(
                BlockInStream(
                    index, original, original, statistics, hidden, references, gradients, base, full
                ),
                members,
                following,
            )
        self.streams = following

    def _without_stream(
        self,
        index: int,
        original: dict[str, Tensor],
        gradients: dict[str, Tensor],
        base: dict[str, Tensor],
    ) -> BlockInStream:
        """The block for cells that read no inputs: its groups have no statistics."""
        tokens = self.windows.numel() if self.windows is not None else 0
        groups = dict.fromkeys(location.group for location in self.blocks.locations(index))
        nothing = {group: GroupStatistics(group, tokens, True, {}) for group in groups}
        return BlockInStream(index, original, original, nothing, None, None, gradients, base)

    def _walk_stream(
        self, block: BlockInStream, members: list[Job], following: dict[str, list[Tensor]]
    ) -> None:
        """Quantize the members of one stream, transform by transform, and add the streams that they read next to `following`."""
        rewritten: dict[str, RewrittenBlock] = {}  # the block after the last transform, by its key
        for job in sorted(members, key=self._transform_key):
            work = partial(self._walk_job, job, block, rewritten, following)
            self._try(job, f"block {block.index}", work)

    def _walk_job(
        self,
        job: Job,
        block: BlockInStream,
        rewritten: dict[str, RewrittenBlock],
        following: dict[str, list[Tensor]],
    ) -> None:
        """Quantize the block for one cell, or read it back, and run it if no other cell has made its outputs yet."""
        index = block.index
        made: RewrittenBlock | None = None
        if job.finished <= index:
            if job.transform is not None:
                key = self._transform_key(job)
                if key not in rewritten:
                    rewritten.clear()  # frees the last one before the next is made
                    rewritten[key] = self._rewrite(job, block)
                made = rewritten[key]
            parameters = self._quantize(job, block, made)
        else:
            parameters = self._read_back(job, block)
        if index + 1 == len(self.blocks) or job.finished == len(self.blocks):
            return
        if job.cell.inputs == FULL and not job.own_stream:
            job.history = FULL
            return
        job.history = self._next_history(job, index)
        if job.history in following:
            return
        if job.cell.inputs == FULL:  # the transformed block, not the rounded one
            parameters = made.tensors if made is not None else self._retransform(job, block)
        assert block.hidden is not None, "only cells that read a stream stand in one"
        began = time.monotonic()
        module = self.blocks.build(index, parameters)
        following[job.history] = self._observe(index, module, block.hidden, {}, True)[1]
        job.seconds += time.monotonic() - began

    # --- one cell, one block --------------------------------------------------------------------------------------------------

    def _rewrite(self, job: Job, block: BlockInStream) -> RewrittenBlock:
        """The block after the job's transform, and what its rounding needs to know of the rewritten block's inputs."""
        began = time.monotonic()
        index, needs = block.index, job.needs_of(job.cell.method.transform)
        module = self._copy_of(block)
        view = self._view(job, block, module, needs, reads_inputs=bool(needs - {"tokens"}))
        notes = job.transform.rewrite_block(
            view, job.cell.scheme, generator(job.cell.seed, index, "transform")
        )
        tensors = _tensors(module)
        left_out = {"pairs_without_calibration": list(view.left_out)} if view.left_out else {}
        del view
        after = job.rounding_needs
        seen: Statistics = {}
        if after:
            rewritten = self.blocks.build(index, tensors)
            original = self._original(index, tensors, block.full)
            seen, _ = self._observe(
                index, rewritten, block.hidden or [], {"*": after}, False, original
            )
        return RewrittenBlock(
            tensors, seen, report.json_values({**notes, **left_out}), time.monotonic() - began
        )

    def _retransform(self, job: Job, block: BlockInStream) -> dict[str, Tensor]:
        """The transformed, unrounded block of a job that was resumed behind it."""
        needs = {"*": job.needs_of(job.cell.method.transform)}
        module = self.blocks.build(block.index, block.original)
        statistics, _ = self._observe(block.index, module, block.hidden or [], needs, False)
        again = dataclasses.replace(block, statistics=statistics, references=None, gradients={})
        return self._rewrite(job, again).tensors

    def _quantize(
        self, job: Job, block: BlockInStream, made: RewrittenBlock | None = None
    ) -> dict[str, Tensor]:
        """Round one block for one job, store it, and return the block's tensors with the rounded weights in their places.

        made: the block after the job's transform, where the stream has it already.
        """
        began = time.monotonic()
        if job.transform is not None and made is None:
            made = self._rewrite(job, block)
        if made is not None:
            block = block.after(made)
        index, tensors = block.index, dict(block.tensors)
        locations = self._locations(index, block.tensors)
        needs = job.rounding_needs
        notes = dict(made.notes) if made is not None else {}
        weights: dict[str, QuantizedWeight] = {}
        if job.rounding is None:
            for location in locations:
                weight = location.view(block.tensors[location.parameter])
                weights[location.name] = DenseWeight(weight.clone())
        elif hasattr(job.rounding, "round_block"):
            module = self._copy_of(block)
            view = self._view(job, block, module, needs, reads_inputs=bool(needs))
            weights = job.rounding.round_block(
                view, job.cell.scheme, generator(job.cell.seed, index, "block")
            )
            tensors = _tensors(module)
            notes |= report.json_values(view.notes)
        else:
            weights, unseen = self._round_layers(job, block)
            notes |= {"rounded_to_nearest": unseen} if unseen else {}
            experts = sum(location.expert is not None for location in locations)
            notes |= {"cross_left_out": experts} if experts and "cross" in needs else {}
        dense = report.changed(
            tensors, block.original, {location.parameter for location in locations}
        )
        where = f"{job.cell.title}, block {index}"
        report.check_coverage(where, locations, block.tensors, weights, dense)
        # a block-wise rounding may have rescaled the block: errors are against the matrices that it rounded
        errors = report.layer_errors(job, index, locations, tensors, weights, block.statistics)
        job.writer.write_block(index, weights, dense, {"linears": errors, "notes": notes})
        job.added_bits += report.added_bits(self.blocks, index, dense)
        job.seconds += time.monotonic() - began + (made.seconds if made is not None else 0.0)
        return self.blocks.with_weights(locations, tensors, weights)

    def _round_layers(
        self, job: Job, block: BlockInStream
    ) -> tuple[dict[str, QuantizedWeight], dict[str, int]]:
        """Linear by linear; with `sequential`, each stage's statistics come from the block with the stages before it rounded.

        Also returns the matrices of experts that too few calibration tokens reached, with their number.
        """
        index, needs = block.index, job.rounding_needs
        locations = self._locations(index, block.tensors)
        sequential = bool(getattr(job.rounding, "sequential", False)) and bool(
            needs & set(OF_INPUTS)
        )
        stages: dict[str, list[WeightLocation]] = {}
        for location in locations:
            stages.setdefault(location.stage or location.group, []).append(location)
        weights: dict[str, QuantizedWeight] = {}
        unseen: dict[str, int] = {}
        for position, members in enumerate(stages.values()):
            now = block
            if sequential and position > 0:
                assert block.hidden is not None
                rounded = [location for location in locations if location.name in weights]
                so_far = self.blocks.with_weights(rounded, block.tensors, weights)
                wanted = {location.group: needs for location in members}
                module = self.blocks.build(index, so_far)
                full = (block.full or block.hidden) if "cross" in needs else None
                original = self._original(index, block.tensors, full)
                seen, _ = self._observe(index, module, block.hidden, wanted, False, original)
                now = dataclasses.replace(block, statistics=seen)
            evidence, too_few = job.evidence(now, members)
            unseen |= too_few
            for location in members:
                name = location.name
                rounding = job.rounding_of(index, name)
                scheme = job.cell.scheme.weight_for(index, name)
                weight = location.view(block.tensors[location.parameter])
                weight = weight.to(torch.float32, copy=True).contiguous()
                rng = generator(job.cell.seed, index, name)
                try:
                    if name in too_few:
                        weights[name] = self._round_unseen(
                            rounding, name, weight, scheme, rng, too_few[name], block.base.get(name)
                        )
                    else:
                        weights[name] = rounding.round_layer(
                            name, weight, evidence.get(name), scheme, rng
                        )
                except HarnessError as error:
                    raise type(error)(f"block {index}, {name}: {error}") from error
        return weights, unseen

    def _round_unseen(
        self,
        rounding: Any,
        name: str,
        weight: Tensor,
        scheme: WeightScheme,
        rng: torch.Generator,
        tokens: int,
        base: Tensor | None,
    ) -> QuantizedWeight:
        """An expert's matrix without enough calibration tokens: as the method itself says, else rounded to nearest.

        A rounding around another leaves it to that one. Optional method of a Rounding: round_unseen(name, weight, scheme, rng),
        and the base's matrix for one that needs it. Raises MethodError where the scheme has no grid to round to.
        """
        rounding = getattr(rounding, "base", rounding)
        if hasattr(rounding, "round_unseen"):
            more = (base,) if BASE_WEIGHT in rounding.needs else ()
            return rounding.round_unseen(name, weight, scheme, rng, *more)
        if not rounding.needs:
            return rounding.round_layer(name, weight, None, scheme, rng)
        grid = getattr(rounding.settings, "grid", None)
        nearest = plugins.build("rounding", "rtn", {} if grid is None else {"grid": grid})
        linears = tuple(linear for linear in self.blocks.shapes.linears if linear.name == name)
        reasons = nearest.check(
            Scheme("", scheme), dataclasses.replace(self.blocks.shapes, linears=linears)
        )
        if reasons:
            raise MethodError(
                f"{tokens} calibration tokens reached this expert, which are too few, and it cannot be rounded to nearest instead "
                f"({'; '.join(reasons)}); use more calibration samples"
            )
        return nearest.round_layer(name, weight, None, scheme, rng)

    def _read_back(self, job: Job, block: BlockInStream) -> dict[str, Tensor]:
        """The rounded block as the writer holds it."""
        device = self.blocks.device
        content = job.writer.read_block(block.index, device)
        dense = {name: tensor.to(device) for name, tensor in content.dense.items()}
        weights = with_base(content.weights, block.base)
        return self.blocks.with_weights(
            self.blocks.locations(block.index), {**block.original, **dense}, weights
        )

    def _copy_of(self, block: BlockInStream) -> nn.Module:
        """A module with copies of the block's tensors, for a method to change."""
        copies = {name: tensor.clone() for name, tensor in block.tensors.items()}
        return self.blocks.build(block.index, copies)

    def _view(
        self,
        job: Job,
        block: BlockInStream,
        module: nn.Module,
        needs: frozenset[str],
        *,
        reads_inputs: bool,
    ) -> StreamedBlock:
        locations = self._locations(block.index, block.tensors)
        return StreamedBlock(
            self.blocks,
            block.index,
            module,
            block.tensors,
            block.evidence(locations, needs, job.cell.inputs) if needs else {},
            block.hidden if reads_inputs else None,
            block.references if "reference" in needs else None,
            block.too_few_tokens(self.blocks.locations(block.index), needs),
        )

    # --- bookkeeping ----------------------------------------------------------------------------------------------------------

    def _transform_key(self, job: Job) -> str:
        """Equal keys rewrite a block of one stream into the same block."""
        part = job.cell.method.transform
        if part is None:
            return ""
        return digest(
            {
                "part": to_json(part),
                "scheme": scheme_of(job.cell, part.activation_aware),
                "needs": sorted(job.needs),
                "seed": job.cell.seed if part.stochastic else None,
                "after": sorted(job.rounding_needs),
            }
        )

    def _next_history(self, job: Job, index: int) -> str:
        """The stream that a cell reads next: the same for cells whose blocks up to `index` are equal and had equal inputs."""
        method = job.cell.method
        parts = [part for part in method.parts]
        names = [location.name for location in self.blocks.locations(index)]
        return digest(
            {
                "before": job.history,
                "parts": [to_json(method.transform), to_json(method.rounding)],
                "overrides": to_json(method.overrides),
                "inputs": job.cell.inputs,
                "schemes": [to_json(job.cell.scheme.weight_for(index, name)) for name in names],
                # a transform or a block-wise rounding sees the whole scheme
                "scheme": scheme_of(job.cell, any(part.activation_aware for part in parts))
                if method.transform is not None or hasattr(job.rounding, "round_block")
                else None,
                "seed": job.cell.seed if any(part.stochastic for part in parts) else None,
            }
        )

    def _finish(self, job: Job) -> Iterator[Event]:
        """Write the manifest and report the finished checkpoint."""

        def work() -> dict[str, Any]:
            return job.writer.manifest() or job.writer.finish(
                report.manifest_content(job, self.blocks, self.windows, self.shared, self.base)
            )

        manifest = self._try(job, "manifest", work)
        yield from self._report_failures()
        if manifest is not None:
            record = {key: manifest[key] for key in manifest if key not in ("files", "linears")}
            yield Quantized(time.time(), job.cell_keys, record)

    def _try(self, job: Job, stage: str, work: Callable[[], Any]) -> Any:
        """Do a job's own work; an error ends this job and no other job of the pass."""
        if job.failed:
            return None
        try:
            return work()
        except Exception as error:  # a method's code may raise anything
            self._fail(job, stage, error)
            return None

    def _fail(self, job: Job, stage: str, error: Exception) -> None:
        if job.failed:
            return
        job.failed = True
        self.failures.append(failure(error, job.cell_keys, stage))

    def _report_failures(self) -> Iterator[Event]:
        failures, self.failures = self.failures, []
        yield from failures


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: get_tensor(module, name) for name in module.state_dict()}
