"""Plugins by file name: methods, evaluators and model families are found in their folders, never registered.

The name in a config is the name of a file; the class in it has the name of the slot. What a plan, a key or a list needs to know
of a plugin (`version`, `needs`, …) are literals in the class body, read here from the source without importing it, so that
tables and completion stay instant. HARNESS_PLUGINS=/path adds a folder of your own, with methods/, evaluators/, models/ in it;
installed packages add plugins by entry points (entry_points.py).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.core import entry_points
from harness.core.errors import ConfigError, unknown_name
from harness.core.package import PACKAGE

FOLDERS = {  # folder of a person's own plugins -> where the package has its own
    "methods": PACKAGE / "quantization" / "methods",
    "models": PACKAGE / "quantization" / "models",
    "evaluators": PACKAGE / "evaluation" / "evaluators",
}
KINDS = {  # kind -> (folder, class)
    "reduction": ("methods", "Reduction"),
    "transform": ("methods", "Transform"),
    "rounding": ("methods", "Rounding"),
    "tuning": ("methods", "Tuning"),
    "evaluator": ("evaluators", "Evaluator"),
    "family": ("models", "Family"),
}
NOT_PLUGINS = {"__init__", "protocols"}


@dataclass(frozen=True)
class Facts:
    """What a plugin declares. title: first line of its file's docstring; literals: those of the class body, by name.

    module: the name under which its file is imported; "" for a file in a folder of the user's own.
    """

    name: str
    kind: str
    path: Path
    title: str
    literals: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""

    def get(self, name: str, default: Any) -> Any:
        return self.literals.get(name, default)


@functools.cache
def find(kind: str) -> Mapping[str, Facts]:
    """All plugins of a kind, by name: the harness's own, those of installed packages, those in HARNESS_PLUGINS (which win).

    Raises ConfigError where an installed package has a plugin of a name that the harness itself has.
    """
    folder = KINDS[kind][0]
    found: dict[str, Facts] = {}
    for path in _files(FOLDERS[folder]):
        found.update(_read(kind, path, _own_module(path)))
    for plugin in entry_points.installed(folder):
        added = _read(kind, plugin.path, plugin.module)
        if added.keys() & found.keys():
            raise ConfigError(
                f"{plugin.declared}: the harness has a {kind} of this name; uninstall the package or ask its authors to rename it"
            )
        found.update(added)
    for place in _own_folders():
        for path in _files(place / folder):
            found.update(_read(kind, path, ""))
    return found


def conf_folders() -> tuple[list[Path], list[Path]]:
    """The conf/ folders beside plugins: those in HARNESS_PLUGINS, and those of installed packages."""
    return [place / "conf" for place in _own_folders()], entry_points.conf_folders(FOLDERS)


def facts(kind: str, name: str, where: str = "") -> Facts:
    """The facts of one plugin. Raises ConfigError with the nearest name when there is none."""
    known = find(kind)
    if name not in known:
        raise ConfigError(unknown_name(kind, name, known, where))
    return known[name]


def load(kind: str, name: str) -> type[Any]:
    """The plugin's class; imports its file."""
    found = facts(kind, name)
    return getattr(_module(found.path, found.module), KINDS[kind][1])


def build(kind: str, name: str, settings: Mapping[str, Any]) -> Any:
    """An instance of the plugin with its typed settings. Raises ConfigError for an unknown or impossible setting.

    `base_version`, which a part around another one holds for its keys alone, is left out.
    """
    plugin = load(kind, name)
    if getattr(plugin, "wraps", False):
        settings = {key: value for key, value in settings.items() if key != "base_version"}
    known = [f.name for f in dataclasses.fields(plugin.Settings)]
    problems = [
        unknown_name("setting", key, known, f"{kind}/{name}")
        for key in settings
        if key not in known
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return plugin(plugin.Settings(**settings))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind}/{name}: {error}") from error


def _own_folders() -> list[Path]:
    named = os.environ.get("HARNESS_PLUGINS", "")
    return [Path(entry) for entry in named.split(os.pathsep) if entry]


def _files(place: Path) -> list[Path]:
    return [path for path in sorted(place.glob("*.py")) if path.stem not in NOT_PLUGINS]


def _own_module(path: Path) -> str:
    return ".".join(("harness", *path.relative_to(PACKAGE).with_suffix("").parts))


def _read(kind: str, path: Path, module: str) -> dict[str, Facts]:
    """The facts of a file's plugin of this kind, by name; empty where the file has none."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    title = (ast.get_docstring(tree) or path.stem).splitlines()[0]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == KINDS[kind][1]:
            return {path.stem: Facts(path.stem, kind, path, title, _literals(node), module)}
    return {}


def _literals(node: ast.ClassDef) -> dict[str, Any]:
    literals: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        else:
            continue
        if isinstance(target, ast.Name):
            try:
                literals[target.id] = ast.literal_eval(value)
            except ValueError:
                continue  # computed, not a fact
    return literals


@functools.cache
def _module(path: Path, module: str) -> ModuleType:
    if module:
        return importlib.import_module(module)
    name = f"harness_plugins.{path.parent.name}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded
