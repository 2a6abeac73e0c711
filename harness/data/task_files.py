"""The YAML files of lm-eval tasks, read without importing lm-eval: which file a name means, which splits it reads, and where
a local copy of its data lies. Loads without torch, so that a plan answers at once.

A name is looked up in the folder that the evaluation includes ("demo": the embedded model's tasks), then in `evaluation/tasks/`,
then among the task files that come with lm-eval.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.core.errors import ConfigError, DataError, unknown_name
from harness.core.package import PACKAGE
from harness.data import digests, json_lines

OWN = PACKAGE / "evaluation" / "tasks"
DEMO = Path(__file__).parent / "demo" / "tasks"
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
FUNCTION = re.compile(r"!function ([\w.]+)")
NAME_LINE = re.compile(rb"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)

# Local data under another name than the task's, and tasks per subject whose subjects share one file.
FOLDER_OF_TASK = {
    "truthfulqa_mc1": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
    "truthfulqa_gen": "truthfulqa",
    "bbq_ambig": "bbq",
    "bbq_disambig": "bbq",
    "bbq_generate": "bbq",
    "bbq_bias": "bbq",
    "gsm8k_substring": "gsm8k",
    "snli_yesnomaybe": "snli",
    "snli_yesnomaybe_gen": "snli",
    "xsum_zeroshot": "xsum",
    "cnn_dailymail_zeroshot": "cnn_dailymail",
    "flores_eng_zho": "flores",
    "flores_zho_eng": "flores",
    "humaneval_completion": "humaneval",
}
KIND = "task data"  # of a file, in messages
FOLDER_OF_SUBJECTS = {"cais/mmlu": "mmlu", "ceval/ceval-exam": "ceval"}


@dataclass(frozen=True)
class TaskFile:
    """One task that yields items. config: its YAML with includes merged; functions are strings "!function <name>"."""

    name: str
    path: Path
    config: Mapping[str, Any]

    @property
    def data_set(self) -> str | None:
        """The hub's data set; None where the task brings its data or reads files."""
        path = self.config.get("dataset_path")
        if self.config.get("custom_dataset") or path in (
            None,
            "json",
            "csv",
            "parquet",
            "text",
            "arrow",
        ):
            return None
        return None if Path(str(path)).exists() else str(path)

    @property
    def revision(self) -> str | None:
        """The revision of the data set that the YAML itself states."""
        return (self.config.get("dataset_kwargs") or {}).get("revision")


