"""Plugins by file name: methods, evaluators and model families are found in their folders, never registered.

The name in a config is the name of a file; the class in it has the name of the slot. What a plan, a key or a list needs to know
of a plugin (`version`, `needs`, …) are literals in the class body, read here from the source without importing it, so that
tables and completion stay instant. HARNESS_PLUGINS=/path adds a folder of one's own, with methods/, evaluators/, models/ in it.
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

from harness.core.errors import ConfigError, unknown_name
from harness.core.package import PACKAGE

FOLDERS = {  # folder of a person's own plugins -> where the package has its own
    "methods": PACKAGE / "quantization" / "methods",
    "models": PACKAGE / "quantization" / "models",
    "evaluators": PACKAGE / "evaluation" / "evaluators",
}
KINDS = {  # kind -> (folder, class)
    "transform": ("methods", "Transform"),
    "rounding": ("methods", "Rounding"),
    "tuning": ("methods", "Tuning"),
    "evaluator": ("evaluators", "Evaluator"),
    "family": ("models", "Family"),
}
NOT_PLUGINS = {"__init__", "protocols"}


@dataclass(frozen=True)
class Facts:
    """What a plugin says of itself. title: first line of its file's docstring; literals: those of the class body, by name."""

    name: str
    kind: str
    path: Path
    title: str
    literals: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any) -> Any:
        return self.literals.get(name, default)


@functools.cache
def find(kind: str) -> Mapping[str, Facts]:
    """All plugins of a kind, by name."""
    folder, class_name = KINDS[kind]
    found: dict[str, Facts] = {}
    for place in _places(folder):
        for path in sorted(place.glob("*.py")):
            if path.stem in NOT_PLUGINS:
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name == class_name:
                    title = (ast.get_docstring(tree) or path.stem).splitlines()[0]
                    found[path.stem] = Facts(path.stem, kind, path, title, _literals(node))
    return found


def facts(kind: str, name: str, where: str = "") -> Facts:
    """The facts of one plugin. Raises ConfigError with the nearest name when there is none."""
    known = find(kind)
    if name not in known:
        raise ConfigError(unknown_name(kind, name, known, where))
    return known[name]


def load(kind: str, name: str) -> type[Any]:
    """The plugin's class; imports its file."""
    return getattr(_module(facts(kind, name).path), KINDS[kind][1])


def build(kind: str, name: str, settings: Mapping[str, Any]) -> Any:
    """An instance of the plugin with its typed settings. Raises ConfigError for an unknown or impossible setting."""
    plugin = load(kind, name)
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


def _places(folder: str) -> list[Path]:
    extra = os.environ.get("HARNESS_PLUGINS", "")
    return [FOLDERS[folder], *(Path(entry) / folder for entry in extra.split(os.pathsep) if entry)]


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
def _module(path: Path) -> ModuleType:
    if path.is_relative_to(PACKAGE):
        relative = path.relative_to(PACKAGE).with_suffix("")
        return importlib.import_module(".".join(("harness", *relative.parts)))
    name = f"harness_plugins.{path.parent.name}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
