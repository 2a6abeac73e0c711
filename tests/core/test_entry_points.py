"""Entry points of installed packages: files are found without imports, and every wrong one is named with its package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.core import entry_points, plugins
from harness.core.errors import ConfigError

METHOD = '"""A rounding."""\n\n\nclass Rounding:\n    version = 7\n'


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """install("shifts", "harness.methods", "mine = shifts.mine") -> site-packages with a package as pip leaves it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(package: str, group: str, *declared: str) -> Path:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join((f"[{group}]", *declared)) + "\n")
        (tmp_path / package / "deep").mkdir(parents=True)
        for folder in (tmp_path / package, tmp_path / package / "deep"):
            (folder / "__init__.py").write_text("raise ImportError\n")
            (folder / "mine.py").write_text(METHOD)
        forget()
        return tmp_path

    yield make
    forget()


def forget() -> None:
    entry_points.installed.cache_clear()
    plugins.find.cache_clear()


def test_a_file_is_read_without_importing_its_package(install: Callable[..., Path]) -> None:
    site = install("shifts", "harness.methods", "mine = shifts.deep.mine")
    (site / "shifts" / "conf").mkdir()
    found = plugins.find("rounding")["mine"]
    assert found.path == site / "shifts" / "deep" / "mine.py"
    assert found.module == "shifts.deep.mine" and found.get("version", 0) == 7
    assert plugins.conf_folders()[1] == [site / "shifts" / "conf"]
    assert "mine" not in plugins.find("tuning")


def test_a_folder_of_ones_own_comes_before_an_installed_package(
    install: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("shifts", "harness.methods", "mine = shifts.mine")
    own = tmp_path / "own" / "methods" / "mine.py"
    own.parent.mkdir(parents=True)
    own.write_text(METHOD)
    monkeypatch.setenv("HARNESS_PLUGINS", str(tmp_path / "own"))
    plugins.find.cache_clear()
    assert plugins.find("rounding")["mine"].path == own


def test_every_wrong_entry_point_is_named(install: Callable[..., Path]) -> None:
    install("shifts", "harness.methods", "gone = shifts.gone", "other = shifts.mine")
    with pytest.raises(ConfigError) as caught:
        plugins.find("rounding")
    lines = str(caught.value).splitlines()
    assert "gone of harness.methods in shifts" in lines[0] and "no module shifts.gone" in lines[0]
    assert "other of harness.methods" in lines[1] and 'mine = "shifts.mine"' in lines[1]


def test_a_name_exists_once(install: Callable[..., Path]) -> None:
    site = install("shifts", "harness.methods", "mine = shifts.mine", "gptq = shifts.gptq")
    (site / "shifts" / "gptq.py").write_text(METHOD)
    forget()
    with pytest.raises(ConfigError, match=r"gptq of harness\.methods in shifts: the harness has a"):
        plugins.find("rounding")
    install("copies", "harness.methods", "mine = copies.mine")
    with pytest.raises(ConfigError, match=r"mine of harness\.methods in copies has the same name"):
        entry_points.installed("methods")