@dataclass(frozen=True)
class LocalData:
    """Local files that stand in for a task's data set. subject: only the rows of this subject; splits: split -> file."""

    folder: Path
    splits: Mapping[str, Path]
    subject: str | None = None

    def rows(self, split: str, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The items of a split in the file's order, each with these fields.

        Raises DataError naming file and line, or an unknown subject.
        """
        path = self.splits[split]
        rows = []
        for number, row in json_lines.rows(path, KIND):
            absent = [name for name in fields if row.get(name) is None]
            if absent:
                raise DataError(
                    f"{KIND} {path}, line {number}: {', '.join(absent)} missing; every row has {', '.join(fields)}"
                )
            rows.append(row)
        if self.subject is not None:
            subjects = {str(row["subject"]) for row in rows if row.get("subject") is not None}
            rows = [row for row in rows if row.get("subject") == self.subject]
            if not rows:
                raise DataError(unknown_name("subject", self.subject, subjects, str(path)))
        return rows

    def summary(self, split: str) -> tuple[int, int]:
        """(items of a split, how many of them the most frequent one equals). Raises DataError as `rows` does."""
        return json_lines.summary(self.splits[split], self.subject, KIND)


def members(name: str, include: str = "") -> list[TaskFile]:
    """The tasks of a task, group or tag name, in the group's order. Raises ConfigError for a name that no file defines."""
    path = _find(name, include)
    config = read(path)
    if "group" not in config:
        return [TaskFile(name, path, config)]
    return [
        member for child in config.get("task", []) for member in _children(child, path, include)
    ]


def groups(name: str, include: str = "") -> dict[str, list[str]]:
    """Group -> names of all its tasks, for a group and the groups below it; empty for a single task."""
    path = _find(name, include)
    config = read(path)
    if "group" not in config:
        return {}
    found = {name: [member.name for member in members(name, include)]}
    for child in config.get("task", []):
        if isinstance(child, str) and _known(child, include):
            found |= groups(child, include)
    return found


def generates(name: str, include: str = "") -> bool:
    """Whether the model writes text in a task, or in one of a group."""
    return any(
        member.config.get("output_type", "generate_until") == "generate_until"
        for member in members(name, include)
    )


def local_data(task: TaskFile, data_root: str | Path | None) -> LocalData | None:
    """The files below <data_root>/tasks that hold a task's items; None where there are none."""
    if not data_root:
        return None
    folder = data_folder(task, Path(data_root))
    if folder is None:
        return None
    splits = {str(task.config[key]) for key in SPLITS if task.config.get(key)}
    examples = (task.config.get("fewshot_config") or {}).get("split")
    splits |= {str(examples)} if examples else set()
    files = {split: folder / f"{split}.jsonl" for split in sorted(splits)}
    present = {split: file for split, file in files.items() if file.is_file()}
    whole = folder.name != task.name and task.data_set in FOLDER_OF_SUBJECTS
    subject = task.config.get("dataset_name") if whole else None
    return LocalData(folder, present, None if subject is None else str(subject))


def data_folder(task: TaskFile, data_root: Path) -> Path | None:
    """<data_root>/tasks/<task>, or the folder of another name that holds this task's items; None where neither exists."""
    names = [
        task.name,
        FOLDER_OF_TASK.get(task.name, ""),
        FOLDER_OF_SUBJECTS.get(task.data_set or "", ""),
    ]
    folders = [Path(data_root).expanduser() / "tasks" / name for name in names if name]
    return next((folder for folder in folders if folder.is_dir()), None)


def scored_split(config: Mapping[str, Any]) -> str | None:
    """The split whose items are scored: the test split, else the validation split; None where a task names neither."""
    split = config.get("test_split") or config.get("validation_split")
    return None if split is None else str(split)


def examples_split(config: Mapping[str, Any]) -> str | None:
    """The split that worked examples are drawn from; None where the task lists its examples itself, or has no split."""
    own = config.get("fewshot_config") or {}
    split = own.get("split") or config.get("fewshot_split")
    if split is None and own.get("samples"):
        return None
    for key in ("training_split", "validation_split", "test_split"):
        split = split or config.get(key)
    return None if split is None else str(split)


def scored_as_test(config: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in a task's config so that no prompt holds its own item; nothing where examples come from another split."""
    scored = scored_split(config)
    if scored is None or examples_split(config) != scored:
        return {}
    return {"test_split": scored, "fewshot_split": scored}


def without_absent_splits(config: Mapping[str, Any], local: LocalData) -> dict[str, Any]:
    """What to change in a task's config so that it reads no split that has no local file."""
    changes: dict[str, Any] = {
        key: None for key in SPLITS if str(config.get(key)) not in local.splits
    }
    own = config.get("fewshot_config") or {}
    if own.get("split") and str(own["split"]) not in local.splits:
        changes["fewshot_config"] = {**own, "split": None}
    return changes


def showed_items(config: Mapping[str, Any]) -> bool:
    """Whether lm-eval by itself would draw an item's worked examples from the scored split and not leave the item out."""
    named = scored_as_test(config)
    return any(config.get(key) != split for key, split in named.items())


def is_stock(task: TaskFile) -> bool:
    """Whether the task comes with lm-eval, which raises its version when its numbers change."""
    return task.path.is_relative_to(_stock_folder())


def code(task: TaskFile) -> list[Path]:
    """The Python files beside a task's YAML, and beside those that it includes, whose functions it names."""
    named = FUNCTION.findall(json.dumps(task.config, default=str))
    paths = {
        folder / f"{name.rpartition('.')[0].replace('.', '/')}.py"
        for folder in _folders(task.path)
        for name in named
    }
    return sorted(path for path in paths if path.is_file())


def folders(members: Sequence[TaskFile]) -> set[Path]:
    """Where the files of tasks lie, with those that they include."""
    return set[Path]().union(*(_folders(member.path) for member in members))


def _folders(path: Path) -> set[Path]:
    """Where a task's YAML and its includes lie."""
    includes = (_parsed(path.read_bytes()) or {}).get("include", [])
    listed = includes if isinstance(includes, list) else [includes]
    return {path.parent}.union(*(_folders(path.parent / include) for include in listed))


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task's YAML with its includes merged, functions left as strings. Raises DataError for a file that is no task."""
    if path in seen:
        raise DataError(f"task file {path}: includes itself")
    try:
        config = copy.deepcopy(_parsed(path.read_bytes()))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"task file {path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"task file {path}: a mapping is expected")
    merged: dict[str, Any] = {}
    includes = config.pop("include", [])
    for include in includes if isinstance(includes, list) else [includes]:
        merged |= read(path.parent / include, (*seen, path))
    return merged | config


class _TaskLoader(yaml.SafeLoader):
    """YAML whose !function tags stay text: nothing is imported or run."""


_TaskLoader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


@functools.lru_cache(maxsize=8192)
def _parsed(content: bytes) -> Any:
    """One file, parsed once: a sweep over large groups reads thousands of files a dozen times. Do not change the result."""
    return yaml.load(content, Loader=_TaskLoader)


def _children(child: Any, parent: Path, include: str) -> list[TaskFile]:
    if isinstance(child, dict) and "task" in child and isinstance(child["task"], str):
        (task,) = members(child["task"], include)
        return [TaskFile(task.name, task.path, {**task.config, **child})]
    if not isinstance(child, str):
        raise ConfigError(
            f"task group {parent}: a group written inside another is not supported; name its tasks one by one"
        )
    if _known(child, include):
        return members(child, include)
    tagged = []
    for path in sorted(parent.parent.rglob("*.yaml")):
        config = read(path)
        tags = config.get("tag") or []
        if child in ([tags] if isinstance(tags, str) else tags) and isinstance(
            config.get("task"), str
        ):
            tagged.append(TaskFile(config["task"], path, config))
    if not tagged:
        raise ConfigError(f'task group {parent}: no task, group or tag "{child}"')
    return sorted(tagged, key=lambda task: task.name)


def _known(name: str, include: str) -> bool:
    return any(name in index for index in _indices(include))


def _find(name: str, include: str) -> Path:
    indices = _indices(include)
    for index in indices:
        if name in index:
            return Path(index[name])
    names = {known for index in indices for known in index}
    raise ConfigError(
        unknown_name(
            "task", name, difflib.get_close_matches(name, names, n=8) or {*indices[0], *indices[-2]}
        )
    )


def _indices(include: str) -> list[Mapping[str, str]]:
    first = []
    if include:
        folder = DEMO if include == "demo" else Path(include).expanduser()
        if not folder.is_dir():
            raise ConfigError(f'tasks included from "{include}": no such folder')
        first = [_scan(folder)]
    return [*first, _scan(OWN), _stock()]


def _scan(folder: Path) -> dict[str, str]:
    """Name of a task or group -> its file, below a folder."""
    found: dict[str, str] = {}
    for root, _, files in sorted(os.walk(folder)):
        for file in sorted(files):
            if file.endswith(".yaml"):
                path = os.path.join(root, file)
                with open(path, "rb") as content:
                    for name in NAME_LINE.findall(content.read()):
                        found.setdefault(name.decode(), path)
    return found


@functools.cache
def _stock_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ConfigError("lm-eval is not installed: pip install lm-eval")
    return Path(spec.origin).parent / "tasks"


@functools.cache
def _stock() -> dict[str, str]:
    """The index of lm-eval's fourteen thousand files; it takes half a second, so it is cached beside the digests by version."""
    folder = _stock_folder()
    kept = digests.cache_folder() / f"lm_eval_tasks_{importlib.metadata.version('lm_eval')}.json"
    try:
        known = json.loads(kept.read_text())
        if known["folder"] == str(folder):
            return dict(known["tasks"])
    except (OSError, ValueError, KeyError):
        pass  # not made yet, or damaged: made again
    found = _scan(folder)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=kept.parent, suffix=".json", delete=False
        ) as file:
            json.dump({"folder": str(folder), "tasks": found}, file)
        os.replace(file.name, kept)
    except OSError:
        pass  # a read-only home: scanned again next time
    return found
