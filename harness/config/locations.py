"""Where configurations lie: the conf/ folders by precedence, sweeps/, and the names that exist in them."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from harness.config.axes import GROUPS, SLOTS
from harness.core import plugins
from harness.core.errors import ConfigError, unknown_name
from harness.core.package import project_folder


@dataclass(frozen=True)
class Entry:
    """A name that can be used in a sweep, with one line about it."""

    name: str
    title: str


def list_names(group: str) -> list[Entry]:
    """What exists of a group ("models", "methods", …, "sweeps", "evaluators"), sorted by name; the first of two equal names counts.

    Instant: reads the first comment line of each file, and for a method without one the title of its rounding's file.
    """
    if group == "evaluators":
        return [Entry(fact.name, fact.title) for fact in plugins.find("evaluator").values()]
    if group != "sweeps" and group not in GROUPS and group not in GROUPS.values():
        raise ConfigError(unknown_name("group", group, [*GROUPS, "evaluators", "sweeps"]))
    folder = GROUPS.get(group, group)
    return [
        Entry(name, _title(path, folder)) for name, path in sorted(config_files(folder).items())
    ]


def config_roots() -> list[Path]:
    """conf/ folders by precedence: the working directory's, HARNESS_CONF, those beside plugins of one's own, the project's."""
    named = [Path(entry) for entry in os.environ.get("HARNESS_CONF", "").split(os.pathsep) if entry]
    own = [
        Path(entry) / "conf"
        for entry in os.environ.get("HARNESS_PLUGINS", "").split(os.pathsep)
        if entry
    ]
    candidates = [Path.cwd() / "conf", *named, *own, project_folder() / "conf"]
    return list(dict.fromkeys(path.resolve() for path in candidates if path.is_dir()))


def config_files(folder: str) -> dict[str, Path]:
    """name -> YAML of a group, or of the sweeps; the first root that has a name wins."""
    if folder == "sweeps":
        places = [Path.cwd() / "sweeps", project_folder() / "sweeps"]
    else:
        places = [root / folder for root in config_roots()]
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def _title(path: Path, folder: str) -> str:
    comment = head_comment(path.read_text(encoding="utf-8", errors="replace"))
    if comment:
        return comment[0]
    part = (
        plugins.find(folder).get(path.stem)
        if folder in plugins.KINDS
        else plugins.find("rounding").get(path.stem)
    )
    return part.title if part is not None and folder in ("method", *SLOTS) else ""


def head_comment(text: str) -> list[str]:
    """The comment lines at the head of a YAML file, without their #."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return [line.lstrip("#").strip() for line in lines]
