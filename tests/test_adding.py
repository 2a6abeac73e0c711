"""docs/adding.md is true: its files are written as they stand there, and its commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding.md"
FILES = dict(
    re.findall(
        r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
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


def harness(folder: Path, command: str, *more: str) -> str:
    words = shlex.split(command)
    variable, value = words[0].split("=")
    environment = {**os.environ, variable: str(folder / value)}
    result = subprocess.run(
        [sys.executable, "-m", "harness", *words[2:], *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


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


@pytest.mark.parametrize(
    ("command", "workers"), [(command, 1 if number else 2) for number, command in enumerate(RUNS)]
)
def test_a_command_of_the_page_runs(workplace: Path, command: str, workers: int) -> None:
    """The first in processes of its own for tasks, which must find the files too."""
    printed = harness(
        workplace, command, "cluster=local", f"cluster.workers={workers}", "tracking=none"
    )
    assert "3 of 3 cells" in printed  # the two of the grid and the baseline


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
