"""The wheel of the harness: complete, and able to run the demo away from the checkout; and one version, one set of pins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import wheels
import yaml

import harness

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("harness", "conf", "sweeps")
BUILT_FROM = (*SOURCES, "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness installed from its wheel, which is built from a copy of the sources as in docker/Dockerfile.cpu."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    return wheels.installed(source, folder)


@pytest.mark.slow
def test_the_wheel_holds_every_file(site_packages: Path) -> None:
    """Code, conf/, sweeps/, task files with their functions, the demo model, py.typed."""
    expected = files(ROOT / "harness")
    for name in ("conf", "sweeps"):
        expected |= {f"{name}/{path}" for path in files(ROOT / name)}
    found = files(site_packages / "harness")
    assert expected - found == set() and found - expected == set()
    assert {"py.typed", "data/demo/model/model.safetensors", "conf/config.yaml"} <= found


@pytest.mark.slow
def test_the_demo_runs_away_from_the_checkout(site_packages: Path, tmp_path: Path) -> None:
    words = ["rounding=rtn", "scheme=w4", "evaluations.limit=5"]
    words += ["cluster=local", "cluster.workers=1", "tracking=none"]

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "harness", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site_packages)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    code = "import harness; print(harness.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site_packages)},
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site_packages)
    assert run("--version") == f"harness {harness.__version__}\n"
    assert "llama3_8b_ptq" in run("list", "sweeps")
    assert "2 of 2 cells" in run("run", "demo", *words)
    assert "| rtn " in run("table", "demo", *words)


def test_the_version_is_written_once() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "harness.__version__"
    released = re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert released[0] == harness.__version__


def test_hooks_have_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    wanted = re.findall(r"^ruff==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for repository in hooks["repos"]:
        for hook in repository["hooks"]:
            assert hook["additional_dependencies"] == wanted, hook["id"]
