"""The evaluations of a sweep: suites expanded, settings checked, data identified."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.context import (
    Context,
    checked_name,
    composed,
    localise,
    once,
    pinned_commits,
    refuse_keys,
    text_of,
)
from harness.config.locations import config_files, unknown_config
from harness.config.typed import checked_settings, settings_of, types_of
from harness.core import plugins
from harness.core.cell import Evaluation, digest, freeze
from harness.core.errors import ConfigError, unknown_name
from harness.core.package import PACKAGE
from harness.core.text import file_name, short_list
from harness.data import digests, hub, task_files, texts
from harness.data.bundle import Bundle
from harness.data.task_files import TaskFile

WITHOUT_YAML = "lm_eval:TASK is any task of lm-eval (lm_eval:copa), text:FILE the perplexity of a text (text:notes.txt)."


def by_prefix() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Evaluations that need no YAML: prefix -> (evaluator, the setting that the text behind the colon is, further settings).

    They are stated by the literal `without_yaml` of an evaluator's class: {prefix: (setting, further settings)}.
    """
    return {
        prefix: (name, setting, dict(more))
        for name, facts in plugins.find("evaluator").items()
        for prefix, (setting, more) in facts.get("without_yaml", {}).items()
    }


def parts_of(evaluation: Evaluation) -> frozenset[str]:
    """Names of the groups and tasks of a benchmark, including its own; empty if the benchmark is a single task."""
    if not plugins.facts("evaluator", evaluation.evaluator).get("groups_tasks", False):
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
    """Digest of a benchmark's task files and data: data of the hub counts by commit (also in a bundle), local files by content."""
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
        # its wording is versioned; that of one's own files is not
        stock = task_files.is_stock(member)
        recipe = member.config.get("metadata", {}).get("version") if stock else _wording(member)
        identity.append([member.name, recipe, data])
        if not stock and not member.path.is_relative_to(PACKAGE):  # ours: the evaluator's version
            identity[-1] += [
                [path.name, digests.file_digest(path)] for path in task_files.code(member)
            ]
        if _shows_examples(member, settings, local):
            identity[-1].append("worked examples leave the scored item out")
    return digest(identity)


def _shows_examples(
    task: TaskFile, settings: Mapping[str, Any], local: task_files.LocalData | None
) -> bool:
    """Whether prompts changed when worked examples began to leave the scored item out: scores made before have another digest."""
    own, asked = task.config.get("num_fewshot"), settings.get("num_fewshot")
    if not (asked if asked is not None and own != 0 else own):
        return False
    absent = {} if local is None else task_files.without_absent_splits(task.config, local)
    return task_files.showed_items({**task.config, **absent})


def _wording(task: TaskFile) -> Any:
    """A task's YAML as JSON values; functions of the harness are written without their module, which may move."""
    return json.loads(
        re.sub(
            r'"!function harness\.[\w.]*\.(\w+)"',
            r'"!function \1"',
            json.dumps(task.config, default=str),
        )
    )


def read_evaluations(context: Context) -> tuple[Evaluation, ...]:
    """The evaluations of every cell: the file's or the override's, suites expanded, each name once."""
    entries = (
        context.file.evaluations if context.edits.evaluations is None else context.edits.evaluations
    )
    found: dict[str, Evaluation] = {}
    for entry in [*entries, *context.edits.more_evaluations]:
        with context.problems.collect():
            name, own = evaluation_entry(entry, context.file.where)
            for evaluation in _expand(context, name, own, ()):
                other = found.setdefault(evaluation.name, evaluation)
                if name.partition(":")[0] in by_prefix() and other != evaluation:
                    raise ConfigError(
                        f"{context.file.where}: evaluations: {name} has the name of another one, {other.name}; "
                        "leave one out, or request them in two sweeps"
                    )
    for dotted in context.edits.evaluation_settings:
        if dotted != "limit" and dotted.partition(".")[0] not in found:
            context.problems.add(
                unknown_name(
                    "evaluation",
                    dotted.partition(".")[0],
                    ["limit", *found],
                    "override evaluations",
                )
            )
    with context.problems.collect():
        _check_reported(context, found.values())
    return tuple(found.values())


