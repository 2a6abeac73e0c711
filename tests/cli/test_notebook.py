"""What a sweep shows in a notebook: a bar that is updated in place and lines; lines alone in a script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from harness.cli import notebook
from harness.cli.notebook import Bar, Text, api_display, in_notebook
from harness.cli.progress import Lines
from harness.core.cell import cell_key
from harness.core.events import Progress, Quantized
from harness.core.sweep import Sweep
from harness.execution.progress import Tally
from harness.planning.planner import make
from harness.storage.store import Store


class Page:
    """The output of a notebook's cell: what was displayed there, and each update of it."""

    def __init__(self, kernel: object) -> None:
        self.shown: list[str] = []
        self.shell = SimpleNamespace(kernel=kernel)

    def display(self, markup: Any, display_id: bool = False) -> Page:
        self.update(markup)
        return self

    def update(self, markup: Any) -> None:
        self.shown.append(markup._repr_html_())
        assert repr(markup) == ""  # what cannot show HTML shows nothing


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Page:
    """A process that looks like a notebook's kernel."""
    page = Page(object())
    module, parts = ModuleType("IPython"), ModuleType("IPython.display")
    module.get_ipython = lambda: page.shell  # type: ignore[attr-defined]
    parts.display = page.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", parts)
    return page


def test_a_script_and_a_plain_prompt_have_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook() and isinstance(api_display(), Lines)
    module = ModuleType("IPython")
    module.get_ipython = lambda: SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)  # IPython in a terminal has no kernel
    assert not in_notebook()


def test_a_notebook_has_a_bar_that_moves(
    kernel: Page,
    demo_sweep: Callable[..., Sweep],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notebook, "SECONDS", 0.0)
    sweep = demo_sweep(
        "method=rtn", "scheme=w4", "evaluations=demo_perplexity", "evaluations.limit=2"
    )
    tally, display = Tally(make(sweep, Store(sweep.runtime.runs))), api_display()
    assert isinstance(display, Bar)
    key = cell_key(sweep.cells[-1])
    display.line("plan    2 cells")
    record = {"bits_per_weight": 4.25, "seconds": 1.0}
    for event in (Progress(0.0, (key,), "block", 1, 4), Quantized(0.0, (key,), record=record)):
        display.event(event, tally, tally.add(event))
    display.close()
    before, running, made, after = kernel.shown
    assert before == after == ""
    assert "block 1/4" in running and "0 of 2 cells" in running
    assert "block 1/4" not in made and made.count("<progress") == 1
    shares = [float(each.partition('value="')[2].partition('"')[0]) for each in (running, made)]
    assert 0.0 <= shares[0] < shares[1] <= 1.0
    out = capsys.readouterr().out
    assert out.startswith("plan    2 cells\n") and "4.25 bits per weight" in out


def test_a_text_shows_its_lines() -> None:
    text = Text("status  demo\nnow     a cell")
    assert repr(text) == str(text) == "status  demo\nnow     a cell" and isinstance(text, str)
