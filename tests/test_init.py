"""The package's face for scripts and notebooks: plan, run, tables, status, and an import that costs nothing."""

from __future__ import annotations

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import harness
from harness.cli import notebook
from harness.cli.progress import Lines
from harness.core.errors import ConfigError, PlanError
from harness.core.events import Event
from harness.execution.progress import Tally

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


def test_plan_run_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = harness.plan(*GRID, *local(tmp_path))
    assert list(before["state"]) == ["quantize"] * 2 and before.attrs["text"].startswith(
        "plan    2 cells"
    )
    records = harness.run(*GRID, *local(tmp_path))
    out = capsys.readouterr().out
    assert (
        out.startswith("plan    2 cells") and "\n  ok    demo" in out and "\ndone    2 of 2" in out
    )
    assert list(records["state"]) == ["done"] * 2
    assert (records["demo_perplexity/perplexity"] > 1).all() and (
        records["checkpoint/bits_per_weight"] > 4
    ).all()
    assert records.attrs["summary"].startswith("done    2 of 2")
    assert list(harness.plan(*GRID, *local(tmp_path))["state"]) == ["done"] * 2
    harness.run(*GRID, *local(tmp_path), show=False)
    assert capsys.readouterr().out == ""
    shown = harness.table(*GRID, *local(tmp_path))
    assert "FP16 & 16" in shown.latex() and "RTN & 4" in shown.latex()
    assert shown.figure().axes[0].get_ylabel().startswith("demo_perplexity, lower")
    with pytest.raises(ConfigError, match="demo_perplexity-perplexity-against-bits"):
        shown.figure("demo_perplexity-perplexity-against-bit")
    key = records["key"].iloc[-1]
    assert "2 of 2 cells done" in harness.status(*GRID, *local(tmp_path))
    assert key in repr(harness.show(key[:8], str(tmp_path / "runs")))


def test_table(tmp_path: Path) -> None:
    shown = harness.table("demo", *local(tmp_path))
    assert len(shown) == len(shown.frame) == len(harness.plan("demo", *local(tmp_path)))
    assert "perplexity" in shown.frame.columns
    assert repr(shown) == str(shown) == shown.markdown() and shown.markdown().startswith("**Perpl")
    assert shown._repr_html_().startswith('<div class="harness-table">')
    assert "<html" not in shown._repr_html_() and "<script" not in shown._repr_html_()
    with pytest.raises(ConfigError, match="has no figure yet"):
        shown.figure()
    with pytest.raises(ConfigError, match="did you mean"):
        harness.table("demo", *local(tmp_path), name="dmeo")


def test_findings(tmp_path: Path) -> None:
    frame = harness.findings("demo", *local(tmp_path))
    assert len(frame) == 4 and set(frame["ours"]) == {"cannot tell yet"}
    assert frame["finding"][0] in frame.attrs["text"]
    report = Path(harness.report("demo", *local(tmp_path)))
    assert frame["finding"][0] in report.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="states no findings"):
        harness.findings("families_tiny", *local(tmp_path))


def test_an_interrupt_ends_the_script_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Lines):
        def event(self, event: Event, tally: Tally, finished: Sequence[str]) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(notebook, "Lines", Interrupted)
    with pytest.raises(KeyboardInterrupt, match="resume"):
        harness.run(*GRID, *local(tmp_path))
    out = capsys.readouterr().out
    assert re.search(r"stopped +[01] of 2 cells", out) and "resume  harness run" in out


def test_refusals_are_exceptions_of_run_and_rows_of_plan(tmp_path: Path) -> None:
    grid = ("model=demo", "method=rtn", "scheme=w4g96", *local(tmp_path))
    assert "group size 96" in harness.plan(*grid).set_index("scheme")["reasons"]["w4g96"]
    with pytest.raises(PlanError, match="group size 96"):
        harness.run(*grid)


def test_the_public_names() -> None:
    api = ("findings", "plan", "report", "run", "show", "status", "table")
    assert tuple(harness.__all__[1:8]) == api
    assert all(callable(getattr(harness, name)) for name in api)
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
            names = {alias.name for alias in node.names if alias.asname == alias.name}
            if names:  # `import name as name` is public; without it, it is for annotations alone
                typed.setdefault(node.module or "", set()).update(names)
    assert typed == {module: set(names) for module, names in harness.FOR_PLUGINS.items()}


def test_importing_takes_no_time() -> None:
    heavy = ("torch", "ray", "mlflow", "pandas", "hydra", "psutil")
    code = f"import sys, harness; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_idle_threads_sleep_unless_the_user_says_otherwise(given: str | None) -> None:
    """The package sets the policy before torch, which reads it when it is loaded."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    code = "import harness, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [given or "PASSIVE", "False"]
