"""The bodies of tasks: quantize a pass, evaluate the cells of a model. Generators of events that run anywhere.

A task is small, frozen and readable (`cell.to_json` makes JSON of it): which cells, which store, which device. Results go to the
store as they are complete: blocks and manifests, one file per score. What travels back are events. A task can therefore be
killed at any moment and be given again: finished blocks and scores are found, and only the rest is done.

Whoever makes a checkpoint or scores a cell holds its lock in the store, so that two drivers on one store share work rather than
repeat it. A failing cell leaves its task and the others go on; a failing evaluation fails alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import plugins, provenance, sources
from harness.cell import Cell, Evaluation, cell_key, quantize_key, score_key, to_json, untuned
from harness.errors import HarnessError, StoreError
from harness.events import Event, Failed, Progress, Quantized, Scored, TaskEnded, TaskStarted, Usage
from harness.store import Store, under_name

if TYPE_CHECKING:
    from harness.evaluators.protocols import Score, Subject

log = logging.getLogger(__name__)

USAGE_SECONDS = 15.0                            # between two readings of what a process takes
LOG_SECONDS = 30.0                              # after which logs go to a store elsewhere, at the latest
OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


@dataclass(frozen=True)
class QuantizeTask:
    """Make the checkpoints of cells of one model and one draw of calibration windows in one walk.

    runs     the store: its folder or its URL
    device   "auto", "cpu", "cuda" or "cuda:<index>"
    threads  CPU threads of one operation; 0: as the process has them
    command  what the user typed, for the record
    share    of a GPU's memory that this process may take
    """

    cells: tuple[Cell, ...]
    runs: str
    device: str = "auto"
    threads: int = 0
    command: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class EvaluateTask:
    """Score cells of one model; evaluations[i] are those of cells[i]. batch_size 0: chosen by the evaluator. The rest as above.

    devices  GPUs over which the model is spread, where it is too large for one
    offload  its blocks stay in main memory and visit the GPU to run
    """

    cells: tuple[Cell, ...]
    evaluations: tuple[tuple[Evaluation, ...], ...]
    runs: str
    device: str = "auto"
    threads: int = 0
    batch_size: int = 0
    command: str = ""
    share: float = 1.0
    devices: int = 1
    offload: bool = False


Task = QuantizeTask | EvaluateTask


def run(task: Task) -> Iterator[Event]:
    """The events of a task of either kind, between one TaskStarted and one TaskEnded. Raises nothing but what ends a process."""
    began, keys = time.monotonic(), tuple(map(cell_key, task.cells))
    try:
        devices = task.devices if isinstance(task, EvaluateTask) else 1
        device = prepare(task.device, task.threads, task.share, devices)
    except HarnessError as error:
        yield failure(error, keys, "task")
        return
    yield TaskStarted(time.time(), keys, worker=f"{socket.gethostname()}:{os.getpid()}", device=device_name(device))
    store, usage = Store(task.runs), _Meter(device)
    with _Logs(store, task.cells) as logs:
        body = quantize(task, store, device) if isinstance(task, QuantizeTask) else evaluate(task, store, device)
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
    yield TaskEnded(time.time(), keys, seconds=time.monotonic() - began, peak_memory_bytes=peak_memory(device))


def quantize(task: QuantizeTask, store: Store, device: str) -> Iterator[Event]:
    """One walk for the checkpoints that are still missing once their locks are held, then the tuning of those that are tuned."""
    sharers: dict[str, list[Cell]] = {}
    for cell in task.cells:
        store.open_cell(cell)
        sharers.setdefault(quantize_key(cell), []).append(cell)
    bases = {quantize_key(cell) for cell in map(untuned, task.cells)}            # a cell without tuning is its own
    facts = provenance.collect(device_name(device), _threads(), task.command, store)
    with ExitStack() as locks:
        for key in sorted({*sharers, *bases}):  # one order for all drivers, so that none waits for another in a circle
            locks.enter_context(store.lock(f"checkpoint-{key}"))
        for key, cells in list(sharers.items()):
            manifest = store.manifest(key)
            if manifest is not None:            # another driver made it while this one waited
                yield Quantized(time.time(), tuple(map(cell_key, cells)), record=manifest)
                del sharers[key]
        for event in _make([cell for cells in sharers.values() for cell in cells], store, device):
            if isinstance(event, Quantized):
                for key in event.cell_keys:
                    store.write_provenance(key, {"quantize": facts})
            if isinstance(event, Failed) and event.kind == "out_of_memory":
                ran_out(store, event.cell_keys, "quantize", len(sharers), peak_memory(device))
            yield event


def _make(cells: Sequence[Cell], store: Store, device: str) -> Iterator[Event]:
    """The walk over all cells, tuned ones as they are before it; then each tuning, from the checkpoint that the walk made."""
    tuned = [cell for cell in cells if cell.method.tuning is not None]
    plain = [cell for cell in cells if cell.method.tuning is None]
    bases = [untuned(cell) for cell in tuned if store.manifest(quantize_key(untuned(cell))) is None]
    asked = {cell_key(cell) for cell in plain}
    followers: dict[str, list[str]] = {}                # of a base's cell key: the tuned cells that wait for it
    for cell in tuned:
        followers.setdefault(cell_key(untuned(cell)), []).append(cell_key(cell))
    failed: set[str] = set()
    for event in _walk([*plain, *bases], store, device):
        waiting = () if isinstance(event, Quantized) else tuple(name for key in event.cell_keys for name in followers.get(key, ()))
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
        except Exception as error:                      # a tuning's code may raise anything; the others go on
            yield failure(error, keys, "tuning")
        release(device)


def _tune(cell: Cell, keys: tuple[str, ...], store: Store, device: str) -> Iterator[Event]:
    """Train one checkpoint from its base."""
    from harness.formats.native import CheckpointWriter
    from harness.runtime.tuning import run_tuning
    from harness.streaming.calibration import draw_documents, draw_windows

    folder = sources.model_folder(cell.model)
    assert cell.calibration is not None and cell.method.tuning is not None, "refused by the plan"
    draw = draw_documents if "documents" in cell.method.tuning.needs else draw_windows
    windows = draw(cell.calibration, load_tokenizer(folder, cell.model.trust_remote_code))
    with store.making(quantize_key(cell)) as place, store.reading(quantize_key(untuned(cell))) as base:
        writer = CheckpointWriter(place, fingerprint(cell), store.files.keep)
        yield from run_tuning(cell, folder, base, windows, writer, device, keys)


def _walk(cells: Sequence[Cell], store: Store, device: str) -> Iterator[Event]:
    """The pass over cells of one model and one calibration."""
    from harness.formats.native import CheckpointWriter
    from harness.streaming.calibration import draw_windows
    from harness.streaming.passes import run_pass

    if not cells:
        return
    folder = sources.model_folder(cells[0].model)
    calibrations = {cell.calibration for cell in cells if cell.method.needs}
    assert len(calibrations) <= 1, f"one draw of windows per pass, not {calibrations}"
    windows = None
    for calibration in calibrations:
        assert calibration is not None, "a cell that needs calibration and has none is refused by the plan"
        windows = draw_windows(calibration, load_tokenizer(folder, cells[0].model.trust_remote_code))
    with ExitStack() as places:
        writers = {}
        for key, cell in {quantize_key(cell): cell for cell in cells}.items():
            writers[key] = CheckpointWriter(places.enter_context(store.making(key)), fingerprint(cell), store.files.keep)
        yield from run_pass(cells, folder, windows, writers, device)


def fingerprint(cell: Cell) -> dict[str, Any]:
    """What a checkpoint folder says it is of. Equal for all cells that share it."""
    return {
        "quantize_key": quantize_key(cell),
        "model": cell.model.digest,
        "dtype": cell.model.dtype,
        "parts": [{name: to_json(part)[name] for name in ("name", "version", "settings")} for part in cell.method.parts],
        "weight": None if cell.method.is_baseline else to_json(cell.scheme.weight),
    }


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, without asking the network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)


# --- evaluation ------------------------------------------------------------------------------------------------------------------


def evaluate(task: EvaluateTask, store: Store, device: str) -> Iterator[Event]:
    """Score one cell after the other; a model is in memory while its cell is scored."""
    import harness.evaluators.protocols
    import harness.runtime.load  # noqa: F401  (both before the freeze below)

    facts = provenance.collect(device_name(device), _threads(), task.command, store)
    if device != "cpu" and (task.devices > 1 or task.offload):
        facts = {**facts, "devices": task.devices, "offload": task.offload}
    gc.freeze()                                 # else each collection between two models walks all of torch: 0.2 s
    try:
        yield from _evaluate_cells(task, store, device, facts)
    finally:
        gc.unfreeze()


def _evaluate_cells(task: EvaluateTask, store: Store, device: str, facts: Mapping[str, Any]) -> Iterator[Event]:
    for cell, wanted in zip(task.cells, task.evaluations, strict=True):
        key = store.open_cell(cell)
        with store.lock(f"cell-{key}"):
            missing = []
            for evaluation in wanted:
                score = store.score(key, score_key(cell, evaluation))
                if score is None:
                    missing.append(evaluation)
                else:                           # another driver made it while this one waited
                    yield _scored(key, evaluation, under_name(score, evaluation.name))
            if missing:
                try:
                    yield from _evaluate_cell(cell, missing, store, device, task, facts)
                except Exception as error:
                    yield failure(error, (key,), "load")
        release(device)


def _evaluate_cell(
    cell: Cell, evaluations: Sequence[Evaluation], store: Store, device: str, task: EvaluateTask, facts: Mapping[str, Any]
) -> Iterator[Event]:
    from harness.evaluators.protocols import Subject
    from harness.runtime.load import load

    key, folder = cell_key(cell), sources.model_folder(cell.model)
    manifest = store.manifest(quantize_key(cell))
    spread = [f"cuda:{index}" for index in range(task.devices)] if device != "cpu" and task.devices > 1 else []
    place = functools.partial(load, device=device, devices=spread, offload=task.offload and device != "cpu")
    if manifest is None:
        raise HarnessError(f"{cell.title}: its checkpoint {quantize_key(cell)[:12]} is not in {store.place}; run the sweep again")
    if cell.method.is_baseline:
        model, tokenizer = place(cell, folder, None)
    else:
        with store.reading(quantize_key(cell)) as checkpoint:
            model, tokenizer = place(cell, folder, checkpoint)
    subject = Subject(cell, model, tokenizer, device, task.batch_size, manifest, folder, store.root / "cache")
    store.write_provenance(key, {"evaluate": dict(facts)})
    for evaluation in evaluations:
        try:
            yield from _score(subject, evaluation, store, facts)
        except Exception as error:
            failed = failure(error, (key,), evaluation.name)
            note = functools.partial(_ran_out, store, key, task, device)
            if failed.kind == "out_of_memory":
                note(subject.batch_size)
            if failed.kind != "out_of_memory" or subject.batch_size == 1:
                yield failed
                continue
            log.warning("%s: %s ran out of memory; trying once more with batches of 1", cell.title, evaluation.name)
        else:
            continue
        release(device)                         # outside the handler, whose traceback keeps the tensors alive
        try:
            yield from _score(dataclasses.replace(subject, batch_size=1), evaluation, store, facts)
        except Exception as error:
            failed = failure(error, (key,), evaluation.name)
            if failed.kind == "out_of_memory":
                note(1)
            yield failed


def _ran_out(store: Store, key: str, task: EvaluateTask, device: str, batch_size: int) -> None:
    """Note that memory ran out for an evaluation, on how many GPUs."""
    ran_out(store, (key,), "evaluate", batch_size, peak_memory(device), 0 if device == "cpu" else task.devices, task.offload)


def _score(subject: Subject, evaluation: Evaluation, store: Store, facts: Mapping[str, Any]) -> Iterator[Event]:
    """Progress, then Scored once the score is in the store."""
    from harness.evaluators.protocols import Score

    key, began = cell_key(subject.cell), time.monotonic()
    evaluator = plugins.build("evaluator", evaluation.evaluator, to_json(evaluation)["settings"])
    score: Score | None = None
    for step in evaluator.score(subject, evaluation):
        if isinstance(step, Score):
            score = step
        else:
            yield dataclasses.replace(step, cell_keys=(key,))
    if score is None:
        raise HarnessError(f"evaluation {evaluation.name}: the evaluator {evaluation.evaluator} ended without a score")
    content = {
        "evaluation": evaluation.name,
        "evaluator": evaluation.evaluator,
        "settings": to_json(evaluation)["settings"],
        "metrics": score.metrics,
        "stderr": score.stderr,
        "details": score.details,
        "seconds": time.monotonic() - began,
        "batch_size": subject.batch_size,
        "provenance": dict(facts),
    }
    store.write_score(key, score_key(subject.cell, evaluation), content, score.items)
    yield _scored(key, evaluation, content)


def _scored(key: str, evaluation: Evaluation, score: Mapping[str, Any]) -> Scored:
    record = {name: score[name] for name in ("stderr", "seconds", "batch_size") if name in score}
    return Scored(time.time(), (key,), evaluation=evaluation.name, metrics=dict(score["metrics"]), record=record)


# --- the process -----------------------------------------------------------------------------------------------------------------


def prepare(device: str, threads: int, share: float = 1.0, devices: int = 1) -> str:
    """Set this process up for a task and return its device, of several the first. Raises HarnessError for one that is not there.

    share: of the card's memory that this process may allocate; beyond it torch runs out of memory here and not in a neighbour.
    """
    import torch

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # spinning idle threads slow the other workers some tenfold
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads > 0:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False           # Hessians in TF32 are no longer positive definite
    torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":                         # asks no driver for anything
        return device
    available = torch.cuda.is_available()
    if device == "auto" and not available:
        return "cpu"
    if not available:
        raise HarnessError(f'device "{device}": torch finds no CUDA device in this process; use device=cpu or device=auto')
    if devices > 1:
        if torch.cuda.device_count() < devices:
            raise HarnessError(f"the task needs {devices} GPUs, and this process sees {torch.cuda.device_count()}")
        for index in range(devices):
            torch.cuda.set_per_process_memory_fraction(1.0, index)
        return "cuda:0"
    device = "cuda" if device == "auto" else device
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), torch.device(device).index or 0)
    torch.cuda.reset_peak_memory_stats()
    return device


def ran_out(
    store: Store, keys: Iterable[str], stage: str, beside: int, peak_memory_bytes: int, devices: int = 0, offload: bool = False
) -> None:
    """Note in the records that memory ran out, for plans of cells that need as much or more.

    stage    "quantize" or "evaluate"
    beside   how many checkpoints the task made together (0: it had a machine or a node to itself), or sequences it scored together
             (0: as many as the evaluator chose)
    devices  GPUs that it had; 0: it was main memory that ran out
    offload  the model's blocks were in main memory
    """
    facts = {
        "beside": beside, "peak_memory_bytes": peak_memory_bytes, "devices": devices, "offload": offload, "time": time.time(),
    }
    for key in keys:
        store.write_provenance(key, {f"out_of_memory_{stage}": facts})


def device_name(device: str) -> str:
    """"cpu", or the card's name."""
    if device == "cpu":
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def release(device: str) -> None:
    """Give back what a finished cell held, before the next one is loaded."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()


def peak_memory(device: str) -> int:
    """Most bytes ever held: allocated on the card, or resident in this process."""
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import resource

    unit = 1 if sys.platform == "darwin" else 1024          # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def failure(error: BaseException, keys: tuple[str, ...], stage: str) -> Failed:
    """A Failed event of an exception: kind "out_of_memory" where memory ran out, else "error"; one line, and the traceback."""
    text = str(error) or type(error).__name__
    kind = "out_of_memory" if is_out_of_memory(error) else "error"
    reason = text if isinstance(error, HarnessError) else f"{type(error).__name__}: {text}"
    detail = "".join(traceback.format_exception(error))
    return Failed(time.time(), keys, stage=stage, kind=kind, reason=reason.strip().splitlines()[0], detail=detail)


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's own error on a card, Python's, and the plain RuntimeError of torch's CPU allocator."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "TorchOutOfMemoryError"):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY_WORDS)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


class _Meter:
    """What this process takes: after USAGE_SECONDS, then every USAGE_SECONDS per cell that is told of it, which bounds its cost."""

    def __init__(self, device: str) -> None:
        import psutil

        self._device, self._process = device, psutil.Process()
        self._due = time.monotonic() + USAGE_SECONDS
        self._process.cpu_percent()             # the first reading is of no time at all

    def now(self, cells: int) -> dict[str, float] | None:
        """For the cells at work; None where the last reading is young."""
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + USAGE_SECONDS * max(1, cells)
        facts = {"cpu_percent": self._process.cpu_percent(), "memory_megabytes": self._process.memory_info().rss / 1e6}
        if self._device != "cpu":
            import torch

            facts["gpu_memory_megabytes"] = torch.cuda.memory_reserved(self._device) / 1e6
        return facts


class _Logs:
    """One log file per cell: every event of the cell, and whatever the harness logs while its task runs."""

    def __init__(self, store: Store, cells: Iterable[Cell]) -> None:
        self._store = store
        self._paths = {cell_key(cell): store.log_path(cell_key(cell)) for cell in cells}
        self._kept = time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> _Logs:
        root = logging.getLogger("harness")
        handler = logging.Handler()
        handler.emit = lambda record: self._write(self._paths, f"{record.levelname.lower()}  {record.getMessage()}")  # type: ignore[method-assign]
        root.addHandler(handler)
        self._stack.callback(self._keep)
        self._stack.callback(root.removeHandler, handler)
        with contextlib.suppress(StoreError):
            for path in self._paths.values():   # an earlier task, perhaps elsewhere, began it
                self._store.local(path)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def event(self, event: Event) -> None:
        line = describe(event)
        if line:
            self._write(event.cell_keys or self._paths, line)
        if isinstance(event, Quantized | Scored | Failed) or time.monotonic() - self._kept > LOG_SECONDS:
            self._keep()

    def _keep(self) -> None:
        self._kept = time.monotonic()
        with contextlib.suppress(StoreError):
            for path in self._paths.values():
                self._store.files.keep(path)

    def _write(self, keys: Iterable[str], line: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        for key in keys:
            with contextlib.suppress(OSError):              # a log that cannot be written is no reason to lose the cell
                path = self._paths[key]
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"{stamp}  {line}\n")


def describe(event: Event) -> str:
    """One line of a log; "" for what is no news."""
    match event:
        case Progress():
            return f"{event.stage} {event.step}/{event.steps}"
        case Quantized():
            bits, seconds = event.record.get("bits_per_weight", 0.0), event.record.get("seconds", 0.0)
            return f"quantized  {bits:.3f} bits per weight in {seconds:.1f} s"
        case Scored():
            return "scored  " + "  ".join(f"{name} {value:.6g}" for name, value in event.metrics.items())
        case Failed():
            return f"FAILED in {event.stage} ({event.kind}): {event.reason}\n{event.detail}"
        case TaskStarted():
            return f"started on {event.worker}, {event.device}"
    return ""
