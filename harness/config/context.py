"""What every step of reading a sweep shares: its file, its overrides, the problems found, values read once."""

from __future__ import annotations

from typing import TypeVar

from harness.config.locations import config_roots
from harness.config.yaml_files import read_yaml
from harness.core.errors import ConfigError
from harness.data import hub

T = TypeVar("T")


def data_set_commits() -> dict[str, str]:
    """Data set -> commit, from data_sets.yaml of every conf/ root. Raises ConfigError for what is no commit."""
    found: dict[str, str] = {}
    for path in (root / "data_sets.yaml" for root in config_roots()):
        for name, commit in (read_yaml(path) if path.is_file() else {}).items():
            if not isinstance(commit, str) or not hub.COMMIT.fullmatch(commit):
                raise ConfigError(
                    f"{path}: {name}: a commit of 40 hexadecimal digits is expected, not {commit!r}"
                )
            found.setdefault(name, commit)
    return found
