"""Where and with what a number was made: commit, versions, machine, device, threads, command. Part of records, never of keys.

Loads without torch: versions are read from the installed packages' metadata.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness

PACKAGES = (
    "quantization-harness", "torch", "transformers", "tokenizers", "safetensors", "numpy", "ray", "lm-eval", "datasets", "mlflow",
    "hydra-core", "compressed-tensors",
)


def collect(device: str, threads: int, command: str) -> dict[str, Any]:
    """The facts of this process. device: "cpu", or a card by name; threads: of one torch operation on the CPU."""
    return {
        "commit": git_state(),
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
    """Installed versions of the packages that touch numbers; what is not installed is left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_state() -> str:
    """The checkout's commit; with "+" and a digest of the uncommitted changes, if there are any. "" for an installed package."""
    folder = Path(harness.__file__).parent
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return ""
    changes = _git(folder, "diff", "HEAD", "--", ".")
    return commit + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:12]}" if changes else "")


def command_line() -> str:
    """What was typed, as far as a process can know, without the user and password of an address: it goes into records."""
    program = "harness" if Path(sys.argv[0]).stem in ("harness", "__main__") else Path(sys.argv[0]).name
    return re.sub(r"(://)[^/\s]+@", r"\1", " ".join((program, *sys.argv[1:])))


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
