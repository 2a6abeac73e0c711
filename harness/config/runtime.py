"""Where and how a sweep runs: conf/config.yaml with the keys of a sweep file and of overrides applied."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from harness.config.context import Context
from harness.config.locations import config_files, config_roots, unknown_config
from harness.config.typed import Problems, set_nested, typed
from harness.config.yaml_files import compose_with_hydra
from harness.core.errors import unknown_name
from harness.core.sweep import Runtime
from harness.core.units import bytes_of
from harness.data import texts
from harness.storage.places import place_of

AD_HOC_EXPERIMENT = "grid"  # grids without a file share an experiment; each has a run of its own


def read_runtime(context: Context) -> Runtime | None:
    """Where and how the sweep runs, from conf/config.yaml, its file and its overrides; None if something is wrong."""
    given = {**context.file.runtime, **context.edits.runtime}
    problems = Problems()
    choices = []
    for group in ("cluster", "tracking"):
        name = given.pop(group, None)
        if isinstance(name, str) and name not in config_files(group):
            problems.add(unknown_config(group, name, context.file.where))
        elif isinstance(name, str):
            choices.append(f"{group}={name}")
        elif name is not None:
            problems.add(f"{context.file.where}: {group}: a name is expected, not {name!r}")
    runtime = None
    if not problems.found:
        with problems.collect():
            runtime = _make_runtime(context, choices, given, problems)
    for problem in problems.found:
        context.problems.add(problem)
    return runtime


def _make_runtime(
    context: Context, choices: list[str], given: Mapping[str, Any], problems: Problems
) -> Runtime | None:
    root = next(root for root in config_roots() if (root / "config.yaml").is_file())
    content = compose_with_hydra(root, "config", choices)
    from_file = {key for key in context.file.runtime if key not in context.edits.runtime}
    for key, value in given.items():
        set_nested(content, key, value)
    data = content.pop("data", None) or {}
    unknown = [key for key in data if key != "root"]
    for key in unknown:
        problems.add(unknown_name("key", f"data.{key}", ["data.root"], context.file.where))
    content["data_root"] = data.get("root")
    place = content.get("runs")  # a URL must not become a path on the way
    runtime = typed(
        Runtime, content, context.file.where if given else str(root / "config.yaml"), problems
    )
    if runtime is None:
        return None
    if runtime.device != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", runtime.device):
        problems.add(
            unknown_name(
                "device",
                runtime.device,
                ("auto", "cpu", "cuda", "cuda:<number>"),
                context.file.where,
            )
        )
    data_root = None
    if runtime.data_root is not None:
        data_root = texts.resolve_path(
            str(runtime.data_root), context.base if "data.root" in from_file else None
        )
        if not data_root.is_dir():
            problems.add(f"{context.file.where}: data.root: {data_root} is not a folder")
    if runtime.store.quota:
        with problems.collect():
            bytes_of(runtime.store.quota, f"{context.file.where}: store.quota")
    if context.file.path is None and not runtime.tracking.experiment:
        tracking = dataclasses.replace(runtime.tracking, experiment=AD_HOC_EXPERIMENT)
        runtime = dataclasses.replace(runtime, tracking=tracking)
    return dataclasses.replace(runtime, runs=place_of(str(place)), data_root=data_root)
