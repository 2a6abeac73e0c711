"""How figures are drawn and saved: legends that fit, fonts that publishers take, the same bytes each time."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
from synthetic_sweep import fill, make_sweep

from harness.reporting.drawing import COLOURS, legend, new_figure, save, style
from harness.reporting.figures import score_against_bits
from harness.storage.record import Record


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    sweep = make_sweep(tmp_path_factory.mktemp("study"))
    store = fill(sweep)
    return [store.record(cell) for cell in sweep.cells]


def test_saved_figures_are_the_same_to_the_byte(records: list[Record], tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        figure = score_against_bits(records, "wikitext2/perplexity")
        assert figure is not None
        assert [path.suffix for path in save(figure, folder, "ppl")] == [".svg", ".pdf", ".png"]
    for form in ("svg", "pdf", "png"):
        assert (tmp_path / "a" / f"ppl.{form}").read_bytes() == (
            tmp_path / "b" / f"ppl.{form}"
        ).read_bytes()


def test_pdf_fonts_are_embedded_as_true_type(records: list[Record], tmp_path: Path) -> None:
    figure = score_against_bits(records, "wikitext2/perplexity")
    assert figure is not None
    (path,) = save(figure, tmp_path, "ppl", ["pdf"])
    content = path.read_bytes()
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, re.DOTALL)
    assert b"/FontFile2" in content and b"/Type3" not in content
    assert any(
        zlib.decompress(each)[:4] == b"\x00\x01\x00\x00" for each in streams if each[:1] == b"x"
    )


@pytest.mark.parametrize("methods", [2, 12, 50])
def test_a_legend_lies_in_its_figure_beside_the_axes(methods: int) -> None:
    figure, axes = new_figure("model")
    hues = {f"a method of some length {index}": index for index in range(methods)}
    axes.plot([0, 1], [0, 1], label="FP16")
    legend(figure, axes, hues, {"g32": 0, "per row": 1}, ())
    figure.draw_without_rendering()
    shown = axes.get_legend()
    names = [text.get_text() for text in shown.get_texts()]
    assert names == [*hues, "g32", "per row", "FP16"]
    box, place = shown.get_window_extent(), axes.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width + 1 and box.y0 >= 0
    assert place.width > 250 and (methods < 8 or box.x0 >= place.x1)


def test_methods_and_groups_are_told_apart() -> None:
    count = 3 * len(COLOURS)
    looks = [style(hue, marker) for hue in range(count) for marker in range(3)]
    assert len({tuple(sorted(each.items())) for each in looks}) == 3 * count
    for hue in range(count):
        assert len({style(hue, marker)["color"] for marker in range(3)}) == 1
