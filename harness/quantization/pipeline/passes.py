"""The walk through a model's blocks that quantizes many cells together. It exists once, here.

Each block is read once. Cells stand in streams: what a block receives depends only on the stream's history, so cells with one
history share the block's forward, its statistics and their transforms; what they share never changes a number, and a cell alone
and the same cell in company give the same bytes.

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
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import (
    Cell,
    Part,
    Scheme,
    WeightScheme,
    cell_key,
    digest,
    quantize_key,
    to_json,
)
from harness.core.errors import DataError, HarnessError, MethodError
from harness.core.events import Event, Failed, Progress, Quantized
from harness.quantization.calibration import windows_digest
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.methods.protocols import Evidence
from harness.quantization.models.protocols import WeightLocation, get_tensor
from harness.quantization.numerics.randomness import generator
from harness.quantization.numerics.weights import DenseWeight, QuantizedWeight
from harness.quantization.pipeline.blocks import StreamedBlock
from harness.quantization.pipeline.fisher import SquaredGradients
from harness.quantization.pipeline.jobs import EMBEDDINGS, FULL, Job, RewrittenBlock
from harness.quantization.pipeline.model_gradients import StreamedModel
from harness.quantization.pipeline.observers import (
    OF_INPUTS,
    GroupStatistics,
    InputEvidence,
    Statistics,
)
from harness.quantization.pipeline.report import json_values, relative_error
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
        self.windows, self.scratch = windows, scratch
        super().__init__(folder, cells[0].model.dtype, device)
        self.jobs = self._jobs(cells, writers)
        self.streams: dict[str, list[Tensor]] = {}
        self.gradients: SquaredGradients | None = None
        self.failures: list[Failed] = []
        self.shared_seconds, self.gradient_seconds = 0.0, 0.0

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

    # --- the walk -------------------------------------------------------------------------------------------------------------

    def run(self) -> Iterator[Event]:
        for job in self.jobs:
            self._try(job, "start", partial(self._open, job))
        yield from self._report_failures()
        for job in self._alive():
            if job.cell.method.is_baseline:
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
                    job.writer.write_seconds(self._seconds(job))
            keys = tuple(key for job in self._alive() for key in job.cell_keys)
            if keys:
                yield Progress(time.time(), keys, "block", index + 1, count)
        for job in self._alive():
            if not job.cell.method.is_baseline:
                yield from self._finish(job)

    def _open(self, job: Job) -> None:
        """Build the plugins, and refuse what a pass cannot do."""
        method = job.cell.method
        if method.tuning is not None:
            raise MethodError(
                f"{job.cell.title}: a pass rounds and does not train; {method.tuning.name} starts from its checkpoint"
            )
        if method.is_baseline:
            return
        for slot in ("transform", "rounding"):
            part: Part | None = getattr(method, slot)
            if part is not None:
                setattr(job, slot, plugins.build(slot, part.name, to_json(part)["settings"]))
        if job.needs and self.windows is None:
            needs = ", ".join(sorted(job.needs))
            raise DataError(
                f"{job.cell.title}: the method needs {needs} of calibration data, and the pass has none"
            )
        job.own_stream = hasattr(job.transform, "rewrite_ends")
        for index in range(0 if job.writer.manifest() else job.finished):
            job.added_bits += self._added_bits(index, job.writer.read_block(index).dense)

    def _learn(self) -> Iterator[Event]:
        """Before the walk: what transforms learn from the whole model. Cells with one transform and one scheme learn once."""
        waiting: dict[str, list[Job]] = {}
        for job in self._alive():
            if hasattr(job.transform, "learn") and job.finished < len(self.blocks):
                part = job.cell.method.transform
                assert part is not None
                seed = job.cell.seed if part.stochastic else None
                waiting.setdefault(
                    digest([to_json(part), _scheme(job.cell, part.activation_aware), seed]), []
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
        walk = first.transform.learn(
            model, first.cell.scheme, generator(first.cell.seed, -1, "learning")
        )
        while True:
            try:
                step, steps = next(walk)
            except StopIteration as end:
                learned: dict[str, Tensor] = end.value
                return learned
            yield Progress(time.time(), keys, "learning", step, steps)

    def _start_streams(self) -> None:
        """The first block's inputs, where any unfinished cell reads them, and squared gradients, where one needs them."""
        unfinished = [job for job in self._alive() if job.finished < len(self.blocks)]
        if any(job.reads_stream for job in unfinished):
            assert self.windows is not None
            began = time.monotonic()
            self.streams[EMBEDDINGS] = [h.to(self.storage) for h in self.blocks.start(self.windows)]
            self.shared_seconds += time.monotonic() - began
        if any("squared_gradient" in job.needs for job in unfinished):
            assert self.windows is not None
            began = time.monotonic()
            self.gradients = SquaredGradients(self.blocks, self.windows, self.scratch)
            self.gradient_seconds += time.monotonic() - began
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
        return (later and follows) or (
            "reference" in job.needs and (job.finished <= index or later)
        )

    def _walk_block(self, index: int) -> None:
        blocks = self.blocks
        began = time.monotonic()
        original = blocks.tensors(index)
        self.shared_seconds += time.monotonic() - began
        began = time.monotonic()
        gradients = self.gradients.read(index) if self.gradients is not None else {}
        self.gradient_seconds += time.monotonic() - began
        tokens = self.windows.numel() if self.windows is not None else 0
        unobserved = {
            slot.group: GroupStatistics(slot.group, tokens, True, {})
            for slot in blocks.slots(index)
        }
        full = EMBEDDINGS if index == 0 else FULL
        following: dict[str, list[Tensor]] = {}
        alive = self._alive()
        for job in alive:
            if not job.reads_stream and job.finished <= index:
                self._try(
                    job,
                    f"block {index}",
                    partial(
                        self._quantize, job, index, original, unobserved, None, None, gradients
                    ),
                )
        readers = [job for job in alive if job.reads_stream and job.finished < len(blocks)]
        histories = list(dict.fromkeys([full, *(job.history for job in readers)]))
        references: list[Tensor] | None = None
        for history in histories:
            members = [job for job in readers if job.history == history and not job.failed]
            keep = history == full and any(self._reads_full(job, index) for job in self._alive())
            working = [job for job in members if job.finished <= index]
            if not (members or keep):
                continue
            hidden = self.streams.pop(history)
            began = time.monotonic()
            try:
                statistics, outputs = self._observe(
                    index, blocks.build(index, original), hidden, _first_needs(working), keep
                )
            except Exception as error:  # nothing of this stream can go on
                for job in (
                    job
                    for job in self._alive()
                    if job in members or (keep and self._reads_full(job, index))
                ):
                    self._fail(job, f"block {index}", error)
                continue
            self.shared_seconds += time.monotonic() - began
            if keep:
                following[FULL] = references = outputs
            self._walk_stream(
                index, original, hidden, members, statistics, references, gradients, following
            )
        self.streams = following

    def _walk_stream(
        self,
        index: int,
        original: dict[str, Tensor],
        hidden: list[Tensor],
        members: list[Job],
        statistics: Statistics,
        references: list[Tensor] | None,
        gradients: dict[str, Tensor],
        following: dict[str, list[Tensor]],
    ) -> None:
        """Quantize the members of one stream, transform by transform, and lay out the streams that they read next."""
        last = index + 1 == len(self.blocks)
        rewritten: tuple[str, RewrittenBlock] | None = None
        for job in sorted(members, key=lambda job: self._transform_key(job)):

            def work(job: Job = job) -> None:
                nonlocal rewritten
                made: RewrittenBlock | None = None
                if job.finished <= index:
                    key = self._transform_key(job)
                    if job.transform is not None and (rewritten is None or rewritten[0] != key):
                        rewritten = None  # free the last one first
                        rewritten = (
                            key,
                            self._rewrite(
                                job, index, original, hidden, statistics, references, gradients
                            ),
                        )
                    made = (
                        rewritten[1]
                        if job.transform is not None and rewritten is not None
                        else None
                    )
                    parameters = self._quantize(
                        job, index, original, statistics, hidden, references, gradients, made
                    )
                else:
                    parameters = self._read_back(job, index, original)
                if last or job.finished == len(self.blocks):
                    return
                if job.cell.inputs == FULL and not job.own_stream:
                    job.history = FULL
                    return
                rounded = job.cell.inputs != FULL
                job.history = self._next_history(job, index)
                if job.history not in following:
                    if not rounded:
                        parameters = (
                            made.tensors
                            if made is not None
                            else self._retransform(job, index, original, hidden)
                        )
                    began = time.monotonic()
                    block = self.blocks.build(index, parameters)
                    following[job.history] = self._observe(index, block, hidden, {}, True)[1]
                    job.seconds += time.monotonic() - began

            self._try(job, f"block {index}", work)

    # --- one cell, one block --------------------------------------------------------------------------------------------------

    def _rewrite(
        self,
        job: Job,
        index: int,
        original: dict[str, Tensor],
        hidden: list[Tensor],
        statistics: Statistics,
        references: list[Tensor] | None,
        gradients: dict[str, Tensor],
    ) -> RewrittenBlock:
        """The block after the job's transform, and what its rounding needs to know of the rewritten block's inputs."""
        began = time.monotonic()
        module = self.blocks.build(
            index, {name: tensor.clone() for name, tensor in original.items()}
        )
        needs = job.needs_of(job.cell.method.transform)
        inputs = hidden if needs - {"tokens"} else None
        view = self._view(
            job, index, module, original, needs, statistics, inputs, references, gradients
        )
        notes = job.transform.rewrite_block(
            view, job.cell.scheme, generator(job.cell.seed, index, "transform")
        )
        tensors = _tensors(module)
        left_out = {"pairs_without_calibration": list(view.left_out)} if view.left_out else {}
        del view
        after = job.needs_of(job.cell.method.rounding)
        seen: Statistics = {}
        if after:
            seen, _ = self._observe(
                index, self.blocks.build(index, tensors), hidden, {"*": after}, False
            )
        return RewrittenBlock(
            tensors, seen, json_values({**notes, **left_out}), time.monotonic() - began
        )

    def _retransform(
        self, job: Job, index: int, original: dict[str, Tensor], hidden: list[Tensor]
    ) -> dict[str, Tensor]:
        """The transformed, unrounded block of a job that was resumed behind it."""
        needs = {"*": job.needs_of(job.cell.method.transform)}
        statistics, _ = self._observe(
            index, self.blocks.build(index, original), hidden, needs, False
        )
        return self._rewrite(job, index, original, hidden, statistics, None, {}).tensors

    def _quantize(
        self,
        job: Job,
        index: int,
        original: dict[str, Tensor],
        statistics: Statistics,
        hidden: list[Tensor] | None,
        references: list[Tensor] | None,
        gradients: dict[str, Tensor],
        made: RewrittenBlock | None = None,
    ) -> dict[str, Tensor]:
        """Round one block for one job, store it, and return the block's tensors with the rounded weights in their places."""
        began = time.monotonic()
        if job.transform is not None and made is None:
            made = self._rewrite(
                job, index, original, hidden or [], statistics, references, gradients
            )
        if made is not None:
            statistics = made.statistics
        before = made.tensors if made is not None else original
        slots = self._slots(index, before)
        needs = job.needs_of(job.cell.method.rounding)
        tensors = dict(before)
        notes = dict(made.notes) if made is not None else {}
        weights: dict[str, QuantizedWeight] = {}
        if job.rounding is None:
            weights = {
                slot.name: DenseWeight(slot.view(before[slot.parameter]).clone()) for slot in slots
            }
        elif hasattr(job.rounding, "round_block"):
            module = self.blocks.build(
                index, {name: tensor.clone() for name, tensor in before.items()}
            )
            view = self._view(
                job,
                index,
                module,
                before,
                needs,
                statistics,
                hidden if needs else None,
                references,
                gradients,
            )
            weights = job.rounding.round_block(
                view, job.cell.scheme, generator(job.cell.seed, index, "block")
            )
            tensors = _tensors(module)
            notes |= json_values(view.notes)
        else:
            weights, unseen = self._round_layers(
                job, index, before, statistics, hidden, references, gradients
            )
            notes |= {"rounded_to_nearest": unseen} if unseen else {}
        matrices = {slot.parameter for slot in slots}
        dense = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in matrices
            and (name not in original or not torch.equal(tensor, original[name]))
        }
        self._assert_coverage(job, index, slots, before, weights, dense)
        # a block-wise rounding may have rescaled the block: errors are against the matrices that it rounded
        report = {
            "linears": self._errors(slots, tensors, weights, needs, statistics),
            "notes": notes,
        }
        job.writer.write_block(index, weights, dense, report)
        job.added_bits += self._added_bits(index, dense)
        job.seconds += time.monotonic() - began + (made.seconds if made is not None else 0.0)
        return self._with_weights(slots, tensors, weights)

    def _round_layers(
        self,
        job: Job,
        index: int,
        before: dict[str, Tensor],
        statistics: Statistics,
        hidden: list[Tensor] | None,
        references: list[Tensor] | None,
        gradients: dict[str, Tensor],
    ) -> tuple[dict[str, QuantizedWeight], dict[str, int]]:
        """Linear by linear; with `sequential`, each stage's statistics come from the block with the stages before it rounded.

        Also returns the matrices of experts that too few calibration tokens reached, with their number.
        """
        needs = job.needs_of(job.cell.method.rounding)
        slots = self._slots(index, before)
        sequential = bool(getattr(job.rounding, "sequential", False)) and bool(
            needs & set(OF_INPUTS)
        )
        stages: dict[str, list[WeightLocation]] = {}
        for slot in slots:
            stages.setdefault(slot.stage or slot.group, []).append(slot)
        weights: dict[str, QuantizedWeight] = {}
        unseen: dict[str, int] = {}
        for position, members in enumerate(stages.values()):
            if sequential and position > 0:
                assert hidden is not None
                so_far = self._with_weights(
                    [slot for slot in slots if slot.name in weights], before, weights
                )
                wanted = {slot.group: needs for slot in members}
                seen, _ = self._observe(
                    index, self.blocks.build(index, so_far), hidden, wanted, False
                )
            else:
                seen = statistics
            evidence = (
                self._evidence(job, slots, needs, seen, references, gradients) if needs else {}
            )
            too_few = self._too_few_tokens(members, before, needs, seen)
            unseen |= too_few
            for slot in members:
                scheme = job.cell.scheme.weight_for(index, slot.name)
                weight = slot.view(before[slot.parameter]).to(torch.float32, copy=True).contiguous()
                rng = generator(job.cell.seed, index, slot.name)
                try:
                    if slot.name in too_few:
                        weights[slot.name] = self._round_unseen(
                            job, slot.name, weight, scheme, rng, too_few[slot.name]
                        )
                    else:
                        weights[slot.name] = job.rounding.round_layer(
                            slot.name, weight, evidence.get(slot.name), scheme, rng
                        )
                except HarnessError as error:
                    raise type(error)(f"block {index}, {slot.name}: {error}") from error
        return weights, unseen

    def _too_few_tokens(
        self,
        slots: Sequence[WeightLocation],
        tensors: Mapping[str, Tensor],
        needs: Collection[str],
        statistics: Statistics,
    ) -> dict[str, int]:
        """Matrices of experts of which calibration says too little, with the number of tokens that reached them.

        Too little is no token at all, or, for a method that reads the second moment of the inputs, fewer tokens than inputs: the
        moment is singular then.
        """
        found: dict[str, int] = {}
        for slot in slots:
            if slot.expert is None or not set(needs) & set(OF_INPUTS):
                continue
            enough = slot.view(tensors[slot.parameter]).shape[1] if "hessian" in needs else 1
            tokens = statistics[slot.group].tokens if slot.group in statistics else 0
            if tokens < enough:
                found[slot.name] = tokens
        return found

    def _round_unseen(
        self,
        job: Job,
        name: str,
        weight: Tensor,
        scheme: WeightScheme,
        rng: torch.Generator,
        tokens: int,
    ) -> QuantizedWeight:
        """An expert's matrix without enough calibration tokens: as the method itself says, else rounded to nearest.

        Optional method of a Rounding: round_unseen(name, weight, scheme, rng). Raises MethodError where the scheme has no grid to
        round to.
        """
        if hasattr(job.rounding, "round_unseen"):
            return job.rounding.round_unseen(name, weight, scheme, rng)
        grid = getattr(job.rounding.settings, "grid", None)
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

    def _read_back(self, job: Job, index: int, original: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rounded block as the writer holds it."""
        device = self.blocks.device
        content = job.writer.read_block(index, device)
        tensors = {
            **original,
            **{name: tensor.to(device) for name, tensor in content.dense.items()},
        }
        return self._with_weights(self.blocks.slots(index), tensors, content.weights)

    def _with_weights(
        self,
        slots: Sequence[WeightLocation],
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, QuantizedWeight],
    ) -> dict[str, Tensor]:
        """The tensors with dequantized weights, in the model's dtype, in the places of the matrices; `tensors` stays as it is."""
        placed = dict(tensors)
        copied: set[str] = set()
        for slot in slots:
            value = weights[slot.name].dequantize().to(self.blocks.device, self.blocks.dtype)
            if slot.is_whole:
                placed[slot.parameter] = value
                continue
            if slot.parameter not in copied:
                placed[slot.parameter] = placed[slot.parameter].clone()
                copied.add(slot.parameter)
            slot.view(placed[slot.parameter]).copy_(value)
        return placed

    # --- evidence and reports -------------------------------------------------------------------------------------------------

    def _evidence(
        self,
        job: Job,
        slots: Sequence[WeightLocation],
        needs: frozenset[str],
        statistics: Statistics,
        references: list[Tensor] | None,
        gradients: Mapping[str, Tensor],
    ) -> dict[str, Evidence]:
        """Evidence by linear name; linears of a group share one object, unless gradients tell them apart."""
        by_group: dict[str, InputEvidence] = {}
        found: dict[str, Evidence] = {}
        more: dict[str, Callable[[], Tensor]] = {}
        if references is not None:
            more["reference"] = lambda: torch.cat(references)
        for slot in slots:
            of_group = statistics.get(slot.group)
            if of_group is None:
                continue
            if "squared_gradient" in needs:
                own: dict[str, Callable[[], Tensor]] = {
                    **more,
                    "squared_gradient": partial(gradients.__getitem__, slot.name),
                }
                found[slot.name] = InputEvidence(of_group, needs, job.cell.inputs, slot.name, own)
            else:
                found[slot.name] = by_group.setdefault(
                    slot.group, InputEvidence(of_group, needs, job.cell.inputs, None, more)
                )
        return found

    def _view(
        self,
        job: Job,
        index: int,
        module: nn.Module,
        original: Mapping[str, Tensor],
        needs: frozenset[str],
        statistics: Statistics,
        hidden: list[Tensor] | None,
        references: list[Tensor] | None,
        gradients: Mapping[str, Tensor],
    ) -> StreamedBlock:
        if "reference" in needs and job.own_stream:
            raise MethodError(
                "full-precision references are in the original basis, and this method's transform changes the basis"
            )
        slots = self._slots(index, original)
        evidence = (
            self._evidence(job, slots, needs, statistics, references, gradients) if needs else {}
        )
        unseen = self._too_few_tokens(self.blocks.slots(index), original, needs, statistics)
        return StreamedBlock(
            self.blocks,
            index,
            module,
            original,
            evidence,
            hidden,
            references if "reference" in needs else None,
            unseen,
        )

    def _assert_coverage(
        self,
        job: Job,
        index: int,
        slots: Sequence[WeightLocation],
        before: Mapping[str, Tensor],
        weights: Mapping[str, QuantizedWeight],
        dense: Mapping[str, Tensor],
    ) -> None:
        """Every matrix of the family was returned, in its own shape and finite, nothing else; what changed besides is finite."""
        expected = {slot.name: tuple(slot.view(before[slot.parameter]).shape) for slot in slots}
        problems = [f"{name} was not quantized" for name in expected if name not in weights]
        problems += [
            f"{name} is no matrix of this block" for name in weights if name not in expected
        ]
        for name, weight in weights.items():
            if name in expected and tuple(weight.shape) != expected[name]:
                problems.append(
                    f"{name} came back as {list(weight.shape)}, not {list(expected[name])}"
                )
            elif name in expected and not bool(torch.isfinite(weight.dequantize()).all()):
                problems.append(f"{name} came back with NaN or infinity")
        problems += [
            f"{name} holds NaN or infinity"
            for name, tensor in dense.items()
            if not bool(torch.isfinite(tensor).all())
        ]
        if problems:
            raise MethodError(f"{job.cell.title}, block {index}: " + "; ".join(problems))

    def _errors(
        self,
        slots: Sequence[WeightLocation],
        before: Mapping[str, Tensor],
        weights: Mapping[str, QuantizedWeight],
        needs: frozenset[str],
        statistics: Statistics,
    ) -> dict[str, dict[str, float]]:
        """Relative squared errors: weight, ||W - W'||² / ||W||²; output, ||(W - W')X||² / ||WX||², where there is a Hessian.

        A Hessian that only the company needs is not used: the report is part of the checkpoint's bytes.
        """
        report: dict[str, dict[str, float]] = {}
        for slot in slots:
            weight = slot.view(before[slot.parameter]).float()
            quantized = weights[slot.name]
            difference = quantized.dequantize().to(weight.device) - weight
            entry = {
                "weight_error": relative_error(difference, weight),
                "bits_per_weight": quantized.bits_per_weight,
            }
            of_group = statistics.get(slot.group)
            if slot.expert is not None and needs & set(OF_INPUTS):
                entry["calibration_tokens"] = of_group.tokens if of_group is not None else 0
            if "hessian" in needs and of_group is not None and of_group.finite and of_group.tokens:
                entry["output_error"] = relative_error(
                    difference, weight, of_group.values["hessian"]
                )
            report[slot.name] = entry
        return report

    # --- bookkeeping ----------------------------------------------------------------------------------------------------------

    def _transform_key(self, job: Job) -> str:
        """Equal keys rewrite a block of one stream into the same block."""
        part = job.cell.method.transform
        if part is None:
            return ""
        return digest(
            {
                "part": to_json(part),
                "scheme": _scheme(job.cell, part.activation_aware),
                "needs": sorted(job.needs),
                "seed": job.cell.seed if part.stochastic else None,
                "after": sorted(job.needs_of(job.cell.method.rounding)),
            }
        )

    def _next_history(self, job: Job, index: int) -> str:
        """Cells whose blocks up to `index` are made alike, from alike inputs, go on in one stream."""
        method = job.cell.method
        parts = [part for part in method.parts]
        names = [slot.name for slot in self.blocks.slots(index)]
        return digest(
            {
                "before": job.history,
                "parts": [to_json(method.transform), to_json(method.rounding)],
                "inputs": job.cell.inputs,
                "schemes": [to_json(job.cell.scheme.weight_for(index, name)) for name in names],
                # a transform or a block-wise rounding sees the whole scheme
                "scheme": _scheme(job.cell, any(part.activation_aware for part in parts))
                if method.transform is not None or hasattr(job.rounding, "round_block")
                else None,
                "seed": job.cell.seed if any(part.stochastic for part in parts) else None,
            }
        )

    def _added_bits(self, index: int, dense: Mapping[str, Tensor]) -> int:
        """Size of the parameters of a block that the model does not have."""
        known = self.blocks.family.blocks(self.blocks.model)[index].state_dict()
        return sum(
            8 * tensor.numel() * tensor.element_size()
            for name, tensor in dense.items()
            if name not in known
        )

    def _finish(self, job: Job) -> Iterator[Event]:
        """Write the manifest and say so."""

        def work() -> dict[str, Any]:
            return job.writer.manifest() or job.writer.finish(self._manifest(job))

        manifest = self._try(job, "manifest", work)
        yield from self._report_failures()
        if manifest is not None:
            record = {key: manifest[key] for key in manifest if key not in ("files", "linears")}
            yield Quantized(time.time(), job.cell_keys, record)

    def _manifest(self, job: Job) -> dict[str, Any]:
        blocks, method = self.blocks, job.cell.method
        widths = blocks.weights.stored_bits()
        matrices: dict[str, int] = {}  # elements of each parameter that are in a slot
        linears = 0
        if not method.is_baseline:
            for index in range(len(blocks)):
                parameters = dict(blocks.family.blocks(blocks.model)[index].named_parameters())
                for slot in blocks.slots(index):
                    name = blocks.family.block_prefix(index) + slot.parameter
                    matrices[name] = (
                        matrices.get(name, 0) + slot.view(parameters[slot.parameter]).numel()
                    )
                    linears += 1
        total, bits = 0, job.added_bits
        for name, elements in blocks.parameters.items():
            total += elements
            width = widths.get(name, 8 * blocks.dtype.itemsize)
            bits += width * (elements - matrices.get(name, 0))
        covered = sum(matrices.values())
        report: dict[str, Any] = {
            "parameters": total,
            "unquantized_bits": bits,
            "coverage": {"linears": linears, "weights": covered, "share": covered / total},
            "seconds": self._seconds(job),
            "methods": {
                slot: part.name
                for slot in ("transform", "rounding", "tuning")
                if (part := getattr(method, slot))
            },
        }
        if job.needs and self.windows is not None:
            samples, length = self.windows.shape
            report["calibration"] = {
                "windows_sha256": windows_digest(self.windows),
                "samples": samples,
                "length": length,
            }
        return report

    def _seconds(self, job: Job) -> float:
        """What the cell would have cost alone: its own work, and in full what it shares with others of its stream."""
        gradients = self.gradient_seconds if "squared_gradient" in job.needs else 0.0
        return job.seconds + gradients + (self.shared_seconds if job.reads_stream else 0.0)

    def _try(self, job: Job, stage: str, work: Callable[[], Any]) -> Any:
        """Do a job's own work; what goes wrong takes this job out of the pass and no other."""
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
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(
            error
        )
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = reason if isinstance(error, HarnessError) else f"{type(error).__name__}: {reason}"
        detail = "".join(traceback.format_exception(error))
        self.failures.append(
            Failed(
                time.time(),
                job.cell_keys,
                stage,
                "out_of_memory" if memory else "error",
                reason,
                detail,
            )
        )

    def _report_failures(self) -> Iterator[Event]:
        failures, self.failures = self.failures, []
        yield from failures


def _first_needs(jobs: Sequence[Job]) -> dict[str, frozenset[str]]:
    """What the jobs want to know of the original block: for their transforms, or for their rounding where they have none."""
    needs = frozenset(
        need
        for job in jobs
        for need in job.needs_of(
            job.cell.method.transform if job.transform is not None else job.cell.method.rounding
        )
    )
    return {"*": needs} if jobs else {}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: get_tensor(module, name) for name in module.state_dict()}


def _scheme(cell: Cell, with_execution: bool) -> Any:
    scheme = to_json(cell.scheme)
    drop = {"name"} if with_execution else {"name", "activation", "kv"}
    return {key: value for key, value in scheme.items() if key not in drop}
