"""Where configurations are found: the conf/ folders in order of precedence, sweeps/, and the names in them."""

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
    """The entries of a group ("models", "methods", …, "sweeps", "evaluators"), sorted by name; the first of two equal names wins.

    Reads only the first comment line of each file; a method without one has the title of its rounding's source file. Raises
    ConfigError for an unknown group.
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
    """conf/ folders by precedence: the working directory's, HARNESS_CONF, those in HARNESS_PLUGINS, the project's, installed ones.

    Those of installed packages come last: installing a package adds names and never changes what a name means.
    """
    named = [Path(entry) for entry in os.environ.get("HARNESS_CONF", "").split(os.pathsep) if entry]
    own, installed = plugins.conf_folders()
    candidates = [Path.cwd() / "conf", *named, *own, project_folder() / "conf", *installed]
    return list(dict.fromkeys(path.resolve() for path in candidates if path.is_dir()))


def config_files(folder: str) -> dict[str, Path]:
    """Name -> YAML file of a group or of the sweeps; the first conf/ folder that has a name wins."""
    if folder == "sweeps":
        places = [Path.cwd() / "sweeps", project_folder() / "sweeps"]
    else:
        places = [root / folder for root in config_roots()]
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def listing(folder: str) -> str:
    """The command that lists what exists of a group: "harness list schemes"."""
    plural = {single: group for group, single in GROUPS.items()}
    return f"harness list {plural.get(folder, folder)}"


def unknown_config(folder: str, name: str, where: str = "") -> str:
    """One sentence for a name that a group of conf/, or the sweeps, do not have: the nearest ones, and what lists all."""
    kind = "sweep" if folder == "sweeps" else folder
    return unknown_name(kind, name, config_files(folder), where, listing(folder))


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
