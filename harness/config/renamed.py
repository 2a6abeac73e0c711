"""Names and keys that were renamed: the old ones are still read, and one line on the terminal states the new one.

Add an entry here when a file of conf/ or a key of sweep files gets a new name. Keys of results do not hold these names.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from harness.config.locations import config_files

# group of conf/ -> old name -> new name
NAMES: dict[str, dict[str, str]] = {"method": {"keep": "activation_only"}}
# old key of a sweep file or an override -> new key; fields below it follow
KEYS: dict[str, str] = {}


def current_name(group: str, name: Any) -> Any:
    """The name under which conf/<group>/ has what `name` means today; a file of the old name, one's own, comes first."""
    new = NAMES.get(group, {}).get(name) if isinstance(name, str) else None
    if new is None or name in config_files(group):
        return name
    _announce(f'{group} "{name}" is now called "{new}"; the old name is still read')
    return new


def current_names(group: str, wanted: Any) -> Any:
    """`current_name` of one value or of each value of a list."""
    if isinstance(wanted, list):
        return [current_name(group, each) for each in wanted]
    return current_name(group, wanted)


def current_key(key: str) -> str:
    """The key that an old key of a sweep file or an override means today: "old.field" -> "new.field"."""
    head, dot, rest = key.partition(".")
    new = KEYS.get(key) or (KEYS[head] + dot + rest if head in KEYS else None)
    if new is None:
        return key
    _announce(f'key "{key}" is now called "{new}"; the old key is still read')
    return new


@functools.cache
def _announce(line: str) -> None:
    """Prints a line once per process."""
    print(line, file=sys.stderr)
