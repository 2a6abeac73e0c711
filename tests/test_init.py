"""The package's face for notebooks: plan, run and table as DataFrames, and an import that costs nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import harness
from harness.core.errors import ConfigError, PlanError

GRID = (
    "model=demo",
    "method=rtn",
    "scheme=w4",
    "evaluations=demo_perplexity",
    "evaluations.limit=2",
)


def local(tmp_path: Path) -> tuple[str, ...]:
    return (
        f"runs={tmp_path / 'runs'}",
        "tracking=none",
        "device=cpu",
        "cluster=local",
        "cluster.workers=1",
    )


def test_plan_run_plan(tmp_path: Path) -> None:
    before = harness.plan(*GRID, *local(tmp_path))
    assert list(before["state"]) == ["quantize"] * 2 and before.attrs["text"].startswith(
        "plan    2 cells"
    )
    records = harness.run(*GRID, *local(tmp_path))
    assert list(records["state"]) == ["done"] * 2
    assert (records["demo_perplexity/perplexity"] > 1).all() and (
        records["checkpoint/bits_per_weight"] > 4
    ).all()
    assert records.attrs["summary"].startswith("done    2 of 2")
    assert list(harness.plan(*GRID, *local(tmp_path))["state"]) == ["done"] * 2


def test_table(tmp_path: Path) -> None:
    frame = harness.table("demo", *local(tmp_path))
    assert (
        len(frame) == len(harness.plan("demo", *local(tmp_path))) and "perplexity" in frame.columns
    )
    with pytest.raises(ConfigError, match="did you mean"):
        harness.table("demo", *local(tmp_path), name="dmeo")


def test_refusals_are_exceptions_of_run_and_rows_of_plan(tmp_path: Path) -> None:
    grid = ("model=demo", "method=rtn", "scheme=w4g96", *local(tmp_path))
    assert "group size 96" in harness.plan(*grid).set_index("scheme")["reasons"]["w4g96"]
    with pytest.raises(PlanError, match="group size 96"):
        harness.run(*grid)


def test_the_public_names() -> None:
    assert harness.__all__[:4] == ["__version__", "plan", "run", "table"]
    assert all(callable(getattr(harness, name)) for name in ("plan", "run", "table"))
    assert len(set(harness.__all__)) == len(harness.__all__) and set(harness.__all__) <= set(
        dir(harness)
    )
    with pytest.raises(AttributeError, match="has no attribute 'Evidense'"):
        harness.Evidense  # noqa: B018


@pytest.mark.parametrize("module", list(harness.FOR_PLUGINS))
def test_names_for_plugins_are_those_of_their_modules(module: str) -> None:
    home = importlib.import_module(module)
    for name in harness.FOR_PLUGINS[module]:
        assert getattr(harness, name) is getattr(home, name)


def test_type_checkers_and_users_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING and the table FOR_PLUGINS agree."""
    tree = ast.parse(Path(harness.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    typed: dict[str, set[str]] = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            typed.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
    assert typed == {module: set(names) for module, names in harness.FOR_PLUGINS.items()}


def test_importing_takes_no_time() -> None:
    heavy = ("torch", "ray", "mlflow", "pandas", "hydra", "psutil")
    code = f"import sys, harness; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
