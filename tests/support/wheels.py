"""Wheels that tests build and install into a folder, without an index and without a new environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def installed(source: Path, folder: Path) -> Path:
    """Build the wheel of a source folder and install it into folder/site-packages; returns that folder."""
    _pip("wheel", "--no-build-isolation", "--wheel-dir", folder / "wheels", source)
    (wheel,) = (folder / "wheels").glob("*.whl")
    _pip("install", "--target", folder / "site-packages", wheel)
    return folder / "site-packages"


def _pip(command: str, *words: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
