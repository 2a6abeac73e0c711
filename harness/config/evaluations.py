"""The evaluations of a sweep: suites expanded, settings checked, data identified."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from harness.core.cell import Evaluation, digest
from harness.core.errors import ConfigError
from harness.core.package import PACKAGE
from harness.data import digests, task_files, texts
from harness.data.bundle import Bundle
from harness.data.task_files import TaskFile


def parts_of(evaluation: Evaluation) -> frozenset[str]:
    """Names of the groups and tasks that a benchmark consists of, its own among them; empty where it is one task."""
    if evaluation.evaluator != "lm_eval_tasks":
        return frozenset()
    settings = dict(evaluation.settings)
    groups = task_files.groups(settings["task"], settings.get("include") or "")
    return frozenset(groups).union(*groups.values())


def evaluation_entry(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """An item of `evaluations`: a name, or {name: {setting: value}}."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, settings),) = entry.items()
        if isinstance(settings, dict):
            return str(name), settings
    raise ConfigError(
        f"{where}: evaluations: a name or {{name: {{setting: value}}}} is expected, not {entry!r}"
    )


def task_digest(
    members: Sequence[TaskFile], settings: Mapping[str, Any], bundle: Bundle | None = None
) -> str:
    """Identity of a benchmark: its task files and its data, of the hub by commit (a bundle's copy too), other files by content."""
    include, data_root = settings.get("include") or "", settings.get("data_root")
    identity: list[Any] = []
    for member in members:
        local = task_files.local_data(member, data_root)
        pulled = None
        if bundle is not None and local is not None and local.folder.is_relative_to(bundle.folder):
            pulled = bundle.task(member.name, local.splits)
        if local is not None and pulled is None:
            data: Any = {split: digests.file_digest(path) for split, path in local.splits.items()}
        elif member.config.get("custom_dataset"):
            data = (
                texts.corpus_digest(texts.DEMO, "test")
                if include == texts.DEMO
                else member.config["custom_dataset"]
            )
        else:
            commit = pulled or (settings.get("revisions") or {}).get(member.data_set)
            data = [member.data_set, commit or member.revision]
        stock = task_files.is_stock(
            member
        )  # its wording is versioned; that of one's own files is not
        recipe = member.config.get("metadata", {}).get("version") if stock else _wording(member)
        identity.append([member.name, recipe, data])
        if not stock and not member.path.is_relative_to(PACKAGE):  # ours: the evaluator's version
            identity[-1] += [
                [path.name, digests.file_digest(path)] for path in task_files.code(member)
            ]
    return digest(identity)


def _wording(task: TaskFile) -> Any:
    """A task's YAML as JSON values. A function of the harness counts by its name; the module that it lies in may move."""
    return json.loads(
        re.sub(
            r'"!function harness\.[\w.]*\.(\w+)"',
            r'"!function \1"',
            json.dumps(task.config, default=str),
        )
    )
