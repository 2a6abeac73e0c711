"""The bodies of tasks: quantize the checkpoints of a pass, evaluate the cells of a model. Generators of events.

A task is small, frozen and readable (`cell.to_json` makes JSON of it): cells, store, device. Results are written to the store as
they are complete: blocks and manifests, one file per score. The worker sends events to the driver. A task can therefore be killed
at any moment and run again: finished blocks and scores are found in the store, and only the rest is done.

A worker that makes a checkpoint or scores a cell holds its lock in the store, so that two drivers on one store share the work. A
failing cell is dropped from its task and the others continue; a failing evaluation does not affect other evaluations.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import plugins
from harness.core.cell import (
    Cell,
    Evaluation,
    KVScheme,
    cell_key,
    parts_identity,
    quantize_key,
    reduction_key,
    score_key,
    stored_scheme,
    to_json,
    untuned,
)
from harness.core.errors import HarnessError
from harness.core.events import (
    Event,
    Failed,
    Quantized,
    Scored,
    TaskEnded,
    TaskStarted,
    Usage,
    failure,
)
from harness.core.failures import FailureKind
from harness.data import model_folders
from harness.execution import provenance
from harness.execution.failures import ran_out
from harness.execution.logs import TaskLogs
from harness.execution.process import (
    UsageMeter,
    device_name,
    peak_memory,
    prepare,
    release,
    thread_count,
)
from harness.execution.tasks import EvaluateTask, QuantizeTask, Task
from harness.storage.record import under_name
from harness.storage.store import Store

if TYPE_CHECKING:
    from harness.evaluation.protocols import Subject


# of a score, that travel with its event
SCORED_FIELDS = ("stderr", "seconds", "batch_size", "problems")

log = logging.getLogger(__name__)


def run(task: Task) -> Iterator[Event]:
    """Run a task of either kind and yield its events, from TaskStarted to TaskEnded. Errors become Failed events."""
    began, keys = time.monotonic(), tuple(map(cell_key, task.cells))
    try:
        devices = task.devices if isinstance(task, EvaluateTask) else 1
        device = prepare(task.device, task.threads, task.gpu_fraction, devices)
    except HarnessError as error:
        yield failure(error, keys, "task")
        return
    yield TaskStarted(
        time.time(),
        keys,
        worker=f"{socket.gethostname()}:{os.getpid()}",
        device=device_name(device),
    )
    store, usage = Store(task.runs), UsageMeter(device)
    with TaskLogs(store, task.cells) as logs:
        body = (
            quantize(task, store, device)
            if isinstance(task, QuantizeTask)
            else evaluate(task, store, device)
        )
        try:
            for event in body:
                logs.event(event)
                yield event
                if (facts := usage.now(len(event.cell_keys))) is not None:
                    yield Usage(time.time(), event.cell_keys, facts)
        except Exception as error:
            failed = failure(error, keys, "task")
            logs.event(failed)
            yield failed
    yield TaskEnded(
        time.time(), keys, seconds=time.monotonic() - began, peak_memory_bytes=peak_memory(device)
    )


def quantize(task: QuantizeTask, store: Store, device: str) -> Iterator[Event]:
    """One pass for the checkpoints that are still missing once their locks are held, then the tuning of tuned cells."""
    sharers: dict[str, list[Cell]] = {}
    for cell in task.cells:
        store.open_cell(cell)
        sharers.setdefault(quantize_key(cell), []).append(cell)
    # a cell without tuning is its own
    bases = {quantize_key(cell) for cell in map(untuned, task.cells)}
    facts = provenance.collect(device_name(device), thread_count(), task.command, store)
    with ExitStack() as locks:
        # One order for all drivers, so that no two wait for each other.
        for key in sorted({*sharers, *bases}):
            locks.enter_context(store.lock(f"checkpoint-{key}"))
        for key, cells in list(sharers.items()):
            manifest = store.manifest(key)
            if manifest is not None:  # another driver made it while this one waited
                yield Quantized(time.time(), tuple(map(cell_key, cells)), record=manifest)
                del sharers[key]
        todo = [cell for cells in sharers.values() for cell in cells]
        for event in _reduce_and_make(todo, store, device):
            if isinstance(event, Quantized):
                for key in event.cell_keys:
                    store.write_provenance(key, {"quantize": facts})
            if isinstance(event, Failed) and event.kind is FailureKind.OUT_OF_MEMORY:
                ran_out(store, event.cell_keys, "quantize", len(sharers), peak_memory(device))
            yield event


def _reduce_and_make(cells: Sequence[Cell], store: Store, device: str) -> Iterator[Event]:
    """`_make`, for the cells of one reduction after the other; each reduction makes its smaller model first."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        key = reduction_key(cell) if cell.method.reduction is not None else ""
        groups.setdefault(key, []).append(cell)
    for key, members in groups.items():
        try:
            if key:
                yield from _reduce(members, store, device)
        except (
            Exception
        ) as error:  # the code of a reduction may raise anything; other cells continue
            yield failure(error, tuple(dict.fromkeys(map(cell_key, members))), "reduction")
            continue
        yield from _make(members, store, device)


