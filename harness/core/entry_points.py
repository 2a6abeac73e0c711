"""Plugins of installed packages, declared as entry points and located without importing them.

A package declares one entry point per plugin file, in the group of its folder:

    [project.entry-points."harness.methods"]
    power_of_two = "shifts.power_of_two"

Its YAML lies in the folder conf/ of its top-level package (here shifts/conf/rounding/power_of_two.yaml, …).
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from harness.core.errors import ConfigError

PREFIX = "harness."  # of the groups: harness.methods, harness.models, harness.evaluators


@dataclass(frozen=True)
class Installed:
    """A plugin of an installed package. name: the file's; root: the folder of its top-level package; declared: for messages."""

    name: str
    module: str
    path: Path
    root: Path
    declared: str


@functools.cache
def installed(folder: str) -> tuple[Installed, ...]:
    """The installed plugins of a folder ("methods", "models", "evaluators"), by name.

    Raises ConfigError with every entry point that names no file, has another name than its file, or repeats a name.
    """
    found: dict[str, Installed] = {}
    problems: list[str] = []
    for entry in sorted(entry_points(group=PREFIX + folder), key=lambda e: (e.name, e.value)):
        declared = _declared(entry)
        located = _locate(entry.module)
        stem = entry.module.rpartition(".")[2]
        if located is None:
            problems.append(
                f"{declared}: there is no module {entry.module}; reinstall the package, or uninstall it"
            )
        elif entry.name != stem:
            problems.append(
                f'{declared}: the name must be that of the file, as in {stem} = "{entry.module}"'
            )
        elif entry.name in found:
            problems.append(
                f"{declared}: {found[entry.name].declared} has the same name; uninstall one of the two packages"
            )
        else:
            found[entry.name] = Installed(entry.name, entry.module, *located, declared)
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(found.values())


def conf_folders(folders: Collection[str]) -> list[Path]:
    """The conf/ folders of the packages with plugins in these folders, in a fixed order, each once."""
    roots = {plugin.root for folder in folders for plugin in installed(folder)}
    return [root / "conf" for root in sorted(roots) if (root / "conf").is_dir()]


def _declared(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an installed package"
    return f"entry point {entry.name} of {entry.group} in {package}"


def _locate(module: str) -> tuple[Path, Path] | None:
    """A module's file and the folder of its top-level package, found without running code of that package."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for depth in range(1, len(rest) + 1):
        name = ".".join((top, *rest[:depth]))
        found = importlib.machinery.PathFinder.find_spec(name, places)
        if found is None:
            return None
        spec, places = found, list(found.submodule_search_locations or ())
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    return path, path.parents[len(rest) - 1] if rest else path.parent
