"""docs/adding.md is true: its files are written as they stand there, and its commands run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import wheels

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding.md"
FILES = dict(
    re.findall(
        r"```(?:python|yaml|toml)\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
)
COMMANDS = [
    c.strip()
    for c in re.findall(
        r"```\n(HARNESS_PLUGINS=mine .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the files of the page."""
    folder = tmp_path_factory.mktemp("adding")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def harness(folder: Path, command: str, *more: str, **environment: str) -> str:
    """What a command prints; the assignments before it and the keywords are its environment. Fails where it fails."""
    words = shlex.split(command)
    environment = {**os.environ, **environment}
    while "=" in words[0]:
        variable, value = words.pop(0).split("=")
        environment[variable] = str(folder / value)
    result = subprocess.run(
        [sys.executable, "-m", "harness", *words[1:], *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,  # a guard against hanging, not a measure
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_a_plugin_of_the_page_imports_from_one_place(name: str) -> None:
    allowed = {"harness", "torch", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        assert not [m for m in modules if m != "harness" and m.startswith("harness")], name
        assert not [m for m in modules if m.split(".")[0] not in allowed], name


def test_the_page_has_its_examples() -> None:
    files = {
        "mine/methods/power_of_two.py",
        "mine/models/starcoder2.py",
        "mine/evaluators/entropy.py",
        "sweeps/mine.yaml",
    }
    assert files <= set(FILES)
    assert len(RUNS) >= 3


RUNS = [c for c in COMMANDS if " run " in c]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "workers"), [(command, 1 if number else 2) for number, command in enumerate(RUNS)]
)
def test_a_command_of_the_page_runs(workplace: Path, command: str, workers: int) -> None:
    """The first in processes of its own for tasks, which must find the files too."""
    printed = harness(
        workplace, command, "cluster=local", f"cluster.workers={workers}", "tracking=none"
    )
    assert "3 of 3 cells" in printed  # the two of the grid and the baseline


@pytest.mark.slow
def test_the_table_of_the_page(workplace: Path) -> None:
    (command,) = (c for c in COMMANDS if " table " in c)
    harness(
        workplace,
        command.replace(" table ", " run "),
        "cluster=local",
        "cluster.workers=1",
        "tracking=none",
    )
    rows = [line for line in harness(workplace, command).splitlines() if "power_of_two" in line]
    assert len(rows) == 2 and not any("—" in row for row in rows)


def test_a_scheme_that_the_method_refuses(workplace: Path) -> None:
    with pytest.raises(AssertionError, match="powers of two are for symmetric schemes"):
        harness(
            workplace,
            "HARNESS_PLUGINS=mine harness plan model=demo method=power_of_two scheme=w4g32 evaluations=demo",
        )


def test_without_its_family_the_architecture_of_the_page_takes_no_transform(
    workplace: Path,
) -> None:
    with pytest.raises(
        AssertionError, match='family "generic" states no place where a scale can be folded'
    ):
        harness(
            workplace,
            "HARNESS_PLUGINS=nothing harness plan model=tiny:starcoder2 method=awq scheme=w4g32 calibration=demo",
        )


@pytest.fixture(scope="module")
def site_packages(workplace: Path) -> Path:
    """A folder into which the package of the page is installed, built as a wheel from the page's files."""
    package = workplace / "package"
    home = package / "shifts"
    (home / "conf").mkdir(parents=True)
    (home / "__init__.py").write_text("raise ImportError('facts are read without importing')\n")
    (home / "power_of_two.py").write_text(FILES["mine/methods/power_of_two.py"])
    for group in ("rounding", "method"):
        (home / "conf" / group).mkdir()
        yaml = FILES[f"mine/conf/{group}/power_of_two.yaml"]
        (home / "conf" / group / "power_of_two.yaml").write_text(yaml)
    return wheels.installed(package, workplace / "installed")


@pytest.mark.slow
def test_the_package_of_the_page(site_packages: Path) -> None:
    """Its facts are read without importing it; then a cell is made with it."""
    path = os.pathsep.join((str(site_packages), str(PAGE.parents[1])))
    away = site_packages.parent / "away"
    away.mkdir()
    listed = harness(away, "harness list methods", PYTHONPATH=path)
    assert "power_of_two" in listed and "powers of two" in listed
    grid = "model=demo method=power_of_two scheme=w4g32sym evaluations=demo_perplexity"
    local = ("cluster=local", "cluster.workers=1", "tracking=none")
    (site_packages / "shifts" / "__init__.py").write_text("")
    assert "2 of 2 cells" in harness(away, f"harness run {grid}", *local, PYTHONPATH=path)