def _reduce(cells: Sequence[Cell], store: Store, device: str) -> Iterator[Event]:
    """Make the smaller model that cells of one reduction share, unless the store has it."""
    from harness.quantization.calibration import draw_windows
    from harness.quantization.pipeline.reduction import run_reduction

    first = cells[0]
    key, part = reduction_key(first), first.method.reduction
    if store.reduction(key) is not None:
        return
    with store.lock(f"reduction-{key}"):
        if store.reduction(key) is not None:  # another process made it while this one waited
            return
        folder, windows = model_folders.model_folder(first.model), None
        if part is not None and part.needs:
            assert first.calibration is not None, "refused by the plan"
            tokenizer = load_tokenizer(folder, first.model.trust_remote_code)
            windows = draw_windows(first.calibration, tokenizer)
        keys = tuple(dict.fromkeys(map(cell_key, cells)))
        with store.making_reduced(key) as target:
            yield from run_reduction(first, folder, windows, target, device, keys)
        release(device)


@contextmanager
def _source(cell: Cell, store: Store) -> Iterator[Path]:
    """The folder of the model that a cell quantizes and is scored as: its model's, or that of its reduction."""
    if cell.method.reduction is None:
        yield model_folders.model_folder(cell.model)
        return
    with store.reading_reduced(reduction_key(cell)) as folder:
        yield folder


def _make(cells: Sequence[Cell], store: Store, device: str) -> Iterator[Event]:
    """One pass over all cells, tuned ones without their tuning; then each tuning, from the checkpoint that the pass made."""
    tuned = [cell for cell in cells if cell.method.tuning is not None]
    plain = [cell for cell in cells if cell.method.tuning is None]
    bases = [untuned(cell) for cell in tuned if store.manifest(quantize_key(untuned(cell))) is None]
    asked = {cell_key(cell) for cell in plain}
    followers: dict[str, list[str]] = {}  # of a base's cell key: the tuned cells that wait for it
    for cell in tuned:
        followers.setdefault(cell_key(untuned(cell)), []).append(cell_key(cell))
    failed: set[str] = set()
    for event in _run_pass([*plain, *bases], store, device):
        waiting = (
            ()
            if isinstance(event, Quantized)
            else tuple(name for key in event.cell_keys for name in followers.get(key, ()))
        )
        if isinstance(event, Failed):
            failed |= set(waiting)
        keys = tuple(dict.fromkeys((*(key for key in event.cell_keys if key in asked), *waiting)))
        if keys:
            yield dataclasses.replace(event, cell_keys=keys)
    by_key: dict[str, list[Cell]] = {}
    for cell in tuned:
        if cell_key(cell) not in failed:
            by_key.setdefault(quantize_key(cell), []).append(cell)
    for sharers in by_key.values():
        keys = tuple(dict.fromkeys(map(cell_key, sharers)))
        try:
            yield from _tune(sharers[0], keys, store, device)
        except Exception as error:  # the code of a tuning may raise anything; other cells continue
            yield failure(error, keys, "tuning")
        release(device)


def _tune(cell: Cell, keys: tuple[str, ...], store: Store, device: str) -> Iterator[Event]:
    """Train one checkpoint from its base."""
    from harness.quantization.calibration import draw_documents, draw_windows
    from harness.quantization.formats.native import CheckpointWriter
    from harness.quantization.pipeline.tuning import run_tuning

    assert cell.calibration is not None and cell.method.tuning is not None, "refused by the plan"
    draw = draw_documents if "documents" in cell.method.tuning.needs else draw_windows
    with (
        _source(cell, store) as folder,
        store.making(quantize_key(cell)) as place,
        store.reading(quantize_key(untuned(cell))) as base,
    ):
        windows = draw(cell.calibration, load_tokenizer(folder, cell.model.trust_remote_code))
        writer = CheckpointWriter(place, fingerprint(cell), store.files.upload)
        yield from run_tuning(cell, folder, base, windows, writer, device, keys)


