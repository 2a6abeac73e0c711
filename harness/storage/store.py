"""runs/: all results, one folder per checkpoint and per cell, readable with a text editor. Loads without torch.

    runs/checkpoints/<quantize_key>/    blocks as they finish, manifest.json last (written by formats/native.py)
    runs/reduced/<reduction_key>/       a smaller model that a reduction made, reduction.json last
    runs/cells/<cell_key>/cell.json     the cell, and every evaluation that a sweep requested
                          record.json   provenance: versions, device, commit, batch size, timings
                          scores/<score_key>.json       one evaluation: metrics, standard errors, details
                          scores/<score_key>.parquet    its results item by item
                          failures/*.json · log.txt
    runs/sweeps/<name>.json             the progress of a sweep, updated while it runs
    runs/locks/<name>.lock              the process that holds a lock
    runs/cancelled/<name>               a cell or a sweep that was cancelled
    runs/drivers/<id>.json              a running driver, its priority, and whether it waits for slots (`coordination`)
    runs/priorities/<name>              the priority that was set for a running sweep

runs/ is a folder that all processes share, or the URL of an object store (`object_store`).

Every file is written to a neighbour, flushed to the disk, then renamed: a reader sees the complete file or none, and files that a
killed process leaves behind block no other process. A damaged file counts as missing and is named in `Record.problems`, so that
the next run makes it again. Nothing is ever unpickled. JSON has no infinities: they are written as the strings "NaN",
"Infinity" and "-Infinity" and read back as numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.cell import (
    Cell,
    Evaluation,
    cell_key,
    from_json,
    quantize_key,
    score_key,
    to_json,
)
from harness.core.errors import StoreError
from harness.core.text import file_name, first_line
from harness.storage.files import LocalDisk, StorageBackend
from harness.storage.json_files import decode_non_finite, json_text
from harness.storage.locks import Owner, Waiting
from harness.storage.places import is_url
from harness.storage.record import Record, under_name

if TYPE_CHECKING:
    import pandas


log = logging.getLogger(__name__)

REDUCTION = "reduction.json"  # of a reduced model, written last


class Store:
    """Reads and writes `runs/`. Several processes may use one store; a process that makes a checkpoint or a score holds its `lock`.

    root   a folder; for an object store this machine's mirror of it (see `object_store`)
    place  the argument that opens this store: the folder, or the URL
    """

    def __init__(self, place: Path | str) -> None:
        self.place = place
        if isinstance(place, str) and place.startswith("file://"):
            self.place = place = Path(place.removeprefix("file://"))
        if is_url(place):
            from harness.storage.object_store import ObjectStore

            objects = ObjectStore(str(place))
            self.files: StorageBackend = objects
            self.root = objects.root
        else:
            self.files = LocalDisk()
            self.root = Path(place)

    def __repr__(self) -> str:
        return f"Store({str(self.place)!r})"

    def snapshot(self, cells: Iterable[Cell] | None = None) -> Store:
        """The store as it is now, for reading some cells (None: all) at once. The same store where reading one by one is fast."""
        if isinstance(self.files, LocalDisk):
            return self
        wanted = list(cells) if cells is not None else None
        keys = [cell_key(cell) for cell in wanted] if wanted is not None else self.cell_keys()
        taken = copy.copy(self)
        known = [] if wanted is None else dict.fromkeys(map(quantize_key, wanted))
        manifests = [self.checkpoint_folder(key) / "manifest.json" for key in known]
        taken.files = self.files.prefetched(
            [self.cell_folder(key) for key in dict.fromkeys(keys)], manifests
        )
        return taken

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

    def where(self, path: Path) -> str:
        """A path of this store for messages: below the folder, or below the URL."""
        return (
            f"{self.place}/{path.relative_to(self.root).as_posix()}"
            if is_url(self.place)
            else str(path)
        )

    def local(self, path: Path) -> Path | None:
        """The path of a file of the store on this machine; None where there is none."""
        try:
            return self.files.local(path)
        except FileNotFoundError:
            return None

    def write_file(self, path: Path, content: bytes) -> None:
        """Write any file below the root."""
        self.files.write(path, lambda aside: aside.write_bytes(content))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @contextmanager
    def making(self, quantize_key: str) -> Iterator[Path]:
        """The folder in which to make a checkpoint, with the blocks that are finished; `files.upload` stores further ones."""
        folder = self.checkpoint_folder(quantize_key)
        with self.files.making(folder):
            yield folder

    @contextmanager
    def reading(self, quantize_key: str) -> Iterator[Path]:
        """The folder of a complete checkpoint, ready to be read on this machine."""
        folder = self.checkpoint_folder(quantize_key)
        with self.files.reading(folder):
            yield folder

    # -- reduced models ------------------------------------------------------------------------------------------------

    def reduced_folder(self, reduction_key: str) -> Path:
        return self.root / "reduced" / reduction_key

    @contextmanager
    def making_reduced(self, reduction_key: str) -> Iterator[Path]:
        """The folder in which to make a reduced model; its files are stored when it is left, its record last."""
        folder = self.reduced_folder(reduction_key)
        with self.files.making(folder):
            yield folder
            for path in sorted(folder.iterdir(), key=lambda path: path.name == REDUCTION):
                self.files.upload(path)

    @contextmanager
    def reading_reduced(self, reduction_key: str) -> Iterator[Path]:
        """The folder of a reduced model, ready to be read on this machine."""
        folder = self.reduced_folder(reduction_key)
        with self.files.reading(folder):
            yield folder

    def reduction(self, reduction_key: str) -> dict[str, Any] | None:
        """The record of a reduced model, or None while it is not complete."""
        return self._read(self.reduced_folder(reduction_key) / REDUCTION, [])

    def manifest(self, quantize_key: str) -> dict[str, Any] | None:
        """The manifest of a checkpoint, or None while it is not complete."""
        return self._read(self.checkpoint_folder(quantize_key) / "manifest.json", [])

    # -- cells ---------------------------------------------------------------------------------------------------------

    def open_cell(self, cell: Cell) -> str:
        """Make the cell's folder and return its key. Evaluations that other sweeps requested stay listed."""
        key = cell_key(cell)
        known = self.cell(key)
        merged = self._with_earlier(cell, known)
        if known != merged or known.evaluations != merged.evaluations:
            # Another driver may request other evaluations of the same cell.
            with self.lock(f"record-{key}"):
                merged = self._with_earlier(cell, self.cell(key))
                content = {
                    "title": cell.title,
                    "cell_key": key,
                    "quantize_key": quantize_key(cell),
                    "cell": to_json(merged),
                }
                self._write_json(self.cell_folder(key) / "cell.json", content)
        return key

    @staticmethod
    def _with_earlier(cell: Cell, known: Cell | None) -> Cell:
        """The cell with the evaluations of its record that it does not request, before its own."""
        asked = {score_key(cell, evaluation): evaluation for evaluation in cell.evaluations}
        earlier = (
            ()
            if known is None
            else tuple(e for e in known.evaluations if score_key(known, e) not in asked)
        )
        return dataclasses.replace(cell, evaluations=(*earlier, *cell.evaluations))

    def open_cells(self, cells: Sequence[Cell]) -> None:
        """`open_cell` and `clear_failures` for many at once."""
        known = self.snapshot(cells)

        def open_one(cell: Cell) -> None:
            key = cell_key(cell)
            earlier = known.cell(key)
            if earlier is None or not set(cell.evaluations) <= set(earlier.evaluations):
                self.open_cell(cell)
            if known.failures(key):
                self.clear_failures(key)  # they are retried

        if self.files.parallel == 1:
            for cell in cells:
                open_one(cell)
            return
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self.files.parallel) as pool:
            list(pool.map(open_one, cells))

    def cell(self, cell_key: str, problems: list[str] | None = None) -> Cell | None:
        """The cell of a key with every evaluation ever requested of it, the latest requested last."""
        path = self.cell_folder(cell_key) / "cell.json"
        content = self._read(path, [] if problems is None else problems, decode=False)
        if content is None:
            return None
        try:
            return from_json(Cell, content["cell"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            _report(
                f"{self.where(path)} is not a cell of this version ({error}); it counts as missing",
                problems,
            )
            return None

    def write_provenance(self, cell_key: str, facts: Mapping[str, Any]) -> None:
        """Add facts that are no part of any key (versions, device, commit, batch size, seconds) to record.json."""
        path = self.cell_folder(cell_key) / "record.json"
        with self.lock(f"record-{cell_key}"):
            self._write_json(path, {**(self._read(path, []) or {}), **facts})

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
            raise StoreError(
                f'{len(matches)} cells in {self.place} start with "{prefix}"; give more digits:\n{listed}{more}'
            )
        hint = (
            f" There are:\n{listed}{more}"
            if keys
            else " It holds no cells yet; start with: harness run"
        )
        raise StoreError(f'no cell in {self.place} starts with "{prefix}".{hint}')

    def cell_keys(self) -> list[str]:
        return self.files.names(self.root / "cells")

    def _title(self, key: str) -> str:
        cell = self.cell(key)
        return cell.title if cell is not None else "(cell.json is missing)"

    # -- scores --------------------------------------------------------------------------------------------------------

    def score(
        self, cell_key: str, score_key: str, problems: list[str] | None = None
    ) -> dict[str, Any] | None:
        """One complete evaluation, or None. A damaged file, or one without metrics, counts as missing."""
        found = [] if problems is None else problems
        path = self.score_path(cell_key, score_key)
        score = self._read(path, found)
        if score is not None and not isinstance(score.get("metrics"), dict):
            _report(f"{self.where(path)} has no metrics; it counts as missing", found)
            return None
        if (
            score is not None
            and score.get("items")
            and not self.files.exists(self.items_path(cell_key, score_key))
        ):
            _report(
                f"{self.where(self.items_path(cell_key, score_key))} is missing: paired tests leave this score out",
                found,
            )
        return score

    def write_score(
        self,
        cell_key: str,
        score_key: str,
        score: Mapping[str, Any],
        items: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Write one evaluation: its items first, the JSON last.

        score   {"metrics": {full name: value}, "stderr": {full name: value}, "details": {…}}; other fields are stored as they are
        items   columns of equal length, one of them "id"
        """
        if not isinstance(score.get("metrics"), dict):
            holds = ", ".join(sorted(score)) or "nothing"
            raise StoreError(
                f"score {score_key[:12]} of cell {cell_key[:12]} has no metrics; it holds {holds}"
            )
        rows = 0
        if items is not None:
            lengths = {name: len(column) for name, column in items.items()}
            if len(set(lengths.values())) > 1 or "id" not in lengths:
                raise StoreError(
                    f'items of score {score_key[:12]} need a column "id" and equal lengths; they have {lengths}'
                )
            rows = lengths["id"]
            self.files.write(
                self.items_path(cell_key, score_key), functools.partial(_write_parquet, items)
            )
        content = {**score, "cell_key": cell_key, "score_key": score_key, "items": rows}
        self._write_json(self.score_path(cell_key, score_key), content)

    def items(self, cell_key: str, score_key: str) -> pandas.DataFrame | None:
        """Results of one evaluation item by item; None when it has none or the file is damaged."""
        import pandas

        path = self.local(self.items_path(cell_key, score_key))
        if path is None:
            return None
        try:
            return pandas.read_parquet(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            _report(
                f"{self.where(path)} is damaged and counts as missing ({first_line(error)})", None
            )
            return None

    # -- failures ------------------------------------------------------------------------------------------------------

    def write_failure(self, cell_key: str, failure: Mapping[str, Any]) -> None:
        """failure: {"stage", "kind", "reason", "detail"}, as in events.Failed; the time is added where it is missing."""
        content = {"time": time.time(), **failure}
        stage = file_name(str(content.get("stage", ""))) or "cell"
        self._write_json(
            self.cell_folder(cell_key)
            / "failures"
            / f"{int(content['time'] * 1000):015d}-{stage}.json",
            content,
        )

    def failures(self, cell_key: str) -> list[dict[str, Any]]:
        """Oldest first."""
        return [
            content
            for path in self._failure_paths(cell_key)
            if (content := self._read(path, [])) is not None
        ]

    def _failure_paths(self, cell_key: str) -> list[Path]:
        folder = self.cell_folder(cell_key) / "failures"
        return [folder / name for name in self.files.names(folder) if name.endswith(".json")]

    def clear_failures(self, cell_key: str, stage: str | None = None) -> None:
        """Delete the failures of one stage, or all: the work succeeded or is retried."""
        for path in self._failure_paths(cell_key):
            content = self._read(path, [])
            if stage is None or content is None or content.get("stage") == stage:
                self.files.remove(path)

    # -- records -------------------------------------------------------------------------------------------------------

    def record(self, cell: Cell) -> Record:
        """The record of a cell, with the scores of its own evaluations. Reads only."""
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
        """The record of every cell in the store, by key, with every evaluation that any sweep requested."""
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
        # Written often; losing the last one costs nothing.
        self._write_json(self._sweep_path(name), state, durable=False)

    def sweep_names(self) -> list[str]:
        return [
            name.removesuffix(".json")
            for name in self.files.names(self.root / "sweeps")
            if name.endswith(".json")
        ]

    def _sweep_path(self, name: str) -> Path:
        return self.root / "sweeps" / f"{name}.json"

    # -- whole store ---------------------------------------------------------------------------------------------------

    def check_exists(self) -> None:
        """Raise StoreError for a folder that is not there, so that a misspelt place is neither shown as empty nor made."""
        if not is_url(self.place) and not self.root.is_dir():
            raise StoreError(f"runs={self.place}: no such folder; no sweep has run there")

    def check_place(self) -> None:
        """Raise StoreError where the store can hold nothing. Writes nothing: a folder that does not exist yet is not made."""
        if is_url(self.place):
            self.check_writable()
            return
        place = next(
            path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists()
        )
        if not place.is_dir():
            raise StoreError(f"runs={self.place}: {place} is a file; name a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise StoreError(
                f"runs={self.place}: {place} cannot be written; ask for the right to write it, or name another folder"
            )
        if self.root.is_dir():
            self.check_writable()

    def check_writable(self, needed_bytes: int = 0) -> None:
        """Raise StoreError where the store cannot take `needed_bytes` more: no permission, read-only or full."""
        probe = self.root / f".probe.{uuid.uuid4().hex}"
        self.files.write(probe, lambda path: path.write_bytes(b"0" * 4096))
        self.files.remove(probe)
        free = self.files.free_bytes(self.root)
        if free is not None and free < needed_bytes:
            raise StoreError(
                f"{self.root.resolve()} has {free / 1e9:.1f} GB free, the sweep needs {needed_bytes / 1e9:.1f} GB; "
                "free some, or keep the results elsewhere with runs=FOLDER"
            )

    @contextmanager
    def probe(self) -> Iterator[Path]:
        """A file just written, by which another machine can check whether it sees this store."""
        path = self.root.absolute() / f".probe.{uuid.uuid4().hex}"
        self.files.write(path, lambda aside: aside.write_text(path.name))
        try:
            yield path
        finally:
            self.files.remove(path)

    def used_bytes(self) -> int:
        """Total size of all files of the store."""
        return sum(entry.bytes for entry in self.files.walk(self.root))

    # -- cancelling ----------------------------------------------------------------------------------------------------

    def cancel(self, name: str) -> None:
        """Cancel a cell (by its key) or a sweep (by its name); a driver that runs it notices within seconds."""
        self.files.write(
            self.root / "cancelled" / name,
            lambda aside: aside.write_text(str(Owner.current())),
            durable=False,
        )

    def is_cancelled(self, name: str) -> bool:
        return self.files.exists(self.root / "cancelled" / name)

    def cancelled_names(self) -> set[str]:
        """Keys of cells and names of sweeps that were cancelled since they last began."""
        return set(self.files.names(self.root / "cancelled"))

    def clear_cancelled(self, names: Iterable[str]) -> None:
        """Delete earlier cancellations of cells and sweeps that are started again."""
        for name in self.cancelled_names() & set(names):
            self.files.remove(self.root / "cancelled" / name)

    # -- drivers and their priorities ----------------------------------------------------------------------------------

    def drivers(self) -> dict[str, dict[str, Any]]:
        """The content of each driver's file, dead drivers too (see `coordination`)."""
        folder = self.root / "drivers"
        found = {
            name.removesuffix(".json"): self._read(folder / name, [])
            for name in self.files.names(folder)
        }
        return {name: content for name, content in found.items() if content is not None}

    def write_driver(self, name: str, content: Mapping[str, Any]) -> None:
        self._write_json(self.root / "drivers" / f"{name}.json", content, durable=False)

    def remove_driver(self, name: str) -> None:
        self.files.remove(self.root / "drivers" / f"{name}.json")

    def ask_priority(self, sweep: str, priority: int) -> None:
        """Give a running sweep another priority; its driver notices within seconds."""
        self.files.write(
            self.root / "priorities" / sweep,
            lambda aside: aside.write_text(str(priority)),
            durable=False,
        )

    def asked_priority(self, sweep: str) -> int | None:
        """The priority that `ask_priority` last set for a sweep since it began; None where it was not set."""
        path = self.root / "priorities" / sweep
        if not self.files.exists(path):
            return None
        try:
            return int(self.files.read(path))
        except (OSError, ValueError):
            return None

    def clear_priority(self, sweep: str) -> None:
        """Delete the priority that was set before: the sweep starts with its own."""
        self.files.remove(self.root / "priorities" / sweep)

    def lock(
        self, name: str, timeout: float | None = None, on_wait: Waiting | None = None
    ) -> AbstractContextManager[None]:
        """Hold `name` (a key, a sweep) against every other process and thread; wait while another has it.

        timeout   seconds to wait before StoreError names the holder; None waits without end. The lock is not re-entrant.
        on_wait   called once with the holder when there is a wait

        On a file system the operating system frees the lock when its process ends, and a lock that a surviving child of a dead
        process of this host still holds is broken. In an object store it is a lease (see `leases`).
        """
        return self.files.lock(self.root / "locks" / f"{name}.lock", timeout, on_wait)

    def _write_json(self, path: Path, content: Any, durable: bool = True) -> None:
        text = json_text(content)
        self.files.write(path, lambda aside: aside.write_text(text, encoding="utf-8"), durable)

    def _read(self, path: Path, problems: list[str], decode: bool = True) -> dict[str, Any] | None:
        try:
            text = self.files.read(path).decode()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                raise StoreError(
                    f"{self.place}: a name in this path is too long for the disk; choose a shorter one (runs=FOLDER)"
                ) from error
            _report(
                f"{self.where(path)} cannot be read and counts as missing ({first_line(error)})",
                problems,
            )
            return None
        try:
            content = json.loads(text)
        except ValueError as error:
            _report(
                f"{self.where(path)} is damaged and counts as missing ({first_line(error)})",
                problems,
            )
            return None
        if not isinstance(content, dict):
            _report(f"{self.where(path)} is not a JSON object and counts as missing", problems)
            return None
        return decode_non_finite(content) if decode else content


def _write_parquet(items: Mapping[str, Sequence[Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.table({name: pyarrow.array(list(column)) for name, column in items.items()})
    except pyarrow.ArrowException as error:
        raise StoreError(
            f"items cannot be stored as a table: {first_line(error)}; a column holds values of one type"
        ) from error
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _report(sentence: str, problems: list[str] | None) -> None:
    log.warning(sentence)
    if problems is not None:
        problems.append(sentence)
