"""Everything a sweep reads from the hub as one folder, so that it runs where there is no network: `harness data pull SWEEP`.

    DIR/bundle.json                       what is here: repositories with their commits, files with rows and SHA-256
    DIR/models/<owner>--<name>/           config, tokenizer and safetensors
    DIR/text/<slug>/<split>.jsonl.gz      calibration and perplexity texts, one object with `text` per row
    DIR/tasks/<task>/<split>.jsonl        items of benchmarks, as lm-eval reads them
    DIR/…/<file>.rows                     SHA-256 of every row of that file, one per line

`data.root=DIR` then runs the sweep from it. Revisions are resolved once, when the bundle is made, and kept in bundle.json; models
and data sets keep their commits as identity, so that keys and results are those of a run with network. What is there already and
unchanged is not fetched again. Folders and the embedded demo are no business of the hub and stay where they are.
Loads without torch.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from harness.core.cell import base_of
from harness.core.errors import DataError
from harness.core.sweep import Sweep
from harness.data.digests import file_digest
from harness.data.hub import COMMIT, hub_rows, is_hub_id
from harness.data.model_folders import FETCHED_FILES
from harness.data.task_files import SPLITS, TaskFile, members
from harness.data.texts import hub_text, read_corpus

INDEX = "bundle.json"
FORMAT = 2
Row = Mapping[str, Any]


class Hub(Protocol):
    """The requests of a bundle to the hub. Tests replace it by a folder."""

    def commit(self, repository: str, kind: str, revision: str) -> str:
        """The commit of a revision; kind: "model" or "dataset"."""

    def model(self, repository: str, commit: str) -> Path:
        """A folder with a model's files."""

    def texts(self, source: str, split: str) -> Iterable[str]:
        """The documents of a "hub:" source whose revision is a commit."""

    def rows(self, repository: str, config: str | None, split: str, commit: str) -> Iterable[Row]:
        """The rows of a data set's split."""


class PublicHub:
    """The Hugging Face hub through its own clients."""

    def commit(self, repository: str, kind: str, revision: str) -> str:
        from huggingface_hub import HfApi

        try:
            return str(
                HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=30).sha
            )
        except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
            raise _unreachable(f"{kind} {repository}@{revision}", error) from error

    def model(self, repository: str, commit: str) -> Path:
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(repository, revision=commit, allow_patterns=[*FETCHED_FILES])
            )
        except Exception as error:
            raise _unreachable(f"model {repository}@{commit}", error) from error

    def texts(self, source: str, split: str) -> Iterable[str]:
        return read_corpus(source, split)

    def rows(self, repository: str, config: str | None, split: str, commit: str) -> Iterable[Row]:
        yield from hub_rows(repository, config, split, commit)


class _Once:
    """A hub whose branches do not move during a pull: every commit is resolved once."""

    def __init__(self, hub: Hub) -> None:
        self.model, self.texts, self.rows = hub.model, hub.texts, hub.rows
        self.commit = functools.cache(hub.commit)


