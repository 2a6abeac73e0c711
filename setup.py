"""Puts conf/ and sweeps/ inside the package when a wheel is built; everything else is said in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """The checkout keeps both folders at its top, where people look for them; an installation has the package alone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("conf", "sweeps"):
                shutil.copytree(
                    Path(__file__).parent / folder,
                    Path(self.build_lib) / "harness" / folder,
                    dirs_exist_ok=True,
                )


setup(cmdclass={"build_py": BuildWithConfigs})