def _run_pass(cells: Sequence[Cell], store: Store, device: str) -> Iterator[Event]:
    """The pass over cells of one model and one calibration."""
    from harness.quantization.calibration import draw_windows
    from harness.quantization.formats.native import CheckpointWriter
    from harness.quantization.pipeline.passes import run_pass

    if not cells:
        return
    calibrations = {cell.calibration for cell in cells if cell.method.needs_calibration}
    assert len(calibrations) <= 1, f"one draw of windows per pass, not {calibrations}"
    windows = None
    for calibration in calibrations:
        assert calibration is not None, (
            "a cell that needs calibration and has none is refused by the plan"
        )
        tokenizer = load_tokenizer(
            model_folders.model_folder(cells[0].model), cells[0].model.trust_remote_code
        )
        windows = draw_windows(calibration, tokenizer)
    with ExitStack() as places:
        folder = places.enter_context(_source(cells[0], store))
        writers = {}
        for key, cell in {quantize_key(cell): cell for cell in cells}.items():
            writers[key] = CheckpointWriter(
                places.enter_context(store.making(key)), fingerprint(cell), store.files.upload
            )
        yield from run_pass(cells, folder, windows, writers, device)


def fingerprint(cell: Cell) -> dict[str, Any]:
    """The description that a checkpoint folder holds of itself. Equal for all cells that share the checkpoint."""
    own = cell.scheme.weight
    return {
        "quantize_key": quantize_key(cell),
        "model": cell.model.digest,
        "dtype": cell.model.dtype,
        "parts": parts_identity(cell.method),
        # folders that exist hold this field at its default too
        "weight": None
        if not cell.method.quantizes
        else {**stored_scheme(cell)[0], "zero_point": own.zero_point},
    }


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, without network access."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )


# --- evaluation ------------------------------------------------------------------------------------------------------------------


def evaluate(task: EvaluateTask, store: Store, device: str) -> Iterator[Event]:
    """Score one cell after the other. One model is in memory at a time."""
    # Loaded here, so that the freeze below covers them.
    import harness.evaluation.protocols
    import harness.quantization.inference.load  # noqa: F401

    facts = provenance.collect(device_name(device), thread_count(), task.command, store)
    if device != "cpu" and (task.devices > 1 or task.offload):
        facts = {**facts, "devices": task.devices, "offload": task.offload}
    gc.freeze()  # otherwise each collection between two models scans all of torch: 0.2 s
    try:
        yield from _evaluate_cells(task, store, device, facts)
    finally:
        gc.unfreeze()


def _evaluate_cells(
    task: EvaluateTask, store: Store, device: str, facts: Mapping[str, Any]
) -> Iterator[Event]:
    for cell, wanted in zip(task.cells, task.evaluations, strict=True):
        key = store.open_cell(cell)
        with store.lock(f"cell-{key}"):
            missing = []
            for evaluation in wanted:
                score = store.score(key, score_key(cell, evaluation))
                if score is None:
                    missing.append(evaluation)
                else:  # another driver made it while this one waited
                    yield _scored(key, evaluation, under_name(score, evaluation.name))
            if missing:
                try:
                    if cell.method.reduction is not None:  # it may have been deleted since
                        yield from _reduce([cell], store, device)
                    with _source(cell, store) as folder:
                        yield from _evaluate_cell(cell, folder, missing, store, device, task, facts)
                except Exception as error:
                    yield failure(error, (key,), "load")
        release(device)


