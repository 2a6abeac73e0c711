"""Figures: the right points, no diverged ones, the same bytes each time."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_sweep import LLAMA, cells, fill, make_sweep

from harness.cell import Model
from harness.plots import SIZE, error_overview, figures, front, layer_errors, save, score_against_bits
from harness.store import Record


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    sweep = make_sweep(tmp_path_factory.mktemp("study"))
    store = fill(sweep)
    return [store.record(cell) for cell in sweep.cells]


def test_figures_of_a_sweep(records: list[Record], tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    assert list(figures(sweep, records)) == [
        "wikitext2-perplexity-against-bits",
        "wikitext2-perplexity-against-size",
        "arc_easy-acc-against-bits",
        "arc_easy-acc-against-size",
        "layer-errors",
    ]
    assert figures(sweep, []) == {}
    other = [dataclasses.replace(record, cell=dataclasses.replace(record.cell, model=Model("demo", "demo"))) for record in records]
    assert "wikitext2-perplexity-against-bits-demo" in figures(sweep, [*records, *other])


def test_diverged_cells_stay_out_of_the_lines(records: list[Record]) -> None:
    figure = score_against_bits(records, "wikitext2/perplexity")
    assert figure is not None
    lines = {container.get_label(): container.lines[0].get_xdata() for container in figure.axes[0].containers}
    assert list(lines["rtn"]) == [3.25, 4.25, 8.25] and list(lines["gptq"]) == [2.25, 3.25, 4.25, 8.25]
    assert "full precision" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_accuracy_has_intervals(records: list[Record]) -> None:
    figure = score_against_bits(records, "arc_easy/acc")
    assert figure is not None and all(container.has_yerr for container in figure.axes[0].containers)


def test_nothing_beats_the_front(records: list[Record]) -> None:
    scored = [record for record in records if "arc_easy/acc" in record.metrics()]
    best = front(scored, "arc_easy/acc", True)
    assert best
    for record in scored:
        rivals = [b.metrics()["arc_easy/acc"] for b in best if b.metrics()[SIZE] <= record.metrics()[SIZE]]
        assert record in best or max(rivals) >= record.metrics()["arc_easy/acc"]


def test_layer_errors(records: list[Record]) -> None:
    gptq = next(record for record in records if record.cell.method.name == "gptq")
    figure = layer_errors(gptq)
    assert figure is not None
    image = figure.axes[0].get_images()[0].get_array()
    assert image is not None and image.shape == (7, 4)
    assert layer_errors(records[0]) is None and error_overview(records[:1]) is None
    assert error_overview(records) is not None


def test_saved_figures_are_the_same_to_the_byte(records: list[Record], tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        figure = score_against_bits(records, "wikitext2/perplexity")
        assert figure is not None
        assert [path.suffix for path in save(figure, folder, "ppl")] == [".svg", ".pdf", ".png"]
    for form in ("svg", "pdf", "png"):
        assert (tmp_path / "a" / f"ppl.{form}").read_bytes() == (tmp_path / "b" / f"ppl.{form}").read_bytes()


def test_no_cells_no_figure() -> None:
    bare = [Record(cell, "q", "c") for cell in cells(LLAMA)]
    assert score_against_bits(bare, "wikitext2/perplexity") is None


def test_plots_load_without_matplotlib() -> None:
    program = "import sys, harness.plots; heavy = {'torch', 'matplotlib', 'pandas'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", program], check=True)
