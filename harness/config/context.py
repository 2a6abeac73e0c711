"""What every step of reading a sweep shares: its file, its overrides, the problems found, and the values read once."""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from harness.config.locations import config_roots
from harness.config.overrides import Edits
from harness.config.sweep_file import SweepFile
from harness.config.typed import Problems, typed
from harness.config.yaml_files import compose, read_yaml
from harness.core.errors import ConfigError
from harness.core.sweep import Runtime
from harness.data import hub, texts
from harness.data.bundle import Bundle

Fields = Sequence[tuple[str, Any, bool]]  # of an axis: (field, value, whether it has several)

T = TypeVar("T")


@dataclass
class Context:
    """One sweep while it is read.

    problems          all errors found so far; they are raised together at the end
    values            results of `once`, by key; None where reading failed
    composed_files    YAML files of conf/ as composed, by (group, name)
    used_settings     dotted settings of overrides and axes ("rounding.damping_fraction") that some part of the sweep has
    evaluation_names  names of all requested evaluations and suites, those that could not be read included
    runtime, bundle   where the sweep runs and, if `data.root` is a bundle, its index; None until they are read
    """

    file: SweepFile
    edits: Edits
    problems: Problems
    values: dict[Any, Any] = field(default_factory=dict)
    composed_files: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    used_settings: set[str] = field(default_factory=set)
    evaluation_names: set[str] = field(default_factory=set)
    runtime: Runtime | None = None
    bundle: Bundle | None = None

    @property
    def base(self) -> Path | None:
        """The folder of the sweep file, against which its relative paths are read; None without a file."""
        return self.file.path.parent if self.file.path is not None else None


def data_set_commits() -> dict[str, str]:
    """Data set -> commit, from data_sets.yaml of every conf/ root. Raises ConfigError for a value that is not a commit."""
    found: dict[str, str] = {}
    for path in (root / "data_sets.yaml" for root in config_roots()):
        for name, commit in (read_yaml(path) if path.is_file() else {}).items():
            if not isinstance(commit, str) or not hub.COMMIT.fullmatch(commit):
                raise ConfigError(
                    f"{path}: {name}: a commit of 40 hexadecimal digits is expected, not {commit!r}"
                )
            found.setdefault(name, commit)
    return found


def once(context: Context, key: Any, make: Callable[[], T]) -> T | None:
    """The result of make(), which is called once per key; None if it failed (its errors are then among the problems)."""
    if key not in context.values:
        context.values[key] = None
        with context.problems.collect():
            context.values[key] = make()
    return typing.cast(T | None, context.values[key])


def composed(context: Context, group: str, name: str, where: str = "") -> dict[str, Any]:
    """A YAML file of conf/ as `compose` returns it; each file is composed once, and the caller gets a copy to edit."""
    if (group, name) not in context.composed_files:
        context.composed_files[group, name] = compose(group, name, where)
    return copy.deepcopy(context.composed_files[group, name])


def checked_name(context: Context, axis: str, value: Any) -> str:
    """The name that an axis has as its value. Raises ConfigError for any other value."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{context.file.where}: {axis}: a name is expected, not {value!r}")
    return value


def localise(context: Context, target: dict[str, Any], content: dict[str, Any]) -> None:
    """Removes `local` from a YAML's content and, if data.root is set, copies its values to `target`; "{root}" means data.root.

    Texts of the hub are left alone if data.root is a bundle: `text_of` finds them through the bundle's index.
    """
    local = content.pop("local", None) or {}
    if context.runtime is None or context.runtime.data_root is None:
        return
    if context.bundle is not None and str(target.get("source")).startswith("hub:"):
        return
    root = str(context.runtime.data_root)
    target.update(
        {
            key: value.replace("{root}", root) if isinstance(value, str) else value
            for key, value in local.items()
        }
    )


def text_of(context: Context, source: str, split: str) -> tuple[str, str]:
    """(place, digest) of a text. A text of the hub is read at a pinned commit, or from the bundle; both have the same digest."""
    if not source.startswith("hub:"):
        is_named = source in (texts.DEMO, texts.RANDOM_ASCII, texts.RANDOM_TOKENS)
        place = source if is_named else str(texts.resolve_path(source, context.base))
        return place, texts.corpus_digest(place, split)
    pinned = texts.pin(source, pinned_commits(context), ask=context.bundle is None)
    if context.bundle is None:
        return pinned, texts.corpus_digest(pinned, split)
    found = context.bundle.text(pinned, split)
    if found is None:
        raise ConfigError(
            f"{context.bundle.folder} has no text {pinned}, split {split}: it was pulled for another sweep; "
            f"run `harness data pull` for this one with --output {context.bundle.folder}"
        )
    return str(found[0]), texts.corpus_digest(found[1], split)


def pinned_commits(context: Context) -> Mapping[str, str]:
    """Data set -> commit, read from data_sets.yaml; the first conf/ folder that names a data set wins."""
    return once(context, "pins", data_set_commits) or {}


def checked(kind: type[T], content: dict[str, Any], where: str) -> T:
    """`typed`, raising ConfigError with every problem of the mapping."""
    problems = Problems()
    value = typed(kind, content, where, problems)
    if value is None:
        raise ConfigError("\n".join(problems.found))
    return value


def refuse_keys(content: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """Raises ConfigError if a mapping sets one of the keys that only the harness sets."""
    for key in keys:
        if key in content:
            raise ConfigError(f"{where}: {key} cannot be set")


def varied(fields: Fields) -> list[tuple[str, Any]]:
    """The edited fields in which cells of one sweep differ: they are shown beside the name."""
    return [(key, value) for key, value, several in fields if several]