@dataclass
class Bundle:
    """bundle.json: models by hub id, files by their content ("text <source at a commit> <split>", "task <task> <split>")."""

    folder: Path
    sweep: str = ""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Bundle | None:
        """The bundle in a folder; None where it is a plain data folder. Raises DataError for a damaged index."""
        path = folder / INDEX
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise DataError(
                    f"{path}: format {content['format']} is not the {FORMAT} that this version reads; pull it again"
                )
            return cls(folder, content["sweep"], content["models"], content["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not readable as a bundle: {error}; pull it again") from error

    def write(self) -> None:
        """Written under another name and renamed: a killed pull leaves the index of the files completed before."""
        content = {
            "format": FORMAT,
            "sweep": self.sweep,
            "models": self.models,
            "files": self.files,
        }
        aside = self.folder / f"{INDEX}.part"
        aside.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(aside, self.folder / INDEX)

    def text(self, source: str, split: str) -> tuple[Path, str] | None:
        """(folder, source at its commit) of a text of the hub; None if the bundle lacks it.

        A source that names no commit is the one here. Raises DataError where there are several, or the file was changed since.
        """
        asked = hub_text(source)
        found = {}
        for name, entry in self.files.items():
            kind, _, rest = name.partition(" ")
            pulled, _, pulled_split = rest.rpartition(" ")
            if kind == "text" and pulled_split == split:
                here = hub_text(pulled)
                if asked == here or (not asked.is_pinned and asked.unpinned == here.unpinned):
                    found[pulled] = entry
        if len(found) > 1:
            raise DataError(
                f"{self.folder} has {source} at several commits ({', '.join(found)}); name one in the source"
            )
        for pulled, entry in found.items():
            self._check_unchanged(f"text {pulled} {split}")
            return (self.folder / entry["path"]).parent, pulled
        return None

    def task(self, name: str, splits: Iterable[str]) -> str | None:
        """The commit at which a benchmark's splits were pulled; None for splits that were added by hand.

        Raises DataError where a file was changed since, or splits are of several commits.
        """
        entries = {split: self.files.get(f"task {name} {split}") for split in splits}
        pulled = {split: entry for split, entry in entries.items() if entry is not None}
        for split in pulled:
            self._check_unchanged(f"task {name} {split}")
        commits = {str(entry["commit"]) for entry in pulled.values()}
        if pulled and (len(commits) > 1 or len(pulled) < len(entries)):
            raise DataError(
                f"{self.folder}: the splits {', '.join(entries)} of {name} were not pulled together; pull them again"
            )
        return commits.pop() if commits else None

    def _check_unchanged(self, name: str) -> None:
        path, entry = self.folder / self.files[name]["path"], self.files[name]
        if not path.is_file() or file_digest(path) != entry["sha256"]:
            raise DataError(
                f"{name}: {path} is {'not what was pulled' if path.is_file() else 'missing'}; pull it again"
            )

    def model(self, source: str) -> tuple[Path, str] | None:
        """(folder, commit) of a model of the hub; None if the bundle lacks it."""
        entry = self.models.get(source)
        return None if entry is None else (self.folder / entry["path"], str(entry["commit"]))


def pull(sweep: Sweep, folder: Path, hub: Hub | None = None) -> Iterator[str]:
    """Download what a sweep reads from the hub, one line per item; the index is written after every item."""
    hub = _Once(hub or PublicHub())
    folder.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.open(folder) or Bundle(folder)
    bundle.sweep = sweep.name
    for source, revision in _models(sweep):
        yield _pull_model(bundle, hub, source, revision)
        bundle.write()
    for source, split in _texts(sweep):
        yield _pull_text(bundle, hub, source, split)
        bundle.write()
    for task, revisions in _tasks(sweep):
        yield from _pull_task(bundle, hub, task, revisions)
        bundle.write()
    bundle.write()


def verify(folder: Path) -> list[str]:
    """The files of a bundle that are missing or changed since they were pulled; empty if there are none."""
    bundle = Bundle.open(folder)
    if bundle is None:
        raise DataError(
            f"{folder} holds no {INDEX}: not a bundle; make one with `harness data pull SWEEP --output {folder}`"
        )
    problems = []
    for name, entry in bundle.files.items():
        path = folder / entry["path"]
        if not path.is_file():
            problems.append(f"{name}: {path} is missing")
        elif file_digest(path) != entry["sha256"]:
            problems.append(f"{name}: {path} is not what was pulled")
    for name, entry in bundle.models.items():
        for file, digest in entry["files"].items():
            path = folder / entry["path"] / file
            if not path.is_file():
                problems.append(f"model {name}: {path} is missing")
            elif file_digest(path) != digest:
                problems.append(f"model {name}: {path} is not what was pulled")
    return problems


# --- what a sweep reads ----------------------------------------------------------------------------------------------------------


def _models(sweep: Sweep) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    used = dict.fromkeys(cell.model for cell in sweep.cells)
    bases = dict.fromkeys(base for model in used if (base := base_of(model)) is not None)
    # the model itself last: it may state a revision where the base of another has none
    for model in (each for each in [*bases, *used] if is_hub_id(each.source)):
        found[model.source] = (
            model.digest if COMMIT.fullmatch(model.digest) else model.revision or "main"
        )
    return list(found.items())


def _texts(sweep: Sweep) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for cell in sweep.cells:
        if cell.calibration is not None:
            found.setdefault((cell.calibration.source, cell.calibration.split))
        for evaluation in cell.evaluations:
            settings = dict(evaluation.settings)
            if isinstance(settings.get("source"), str):
                found.setdefault((settings["source"], str(settings.get("split", "test"))))
    return [(source, split) for source, split in found if source.startswith("hub:")]


def _tasks(sweep: Sweep) -> list[tuple[TaskFile, Mapping[str, str]]]:
    """Benchmarks, each with the commits of its data sets."""
    found: dict[str, tuple[TaskFile, Mapping[str, str]]] = {}
    for evaluation in {e.name: e for cell in sweep.cells for e in cell.evaluations}.values():
        settings = dict(evaluation.settings)
        if isinstance(settings.get("task"), str):
            for task in members(settings["task"], settings.get("include") or ""):
                found.setdefault(task.name, (task, dict(settings.get("revisions") or ())))
    return list(found.values())


# --- downloads --------------------------------------------------------------------------------------------------------------------


def _pull_model(bundle: Bundle, hub: Hub, source: str, revision: str) -> str:
    commit = revision if COMMIT.fullmatch(revision) else hub.commit(source, "model", revision)
    place = Path("models") / source.replace("/", "--")
    known = bundle.models.get(source)
    if (
        known is not None
        and known["commit"] == commit
        and all((bundle.folder / place / name).is_file() for name in known["files"])
    ):
        return f"model {source}@{commit[:12]}: here already"
    origin = hub.model(source, commit)
    target = bundle.folder / place
    target.mkdir(parents=True, exist_ok=True)
    names = sorted(
        {path.name for pattern in FETCHED_FILES for path in origin.glob(pattern) if path.is_file()}
    )
    for name in names:
        shutil.copyfile(origin / name, target / f"{name}.part")
        os.replace(target / f"{name}.part", target / name)
    digests = {name: file_digest(target / name) for name in names}
    bundle.models[source] = {"commit": commit, "path": place.as_posix(), "files": digests}
    return f"model {source}@{commit[:12]}: {len(names)} files"


def _pull_text(bundle: Bundle, hub: Hub, source: str, split: str) -> str:
    parts = hub_text(source)
    commit = (
        str(parts.revision)
        if parts.is_pinned
        else hub.commit(parts.repo, "dataset", parts.revision or "main")
    )
    pinned = dataclasses.replace(parts, revision=commit).source
    name = f"text {pinned} {split}"
    if _is_here(bundle, name):
        return f"{name}: here already"
    slug = re.sub(r"[^\w.-]+", "-", pinned.removeprefix("hub:"))
    rows = ({"text": text} for text in hub.texts(pinned, split))
    return _keep(bundle, name, Path("text") / slug / f"{split}.jsonl.gz", rows, commit)


def _pull_task(
    bundle: Bundle, hub: Hub, task: TaskFile, revisions: Mapping[str, str]
) -> Iterator[str]:
    """The splits that a task's YAML names."""
    if task.data_set is None:
        if not task.config.get("custom_dataset"):
            yield f"task {task.name}: has no public data set; put its items into {bundle.folder}/tasks/{task.name}/<split>.jsonl"
        return
    config = task.config.get("dataset_name")
    revision = task.revision or revisions.get(task.data_set) or "main"
    commit = (
        revision if COMMIT.fullmatch(revision) else hub.commit(task.data_set, "dataset", revision)
    )
    for split in sorted({str(task.config[key]) for key in SPLITS if task.config.get(key)}):
        name = f"task {task.name} {split}"
        if _is_here(bundle, name) and bundle.files[name]["commit"] == commit:
            yield f"{name}: here already"
            continue
        rows = hub.rows(task.data_set, None if config is None else str(config), split, commit)
        yield _keep(bundle, name, Path("tasks") / task.name / f"{split}.jsonl", rows, commit)


def _keep(bundle: Bundle, name: str, place: Path, rows: Iterable[Row], commit: str) -> str:
    """Write rows with their hashes, and enter them in the index."""
    path = bundle.folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, hashes = path.with_name(f"{path.name}.part"), []
    with _writer(aside, compressed=path.suffix == ".gz") as file:
        for row in rows:
            line = json.dumps(dict(row), ensure_ascii=False, sort_keys=True, default=str).encode()
            hashes.append(hashlib.sha256(line).hexdigest())
            file.write(line + b"\n")
    os.replace(aside, path)
    path.with_name(f"{path.name}.rows").write_text("".join(f"{each}\n" for each in hashes))
    entry = {
        "path": place.as_posix(),
        "rows": len(hashes),
        "commit": commit,
        "sha256": file_digest(path),
    }
    bundle.files[name] = entry
    return f"{name}: {len(hashes)} rows"


@contextmanager
def _writer(path: Path, compressed: bool) -> Iterator[IO[bytes]]:
    """A file for bytes; compressed without a time stamp, so that the same rows give the same file."""
    with path.open("wb") as file:
        if compressed:
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                yield typing.cast(IO[bytes], packed)
        else:
            yield file


def _is_here(bundle: Bundle, name: str) -> bool:
    entry = bundle.files.get(name)
    path = None if entry is None else bundle.folder / entry["path"]
    return path is not None and path.is_file() and file_digest(path) == bundle.files[name]["sha256"]


def _unreachable(what: str, error: Exception) -> DataError:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return DataError(f"{what}: the hub did not give it: {reason}. What was pulled before is kept.")
