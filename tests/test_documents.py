"""Every command that README, the pages of docs/ and the commands' own help show can be typed as it stands.

A command that only looks runs here, in a folder with finished cells; of `plan` and `run`, the plan is made and refuses nothing, or
the sweep is composed where its models must come from the hub. What would change the machine or wait for a person is parsed with its
options.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from synthetic_sweep import fill, make_sweep
from typer.core import TyperGroup
from typer.testing import CliRunner

import harness
from harness.cli import commands
from harness.config.grid import load_sweep
from harness.config.overrides import split_arguments
from harness.core.cell import cell_key
from harness.core.errors import HarnessError
from harness.data.demo import train
from harness.planning.planner import make
from harness.storage.store import Store

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
APP = typer.main.get_command(commands.app)
assert isinstance(APP, TyperGroup)
# placeholders of the pages -> what stands for them here; KEY is a key of a finished cell
PLACEHOLDERS = {
    "SWEEP": "demo",
    "<sweep>": "demo",
    "MODEL": "demo",
    "path/to/folder": "model",
    "path/to/model": "model",
    "text.txt": "text.txt",
    "N": "1",
    "s3://bucket/prefix": "runs",
    "/shared/runs": "runs",
    "/scratch/runs": "runs",
}
LOOKS = ("table", "report", "findings", "status", "show", "list", "gc")
LONG = {"demo_methods", "families_tiny"}  # planned by tests of their own


def commands_of(text: str) -> list[str]:
    """Commands of a page: the lines of its code blocks, and the spans of code with more than a command's name."""
    found, block, rest = [], None, []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            block = line[3:] if block is None else None
        elif block is None:
            rest.append(line)
        elif block in ("", "sh"):
            found.append(line.strip().removeprefix("$ ").partition(" #")[0].strip())
    spans = re.findall(r"`(harness [^`]+)`", "\n".join(rest))
    found += [span.replace("\n", " ") for span in spans if "=" in span or "--" in span]
    return [line for line in found if line.startswith("harness ") and "…" not in line]


def help_commands() -> list[str]:
    texts = [commands.HELP, *(command.help or "" for command in APP.commands.values())]
    data = APP.commands["data"]
    assert isinstance(data, TyperGroup)
    texts += [command.help or "" for command in data.commands.values()]
    return [
        line.strip()
        for text in texts
        for line in text.partition("Examples:")[2].splitlines()
        if line.strip().startswith("harness ")
    ]


SHOWN = list(
    dict.fromkeys(
        [
            *(each for page in PAGES for each in commands_of(page.read_text("utf-8"))),
            *help_commands(),
        ]
    )
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a model, a text and finished cells in runs/, and the key of one of these."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(Path(train.__file__).parent / "model", folder / "model")
    (folder / "text.txt").write_text("A text of one's own has words that follow words. " * 3000)
    sweep = make_sweep(folder)
    fill(sweep)
    key = next(cell_key(cell) for cell in sweep.cells if cell.method.name == "gptq")
    return folder, key[:12]


def words_of(command: str, key: str) -> list[str]:
    """The words behind `harness`, with placeholders replaced."""
    words = []
    for word in shlex.split(command)[1:]:
        name, equals, value = word.partition("=")
        if value == "<folder>":
            value = "model" if name == "model" else str(ROOT.parent / "shared" / "data")
        if word in ("KEY", "<key>", "<cell>", "2ddd94ff"):
            word = key
        elif equals:
            word = f"{name}={PLACEHOLDERS.get(value, value)}"
        words.append(PLACEHOLDERS.get(word, word))
    return words


def test_the_pages_show_commands() -> None:
    assert len(SHOWN) > 50
    assert {each.split()[1] for each in SHOWN} >= set(LOOKS) | {"plan", "run", "export", "ui"}


@pytest.mark.parametrize("command", SHOWN)
def test_a_command_can_be_typed_as_it_stands(
    command: str, workplace: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, key = workplace
    monkeypatch.chdir(folder)
    words = words_of(command, key)
    if words[1:2] == ["local"] and not (ROOT.parent / "shared").is_dir():
        pytest.skip("needs the texts and tasks of ../shared")
    if words[0] not in APP.commands:
        assert words[0].startswith("--"), f"no command {words[0]}"
        return
    parsed = APP.commands[words[0]].make_context(words[0], list(words[1:]), resilient_parsing=False)
    if words[0] in ("plan", "run"):
        plan_or_compose(parsed.params["sweep"], parsed.params["overrides"] or [])
    elif words[0] in LOOKS and "--watch" not in words and (words[0] != "show" or key in words):
        more = ["--dry-run"] if words[0] == "gc" and "--dry-run" not in words else []
        result = CliRunner().invoke(commands.app, [*words, *more])
        if isinstance(result.exception, HarnessError):
            raise result.exception
        assert result.exit_code == 0, result.output


def plan_or_compose(sweep: str | None, overrides: list[str]) -> None:
    loaded = load_sweep(*split_arguments(sweep, [*overrides, "tracking=none", "cluster=local"]))
    sources = {cell.model.source.partition(":")[0] for cell in loaded.cells}
    if loaded.name in LONG or not all(s in ("demo", "tiny") or Path(s).is_dir() for s in sources):
        assert loaded.cells
        return
    made = make(loaded, Store(loaded.runtime.runs))
    reasons = [reason for each in made.refused for reason in each.reasons]
    assert not reasons and not made.problems, [*reasons, *made.problems]


SITE = (ROOT / "mkdocs.yml").read_text("utf-8")


def test_the_site_shows_every_page_once() -> None:
    listed = re.findall(r"^ +- .*?: ([\w-]+\.md)$", SITE, re.MULTILINE)
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == pages, f"mkdocs.yml and docs/ differ in {set(listed) ^ pages}"


def test_the_reference_names_what_there_is() -> None:
    """Each object of the page exists, and the page has all functions of the Python API."""
    names = re.findall(
        r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE
    )
    for name in names:
        try:
            assert importlib.import_module(name).__doc__
        except ModuleNotFoundError:
            module, _, member = name.rpartition(".")
            assert getattr(importlib.import_module(module), member).__doc__, name
    api = harness.__all__[1 : harness.__all__.index(next(iter(harness.FOR_PLUGINS.values()))[0])]
    assert {f"harness.{name}" for name in api} <= set(names)


def test_what_builds_the_site_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line
    }
    wanted = {
        re.split(r"[\[<>=]", each)[0].lower() for each in project["optional-dependencies"]["docs"]
    }
    assert wanted and wanted <= pins


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: make docs")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ShownTable" in (tmp_path / "reference.html").read_text("utf-8")
