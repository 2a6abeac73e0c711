"""runs/: what was computed, one folder per checkpoint and per cell, readable with a text editor. Loads without torch.

    runs/checkpoints/<quantize_key>/    blocks as they finish, manifest.json last (written by formats/native.py)
    runs/cells/<cell_key>/cell.json     the cell, and every evaluation that a sweep asked of it
                          record.json   provenance: versions, device, commit, batch size, timings
                          scores/<score_key>.json       one evaluation: metrics, standard errors, details
                          scores/<score_key>.parquet    its results item by item
                          failures/*.json · log.txt
    runs/sweeps/<name>.json             how far a sweep is, kept up to date while it runs
    runs/locks/<name>.lock              who works on what
    runs/cancelled/<name>               a cell or a sweep that somebody wants stopped

Every file is written to a neighbour, flushed to the disk, then renamed: a reader sees the whole file or none, and what a killed
process leaves behind blocks nobody. A file that is damaged all the same counts as missing and is named in `Record.problems`, so
that the next run makes it again. Nothing is ever unpickled. JSON has no infinities: they are written as the strings "NaN",
"Infinity" and "-Infinity" and read back as numbers.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import json
import logging
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cell import Cell, Evaluation, cell_key, from_json, quantize_key, score_key, to_json
from harness.errors import StoreError

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

CHECKPOINT_METRICS = {                          # manifest field -> metric
    "bits_per_weight": "checkpoint/bits_per_weight",
    "bits_per_weight_total": "checkpoint/bits_per_weight_total",
    "stored_bytes": "checkpoint/bytes",
    "seconds": "quantize/seconds",
    "peak_memory_bytes": "quantize/peak_memory_bytes",
}
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Record:
    """What is known of a cell.

    manifest    of its checkpoint; None while there is none
    scores      evaluation name -> {"metrics": …, "stderr": …, "details": …, "score_key": …}; only complete ones
    missing     evaluations of the cell that have no score yet
    failures    newest last; {"stage", "kind", "reason", "detail", "time"}
    problems    damaged files that count as missing, one sentence each
    """

    cell: Cell
    quantize_key: str
    cell_key: str
    manifest: dict[str, Any] | None = None
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    failures: tuple[dict[str, Any], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return self.manifest is not None and not self.missing

    @property
    def smoke(self) -> bool:
        """Some score stands on a part of its data only."""
        return any(score.get("details", {}).get("smoke") for score in self.scores.values())

    @property
    def layer_errors(self) -> list[dict[str, Any]]:
        """One row per quantized matrix, as the manifest has them: {"block", "linear", …}."""
        return list((self.manifest or {}).get("layer_errors", []))

    def metrics(self) -> dict[str, float]:
        """Every number of the cell by full name: "wikitext2/perplexity", "arc_easy/acc_stderr", "checkpoint/bits_per_weight", …"""
        found: dict[str, float] = {}
        for source, metric in CHECKPOINT_METRICS.items():
            value = (self.manifest or {}).get(source)
            if isinstance(value, int | float):
                found[metric] = float(value)
        for score in self.scores.values():
            found.update({name: float(value) for name, value in score["metrics"].items()})
            found.update({f"{name}_stderr": float(value) for name, value in score.get("stderr", {}).items()})
        return found

    def smoke_metrics(self) -> frozenset[str]:
        """Names of the metrics that stand on a part of their data only."""
        return frozenset(
            name for score in self.scores.values() if score.get("details", {}).get("smoke") for name in score["metrics"]
        )


@dataclass(frozen=True)
class Owner:
    """Who holds a lock or runs a sweep.

    started  start of the process, seconds since the epoch, for people
    birth    tells the process from a later one that was given the same id; unlike `started` it does not move with the clock
    """

    host: str
    pid: int
    started: float
    birth: str = ""

    @classmethod
    def current(cls) -> Owner:
        import psutil

        return cls(_host(), os.getpid(), psutil.Process().create_time(), _birth(os.getpid()) or "")

    @property
    def is_dead(self) -> bool:
        """Certainly dead; a process of another host is never certainly dead."""
        if self.host != _host():
            return False
        birth = _birth(self.pid)
        return birth is None or bool(self.birth and birth and birth != self.birth)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host.partition('/')[0]}, running since {since}"


class Store:
    """Reads and writes `runs/`. Several processes may use one folder; whoever makes a checkpoint or a score holds its `lock`."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # -- places --------------------------------------------------------------------------------------------------------

    def checkpoint_folder(self, quantize_key: str) -> Path:
        return self.root / "checkpoints" / quantize_key

    def cell_folder(self, cell_key: str) -> Path:
        return self.root / "cells" / cell_key

    def log_path(self, cell_key: str) -> Path:
        return self.cell_folder(cell_key) / "log.txt"

    def score_path(self, cell_key: str, score_key: str) -> Path:
        return self.cell_folder(cell_key) / "scores" / f"{score_key}.json"

    def items_path(self, cell_key: str, score_key: str) -> Path:
        return self.score_path(cell_key, score_key).with_suffix(".parquet")

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def manifest(self, quantize_key: str) -> dict[str, Any] | None:
        """What the checkpoint holds, or None while it is not complete."""
        return self._read(self.checkpoint_folder(quantize_key) / "manifest.json", [])

    # -- cells ---------------------------------------------------------------------------------------------------------

    def open_cell(self, cell: Cell) -> str:
        """Make the cell's folder and return its key. Evaluations that other sweeps asked of it stay listed."""
        key = cell_key(cell)
        known = self.cell(key)
        merged = self._with_earlier(cell, known)
        if known != merged or known.evaluations != merged.evaluations:
            with self.lock(f"record-{key}"):    # another driver may ask the same cell for other evaluations
                merged = self._with_earlier(cell, self.cell(key))
                content = {"title": cell.title, "cell_key": key, "quantize_key": quantize_key(cell), "cell": to_json(merged)}
                write_json(self.cell_folder(key) / "cell.json", content)
        return key

    @staticmethod
    def _with_earlier(cell: Cell, known: Cell | None) -> Cell:
        """The cell with the evaluations of its record that it does not ask for, before its own."""
        asked = {score_key(cell, evaluation): evaluation for evaluation in cell.evaluations}
        earlier = () if known is None else tuple(e for e in known.evaluations if score_key(known, e) not in asked)
        return dataclasses.replace(cell, evaluations=(*earlier, *cell.evaluations))

    def cell(self, cell_key: str, problems: list[str] | None = None) -> Cell | None:
        """The cell of a key with every evaluation ever asked of it, the latest asked last."""
        path = self.cell_folder(cell_key) / "cell.json"
        content = self._read(path, [] if problems is None else problems, decode=False)
        if content is None:
            return None
        try:
            return from_json(Cell, content["cell"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            _report(f"{path} is not a cell of this version ({error}); it counts as missing", problems)
            return None

    def write_provenance(self, cell_key: str, facts: Mapping[str, Any]) -> None:
        """Add facts that are no part of any key (versions, device, commit, batch size, seconds) to record.json."""
        path = self.cell_folder(cell_key) / "record.json"
        with self.lock(f"record-{cell_key}"):
            write_json(path, {**(self._read(path, []) or {}), **facts})

    def find(self, prefix: str) -> str:
        """The one cell key that starts with `prefix`. Raises StoreError with the candidates when there are none or several."""
        keys = self.cell_keys()
        matches = [key for key in keys if key.startswith(prefix)]
        if len(matches) == 1:
            return matches[0]
        shown = matches or keys
        listed = "\n".join(f"  {key[:12]}  {self._title(key)}" for key in shown[:20])
        more = f"\n  … and {len(shown) - 20} more" if len(shown) > 20 else ""
        if matches:
            raise StoreError(f'{len(matches)} cells in {self.root} start with "{prefix}"; give more digits:\n{listed}{more}')
        hint = f" There are:\n{listed}{more}" if keys else " It holds no cells yet; start with: harness run"
        raise StoreError(f'no cell in {self.root} starts with "{prefix}".{hint}')

    def cell_keys(self) -> list[str]:
        folder = self.root / "cells"
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []

    def _title(self, key: str) -> str:
        cell = self.cell(key)
        return cell.title if cell is not None else "(cell.json is missing)"

    # -- scores --------------------------------------------------------------------------------------------------------

    def score(self, cell_key: str, score_key: str, problems: list[str] | None = None) -> dict[str, Any] | None:
        """One complete evaluation, or None. A damaged file, or one without metrics, counts as missing."""
        found = [] if problems is None else problems
        path = self.score_path(cell_key, score_key)
        score = self._read(path, found)
        if score is not None and not isinstance(score.get("metrics"), dict):
            _report(f"{path} has no metrics; it counts as missing", found)
            return None
        if score is not None and score.get("items") and not self.items_path(cell_key, score_key).exists():
            _report(f"{self.items_path(cell_key, score_key)} is missing: paired tests leave this score out", found)
        return score

    def write_score(
        self, cell_key: str, score_key: str, score: Mapping[str, Any], items: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """Keep one evaluation: its items first, the JSON last.

        score   {"metrics": {full name: value}, "stderr": {full name: value}, "details": {…}}; other fields are kept as they are
        items   columns of equal length, one of them "id"
        """
        if not isinstance(score.get("metrics"), dict):
            holds = ", ".join(sorted(score)) or "nothing"
            raise StoreError(f"score {score_key[:12]} of cell {cell_key[:12]} has no metrics; it holds {holds}")
        rows = 0
        if items is not None:
            lengths = {name: len(column) for name, column in items.items()}
            if len(set(lengths.values())) > 1 or "id" not in lengths:
                raise StoreError(f'items of score {score_key[:12]} need a column "id" and equal lengths; they have {lengths}')
            rows = lengths["id"]
            write_aside(self.items_path(cell_key, score_key), functools.partial(_write_parquet, items))
        content = {**score, "cell_key": cell_key, "score_key": score_key, "items": rows}
        write_json(self.score_path(cell_key, score_key), content)

    def items(self, cell_key: str, score_key: str) -> pandas.DataFrame | None:
        """Results of one evaluation item by item; None when it has none or the file is damaged."""
        import pandas

        path = self.items_path(cell_key, score_key)
        if not path.exists():
            return None
        try:
            return pandas.read_parquet(path)
        except (OSError, ValueError) as error:                      # pyarrow's errors are ValueErrors
            _report(f"{path} is damaged and counts as missing ({_first_line(error)})", None)
            return None

    # -- failures ------------------------------------------------------------------------------------------------------

    def write_failure(self, cell_key: str, failure: Mapping[str, Any]) -> None:
        """failure: {"stage", "kind", "reason", "detail"}, as in events.Failed; the time is added where it is missing."""
        content = {"time": time.time(), **failure}
        stage = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(content.get("stage", ""))) or "cell"
        write_json(self.cell_folder(cell_key) / "failures" / f"{int(content['time'] * 1000):015d}-{stage}.json", content)

    def failures(self, cell_key: str) -> list[dict[str, Any]]:
        """Oldest first."""
        folder = self.cell_folder(cell_key) / "failures"
        return [content for path in sorted(folder.glob("[!.]*.json")) if (content := self._read(path, [])) is not None]

    def clear_failures(self, cell_key: str, stage: str | None = None) -> None:
        """Forget the failures of one stage, or all: the work they stood for succeeded or is tried again."""
        for path in sorted((self.cell_folder(cell_key) / "failures").glob("[!.]*.json")):
            content = self._read(path, [])
            if stage is None or content is None or content.get("stage") == stage:
                path.unlink(missing_ok=True)

    # -- records -------------------------------------------------------------------------------------------------------

    def record(self, cell: Cell) -> Record:
        """Everything known of a cell, with the scores of its own evaluations. Reads only."""
        key = cell_key(cell)
        problems: list[str] = []
        checkpoint = quantize_key(cell)
        scores: dict[str, dict[str, Any]] = {}
        for evaluation in cell.evaluations:
            score = self.score(key, score_key(cell, evaluation), problems)
            if score is not None:
                scores[evaluation.name] = under_name(score, evaluation.name)
        return Record(
            cell=cell,
            quantize_key=checkpoint,
            cell_key=key,
            manifest=self._read(self.checkpoint_folder(checkpoint) / "manifest.json", problems),
            scores=scores,
            missing=tuple(dict.fromkeys(e.name for e in cell.evaluations if e.name not in scores)),
            failures=tuple(self.failures(key)),
            provenance=self._read(self.cell_folder(key) / "record.json", problems) or {},
            problems=tuple(problems),
        )

    def records(self) -> Iterator[Record]:
        """The record of every cell in the store, by key, with every evaluation that any sweep asked of it."""
        for key in self.cell_keys():
            cell = self.cell(key)
            if cell is not None:
                yield self.record(cell)

    def evaluation_items(self, record: Record, evaluation: Evaluation) -> pandas.DataFrame | None:
        """Item results of one evaluation of a record's cell."""
        return self.items(record.cell_key, score_key(record.cell, evaluation))

    # -- sweeps --------------------------------------------------------------------------------------------------------

    def sweep_state(self, name: str) -> dict[str, Any] | None:
        """{"name", "title", "owner", "started", "updated", "ended", "cells": {cell_key: {"title", "state", …}}}, or None."""
        return self._read(self._sweep_path(name), [])

    def write_sweep_state(self, name: str, state: Mapping[str, Any]) -> None:
        write_json(self._sweep_path(name), state, durable=False)    # written every second; losing the last one costs nothing

    def sweep_names(self) -> list[str]:
        return sorted(path.stem for path in (self.root / "sweeps").glob("[!.]*.json"))

    def _sweep_path(self, name: str) -> Path:
        return self.root / "sweeps" / f"{name}.json"

    # -- whole store ---------------------------------------------------------------------------------------------------

    def check_writable(self, needed_bytes: int = 0) -> None:
        """Raise StoreError where the store cannot take `needed_bytes` more: no permission, read-only or full."""
        probe = self.root / f".probe.{uuid.uuid4().hex}"
        write_aside(probe, lambda path: path.write_bytes(b"0" * 4096))
        probe.unlink(missing_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < needed_bytes:
            raise StoreError(
                f"{self.root.resolve()} has {free / 1e9:.1f} GB free, the sweep needs {needed_bytes / 1e9:.1f} GB; "
                "free some, or keep the results elsewhere with runs=FOLDER"
            )

    @contextmanager
    def probe(self) -> Iterator[Path]:
        """A file just written, by which another machine can tell whether it sees this very folder."""
        path = self.root.absolute() / f".probe.{uuid.uuid4().hex}"
        write_aside(path, lambda aside: aside.write_text(str(path)))
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    # -- cancelling ----------------------------------------------------------------------------------------------------

    def cancel(self, name: str) -> None:
        """Ask whoever runs a cell (by its key) or a sweep (by its name) to leave off; it is noticed within seconds."""
        write_aside(self.root / "cancelled" / name, lambda aside: aside.write_text(str(Owner.current())), durable=False)

    def is_cancelled(self, name: str) -> bool:
        return (self.root / "cancelled" / name).exists()

    def cancelled_names(self) -> set[str]:
        """Keys of cells and names of sweeps that were cancelled since they last began."""
        folder = self.root / "cancelled"
        return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()

    def clear_cancelled(self, names: Iterable[str]) -> None:
        """Forget what was asked before: somebody starts these again."""
        for name in names:
            (self.root / "cancelled" / name).unlink(missing_ok=True)

    @contextmanager
    def lock(
        self, name: str, timeout: float | None = None, on_wait: Callable[[Owner | None], None] | None = None
    ) -> Iterator[None]:
        """Hold `name` (a key, a sweep) against every other process and thread; wait while another has it.

        timeout   seconds to wait before StoreError names the holder; None waits without end. The lock is not re-entrant.
        on_wait   called once with the holder when there is a wait

        The operating system frees the lock when its process ends, however it ends. One that a surviving child of a dead process on
        this host still holds is broken.
        """
        descriptor = self._acquire(name, timeout, on_wait)
        try:
            yield
        finally:
            os.close(descriptor)                # frees it

    def _acquire(self, name: str, timeout: float | None, on_wait: Callable[[Owner | None], None] | None) -> int:
        path = self.root / "locks" / f"{name}.lock"
        began, pause, told = time.monotonic(), 0.01, False
        while True:
            descriptor, owner = _try_lock(path)
            if descriptor is not None:
                return descriptor
            if on_wait is not None and not told:
                on_wait(owner)
                told = True
            if timeout is not None and time.monotonic() - began >= timeout:
                holder = str(owner) if owner else "another process"
                raise StoreError(f"{path} is held by {holder}; waited {timeout:g} s. Wait for it to end, or end it")
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)       # 10 ms growing to 1 s

    def _read(self, path: Path, problems: list[str], decode: bool = True) -> dict[str, Any] | None:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            _report(f"{path} cannot be read and counts as missing ({_first_line(error)})", problems)
            return None
        try:
            content = json.loads(text)
        except ValueError as error:
            _report(f"{path} is damaged and counts as missing ({_first_line(error)})", problems)
            return None
        if not isinstance(content, dict):
            _report(f"{path} is not a JSON object and counts as missing", problems)
            return None
        return _decode(content) if decode else content


def under_name(score: dict[str, Any], name: str) -> dict[str, Any]:
    """A score as the evaluation of this name has it. A key leaves the name out: it may have been made under another."""
    made_as = str(score.get("evaluation", name))
    if made_as == name:
        return score

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        own = f"{made_as}/"
        return {f"{name}/{key.removeprefix(own)}" if key.startswith(own) else key: value for key, value in values.items()}

    return {**score, "evaluation": name, **{part: renamed(score[part]) for part in ("metrics", "stderr") if part in score}}


class SweepState:
    """The progress of one running sweep, kept in runs/sweeps/<name>.json for `harness status`.

    States of a cell: waiting, quantizing, evaluating, done, failed, refused.
    """

    def __init__(self, store: Store, name: str, titles: Mapping[str, str], title: str = "", interval_seconds: float = 1.0) -> None:
        """titles: cell_key -> title, in the sweep's order."""
        self.store, self.name, self.interval_seconds = store, name, interval_seconds
        self.content: dict[str, Any] = {
            "name": name,
            "title": title,
            "owner": dataclasses.asdict(Owner.current()),
            "started": time.time(),
            "updated": time.time(),
            "ended": None,
            "cells": {key: {"title": cell_title, "state": "waiting"} for key, cell_title in titles.items()},
        }
        self._saved = -math.inf
        self.save()

    def update(self, cell_key: str, state: str, **facts: Any) -> None:
        """Set a cell's state with what belongs to it now (stage, step, steps, reason, metrics); written at most once a second."""
        title = self.content["cells"].get(cell_key, {}).get("title", "")
        self.content["cells"][cell_key] = {"title": title, "state": state, **facts}
        if time.monotonic() - self._saved >= self.interval_seconds:
            self.save()

    def end(self) -> None:
        self.content["ended"] = time.time()
        self.save()

    def save(self) -> None:
        self.content["updated"] = time.time()
        self.store.write_sweep_state(self.name, self.content)
        self._saved = time.monotonic()


def is_running(state: Mapping[str, Any]) -> bool:
    """Whether the process that writes a sweep's state still lives, as far as this host can know."""
    return state.get("ended") is None and not Owner(**state["owner"]).is_dead


def write_json(path: Path, content: Any, durable: bool = True) -> None:
    """Write readable JSON aside, then rename. Raises StoreError when the disk refuses."""
    text = json.dumps(_encode(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"), durable)


def write_aside(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Let `write` fill a neighbour of `path`, flush it to the disk, rename it. A reader sees the whole file or none.

    durable False leaves out the flush. Raises StoreError when the disk refuses; leaves no neighbour behind then.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            if durable:
                _flush(aside)
            os.replace(aside, path)
            if durable:
                _flush(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(_explain(path, error)) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(path: Path, error: OSError) -> str:
    ways_out = {
        errno.EACCES: "no permission; make it writable, or keep the results elsewhere with runs=FOLDER",
        errno.EPERM: "no permission; make it writable, or keep the results elsewhere with runs=FOLDER",
        errno.EROFS: "the file system is read-only; keep the results elsewhere with runs=FOLDER",
        errno.ENOSPC: "the disk is full; free some space and run the same command again, nothing finished is lost",
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, nothing finished is lost",
        errno.ENOTDIR: "a file stands where a folder should be",
    }
    return f"cannot write {path}: {ways_out.get(error.errno or 0, error.strerror or str(error))}"


def _write_parquet(items: Mapping[str, Sequence[Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.table({name: pyarrow.array(list(column)) for name, column in items.items()})
    except pyarrow.ArrowException as error:
        raise StoreError(f"items cannot be stored as a table: {_first_line(error)}; a column holds values of one type") from error
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _try_lock(path: Path) -> tuple[int | None, Owner | None]:
    """(descriptor, owner) when taken, (None, holder) when not. A guard makes taking, naming the owner and breaking one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        guard = os.open(path.with_suffix(".guard"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(_explain(path, error)) from error
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read_owner(descriptor)
            os.close(descriptor)
            if owner is not None and owner.is_dead:
                path.unlink(missing_ok=True)    # held through a child that outlived it; the next try makes a new file
            return None, owner
        owner = Owner.current()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(dataclasses.asdict(owner)).encode(), 0)
        return descriptor, owner
    except OSError as error:
        raise StoreError(f"cannot lock {path}: {error.strerror}; the file system of runs/ must support file locks") from error
    finally:
        os.close(guard)


def _read_owner(descriptor: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


@functools.cache
def _host() -> str:
    """Host name and process namespace: containers may share a host name but count processes each from 1."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"


def _birth(pid: int) -> str | None:
    """What tells a process from others of the same id: clock ticks from boot to its start; None when it does not run."""
    import psutil

    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return ""                               # alive; nothing more may be known
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): _encode(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str | int | float | bool):
        return _encode(value.item())            # a NumPy scalar
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _decode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _report(sentence: str, problems: list[str] | None) -> None:
    log.warning(sentence)
    if problems is not None:
        problems.append(sentence)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
