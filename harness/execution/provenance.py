"""Provenance of a number: commit, versions, machine, device, threads, command. Part of records, never of keys.

Long texts are stored once, not in every record, below runs/provenance/, named by its digest: the uncommitted changes of the code
(<digest>.diff) and the list of installed packages (<digest>.txt), from which `pip install -r` makes the environment again. Loads
without torch: versions are read from the metadata of the installed packages.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness.core.package import PACKAGE
from harness.core.text import without_password
from harness.storage.store import Store

PACKAGES = (
    "quantization-harness",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "ray",
    "lm-eval",
    "datasets",
    "mlflow",
    "hydra-core",
    "compressed-tensors",
)


def collect(device: str, threads: int, command: str, store: Store) -> dict[str, Any]:
    """The facts of this process. device: "cpu", or a card by name; threads: of one torch operation on the CPU."""
    return {
        "commit": git_state(),
        "changes": _stored(store, changes(), "diff"),
        "packages": _stored(store, packages(), "txt"),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": device,
        "threads": threads,
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that touch numbers; packages that are not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def packages() -> str:
    """Every installed distribution, name==version a line, from the names of their metadata folders."""
    folders = {
        found.name
        for place in map(Path, sys.path)
        if place.is_dir()
        for found in place.glob("*.dist-info")
    }
    pairs = sorted(
        name.removesuffix(".dist-info").rsplit("-", 1) for name in folders if "-" in name
    )
    return "".join(f"{name}=={version}\n" for name, version in pairs)


@functools.cache
def git_state() -> str:
    """The checkout's commit; with "+" and a digest of the uncommitted changes, if there are any. "" for an installed package."""
    commit = _git(PACKAGE, "rev-parse", "HEAD")
    return commit + (f"+{_digest(changes())}" if commit and changes() else "")


@functools.cache
def changes() -> str:
    """The package's uncommitted changes as a diff, including untracked files; without passwords of addresses."""
    folder = PACKAGE
    diff = _git(folder, "diff", "HEAD", "--", ".")
    for name in _git(
        folder, "ls-files", "--others", "--exclude-standard", "--", "*.py"
    ).splitlines():
        try:
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        diff += f"\n--- /dev/null\n+++ b/harness/{name}\n@@ -0,0 +1,{len(lines)} @@\n" + "\n".join(
            f"+{line}" for line in lines
        )
    return without_password(diff.strip())


def command_line() -> str:
    """The command line of this process for records, without the user and password of an address."""
    program = (
        "harness" if Path(sys.argv[0]).stem in ("harness", "__main__") else Path(sys.argv[0]).name
    )
    return without_password(" ".join((program, *sys.argv[1:])))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _stored(store: Store, text: str, suffix: str) -> str:
    """The path below runs/ of a text, which is written there unless it exists; "" for no text."""
    if not text:
        return ""
    name = f"provenance/{_digest(text)}.{suffix}"
    if not store.files.exists(store.root / name):
        store.write_file(store.root / name, (text.rstrip("\n") + "\n").encode())
    return name


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