def _evaluate_cell(
    cell: Cell,
    folder: Path,
    evaluations: Sequence[Evaluation],
    store: Store,
    device: str,
    task: EvaluateTask,
    facts: Mapping[str, Any],
) -> Iterator[Event]:
    from harness.evaluation.protocols import Subject
    from harness.quantization.inference.load import load

    key = cell_key(cell)
    manifest = store.manifest(quantize_key(cell))
    spread = (
        [f"cuda:{index}" for index in range(task.devices)]
        if device != "cpu" and task.devices > 1
        else []
    )
    place = functools.partial(
        load, device=device, devices=spread, offload=task.offload and device != "cpu"
    )
    if manifest is None:
        raise HarnessError(
            f"{cell.title}: its checkpoint {quantize_key(cell)[:12]} is not in {store.place}; run the sweep again"
        )

    def load_as(mode: str) -> tuple[Any, Any]:
        if not cell.method.quantizes:
            return place(cell, folder, None, mode=mode)
        with store.reading(quantize_key(cell)) as checkpoint:
            return place(cell, folder, checkpoint, mode=mode)

    model, tokenizer = load_as("dense")
    cache = store.root / "cache"
    subject = Subject(
        cell,
        model,
        tokenizer,
        device,
        task.batch_size,
        manifest,
        folder,
        cache,
        lambda mode: load_as(mode)[0],
    )
    made_by: dict[str, Any] = {"evaluate": dict(facts)}
    if cell.scheme.kv is not None:
        made_by["cache"] = _cache_facts(cell.scheme.kv, model, folder)
    store.write_provenance(key, made_by)
    for evaluation in evaluations:
        try:
            yield from _score(subject, evaluation, store, facts)
        except Exception as error:
            failed = failure(error, (key,), evaluation.name)
            note = functools.partial(_ran_out, store, key, task, device)
            if failed.kind is FailureKind.OUT_OF_MEMORY:
                note(subject.batch_size)
            if failed.kind is not FailureKind.OUT_OF_MEMORY or subject.batch_size == 1:
                yield failed
                continue
            log.warning(
                "%s: %s ran out of memory; trying once more with batches of 1",
                cell.title,
                evaluation.name,
            )
        else:
            continue
        release(device)  # outside the handler, whose traceback holds the tensors
        try:
            yield from _score(dataclasses.replace(subject, batch_size=1), evaluation, store, facts)
        except Exception as error:
            failed = failure(error, (key,), evaluation.name)
            if failed.kind is FailureKind.OUT_OF_MEMORY:
                note(1)
            yield failed
    if cell.scheme.kv is not None:  # now with what the evaluations have put into the cache
        store.write_provenance(key, {"cache": _cache_facts(cell.scheme.kv, model, folder)})


def _cache_facts(scheme: KVScheme, model: Any, folder: Path) -> dict[str, Any]:
    from harness.quantization import models
    from harness.quantization.inference import kv_cache

    return kv_cache.facts(model, scheme, models.shapes(folder).head_dim)


def _ran_out(store: Store, key: str, task: EvaluateTask, device: str, batch_size: int) -> None:
    """Record that memory ran out for an evaluation, and on how many GPUs."""
    ran_out(
        store,
        (key,),
        "evaluate",
        batch_size,
        peak_memory(device),
        0 if device == "cpu" else task.devices,
        task.offload,
    )


def _score(
    subject: Subject, evaluation: Evaluation, store: Store, facts: Mapping[str, Any]
) -> Iterator[Event]:
    """Progress, then Scored once the score is in the store."""
    from harness.evaluation.protocols import Score

    key, began = cell_key(subject.cell), time.monotonic()
    evaluator = plugins.build("evaluator", evaluation.evaluator, to_json(evaluation)["settings"])
    score: Score | None = None
    for step in evaluator.score(subject, evaluation):
        if isinstance(step, Score):
            score = step
        else:
            yield dataclasses.replace(step, cell_keys=(key,))
    if score is None:
        raise HarnessError(
            f"evaluation {evaluation.name}: the evaluator {evaluation.evaluator} ended without a score"
        )
    content = {
        "evaluation": evaluation.name,
        "evaluator": evaluation.evaluator,
        "settings": to_json(evaluation)["settings"],
        "metrics": score.metrics,
        "stderr": score.stderr,
        "details": score.details,
        **({"problems": score.problems} if score.problems else {}),
        "seconds": time.monotonic() - began,
        "batch_size": subject.batch_size,
        "provenance": dict(facts),
    }
    store.write_score(key, score_key(subject.cell, evaluation), content, score.items)
    yield _scored(key, evaluation, content)


def _scored(key: str, evaluation: Evaluation, score: Mapping[str, Any]) -> Scored:
    record = {name: score[name] for name in SCORED_FIELDS if name in score}
    return Scored(
        time.time(),
        (key,),
        evaluation=evaluation.name,
        metrics=dict(score["metrics"]),
        record=record,
    )