def _check_reported(context: Context, evaluations: Iterable[Evaluation]) -> None:
    """Adds a problem if two evaluations would report a metric under one name, such as two benchmarks that share a task."""
    reporters: dict[str, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for evaluation in evaluations:
        for name in {
            evaluation.name,
            *parts_of(evaluation) - {dict(evaluation.settings).get("task")},
        }:
            other = reporters.setdefault(name, evaluation.name)
            if other != evaluation.name:
                shared.setdefault((other, evaluation.name), []).append(name)
    for (first, second), names in shared.items():
        listed = short_list(sorted(names), 3)
        context.problems.add(
            f"{context.file.where}: evaluations {first} and {second} both report {listed}; request them in two sweeps"
        )


def _expand(
    context: Context, name: str, own: Mapping[str, Any], parents: tuple[str, ...], asker: str = ""
) -> Iterator[Evaluation]:
    if name in parents:
        raise ConfigError(
            f"evaluation {name}: the suite contains itself: {' > '.join((*parents, name))}"
        )
    direct = _without_yaml(name)
    if direct is not None:
        short, content = direct
        context.evaluation_names.add(short)
        yield _evaluation(context, short, content, own, f"evaluation {name}")
        return
    context.evaluation_names.add(name)
    if name not in config_files("evaluation"):
        asked_by = asker or context.file.where
        raise ConfigError(f"{unknown_config('evaluation', name, asked_by)} {WITHOUT_YAML}")
    content = composed(context, "evaluation", name, asker or context.file.where)
    where = str(config_files("evaluation")[name])
    if "suite" not in content:
        yield _evaluation(context, name, content, own, where)
        return
    refuse_keys(content, tuple(key for key in content if key != "suite"), where)
    members = content["suite"] if isinstance(content["suite"], list) else [content["suite"]]
    for member in members:
        with context.problems.collect():
            yield from _expand(context, *evaluation_entry(member, where), (*parents, name), where)


def _without_yaml(name: str) -> tuple[str, dict[str, Any]] | None:
    """The short name and the content of an evaluation without a YAML: "lm_eval:copa" -> copa, "text:notes.txt" -> notes."""
    prefix, _, rest = name.partition(":")
    known = by_prefix()
    if prefix not in known:
        return None
    if not rest:
        raise ConfigError(f'evaluation "{name}": nothing follows the colon. {WITHOUT_YAML}')
    evaluator, setting, more = known[prefix]
    content: dict[str, Any] = {"evaluator": evaluator, "settings": {setting: rest, **more}}
    if prefix == "text":
        return file_name(Path(rest).name.partition(".")[0] or "text"), content
    return rest, content | {"local": {"data_root": "{root}"}}


def _evaluation(
    context: Context, name: str, content: dict[str, Any], own: Mapping[str, Any], where: str
) -> Evaluation:
    for key in content:
        if key not in ("evaluator", "settings", "limit", "local"):
            raise ConfigError(
                unknown_name(
                    "key", key, ("evaluator", "settings", "limit", "local", "suite"), where
                )
            )
    evaluator = checked_name(context, "evaluator", content.get("evaluator"))
    facts = plugins.facts("evaluator", evaluator, where)
    given = {**(content.get("settings") or {})}
    localise(context, given, content)
    edits = {
        dotted.partition(".")[2]: value
        for dotted, value in context.edits.evaluation_settings.items()
        if dotted.partition(".")[0] == name and "." in dotted
    }
    limit = context.edits.evaluation_settings.get("limit", edits.pop("limit", content.get("limit")))
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ConfigError(
            f"evaluation {name}: limit: a whole number from 1 is expected, not {limit!r}"
        )
    known = settings_of("evaluator", evaluator) or given
    settings = checked_settings(
        known, {**given, **own, **edits}, where, types_of("evaluator", evaluator)
    )
    data = _evaluation_data(context, settings)
    version = facts.get("version", 1)
    task = settings.get("task")
    writes = isinstance(task, str) and task_files.generates(task, settings.get("include") or "")
    generates = bool(facts.get("generates", False)) or writes
    return Evaluation(name, evaluator, freeze(settings), version, data, limit, generates)


def _evaluation_data(context: Context, settings: dict[str, Any]) -> str:
    """Digest of the data that the settings name, "" if they name none; makes paths in the settings absolute, in place."""
    if isinstance(settings.get("source"), str):
        settings["source"], digest = text_of(
            context, settings["source"], str(settings.get("split", "test"))
        )
        return digest
    if isinstance(settings.get("task"), str):
        for place in ("data_root", "include"):
            if settings.get(place) and settings[place] != texts.DEMO:
                settings[place] = str(texts.resolve_path(settings[place], context.base))
        members = task_files.members(settings["task"], settings.get("include") or "")
        _check_data_root(context, members, settings)
        if "revisions" in settings:
            settings["revisions"] = (
                _revisions(context, members, settings["revisions"] or {}, settings.get("data_root"))
                or None
            )
        return task_digest(members, settings, context.bundle)
    return ""


def _check_data_root(
    context: Context, members: Sequence[TaskFile], settings: Mapping[str, Any]
) -> None:
    """Raises ConfigError where data.root was given for a task without public data whose YAML does not use data.root."""
    root = context.runtime.data_root if context.runtime is not None else None
    if root is None or settings.get("data_root") or "data_root" not in settings:
        return
    for member in members:
        files = (member.config.get("dataset_kwargs") or {}).get("data_files")
        if member.config.get("dataset_path") == "json" and not files:
            raise ConfigError(
                f"task {member.name}: data.root={root} was given, but the evaluation's YAML does not use it; "
                'add `local: {data_root: "{root}"}` to that YAML'
            )


def _revisions(
    context: Context, members: Sequence[TaskFile], given: Mapping[str, str], data_root: str | None
) -> dict[str, str]:
    """Data set -> commit for tasks read from the hub: the task's revision, else the given one, else the pin of data_sets.yaml."""
    found = {}
    for member in members:
        if (
            member.data_set is None
            or member.data_set in found
            or task_files.local_data(member, data_root) is not None
        ):
            continue
        revision = (
            member.revision
            or given.get(member.data_set)
            or pinned_commits(context).get(member.data_set)
        )
        commit = once(
            context,
            ("commit", member.data_set, revision),
            functools.partial(hub.hub_commit, member.data_set, "dataset", revision),
        )
        if commit is not None:
            found[member.data_set] = commit
    return found
