"""Copies conf/ and sweeps/ into the package when a wheel is built; pyproject.toml holds everything else."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """A checkout has both folders at its top; an installation consists of the package alone."""

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
