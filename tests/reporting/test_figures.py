"""Figures: the right points, no diverged ones, the same bytes each time."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_sweep import LLAMA, cells, fill, make_sweep

from harness.core.cell import Model, Scheme, cell_key
from harness.core.labels import with_variants
from harness.reporting.figures import (
    accuracy_against_perplexity,
    bits_needed,
    figures,
    front,
    points,
    score_against_bits,
    score_against_size,
)
from harness.storage.record import Record


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
        "wikitext2-perplexity-bits-needed",
        "arc_easy-acc-bits-needed",
        "accuracy-against-wikitext2-perplexity",
        "layer-errors",
    ]
    assert figures(sweep, []) == {}
    other = [
        dataclasses.replace(
            record, cell=dataclasses.replace(record.cell, model=Model("demo", "demo"))
        )
        for record in records
    ]
    assert "wikitext2-perplexity-against-bits-demo" in figures(sweep, [*records, *other])


def test_diverged_cells_stay_out_of_the_lines(records: list[Record]) -> None:
    figure = score_against_bits(records, "wikitext2/perplexity")
    assert figure is not None
    lines = {
        container.get_label(): container.lines[0].get_xdata()
        for container in figure.axes[0].containers
    }
    assert list(lines["rtn"]) == [3.25, 4.25, 8.25] and list(lines["gptq"]) == [
        2.25,
        3.25,
        4.25,
        8.25,
    ]
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == ["rtn", "gptq", "awq", "BF16"]  # the W4A8 cell has no score


def test_names_and_units_are_those_of_the_table(records: list[Record], tmp_path: Path) -> None:
    titles = {"rtn": "RTN", "gptq": "GPTQ", "awq": "AWQ"}
    sweep = dataclasses.replace(make_sweep(tmp_path), method_titles=titles)
    drawn = figures(sweep, records)
    axes = drawn["arc_easy-acc-against-bits"].axes[0]
    assert axes.get_ylabel() == "ARC-easy accuracy, %, higher is better"
    assert axes.get_xlabel() == "bits/weight as stored"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*titles.values(), "BF16"]
    accuracy = records[0].metrics()["arc_easy/acc"]
    assert axes.get_lines()[-1].get_ydata()[0] == pytest.approx(100 * accuracy)
    assert (
        drawn["wikitext2-perplexity-against-bits"]
        .axes[0]
        .get_ylabel()
        .startswith("WikiText2 perplexity, low")
    )
    shown = [text.get_text() for text in drawn["layer-errors"].axes[0].get_yticklabels()]
    assert shown and all(text.startswith(("RTN", "GPTQ", "AWQ")) for text in shown)


def test_a_method_has_a_hue_and_a_group_a_marker(records: list[Record]) -> None:
    other = [
        dataclasses.replace(
            record,
            cell=(
                cell := dataclasses.replace(
                    record.cell,
                    scheme=Scheme(
                        f"{record.cell.scheme.name}b",
                        dataclasses.replace(record.cell.scheme.weight, group_size=32),
                    ),
                )
            ),
            cell_key=cell_key(cell),
        )
        for record in records
        if not record.cell.method.is_baseline
    ]
    figure = score_against_bits([*records, *other], "arc_easy/acc")
    assert figure is not None
    lines = {each.get_label(): each.lines[0] for each in figure.axes[0].containers}
    looks = {name: (line.get_color(), line.get_marker()) for name, line in lines.items()}
    assert len(set(looks.values())) == len(looks) == 6
    for name, (colour, marker) in looks.items():
        method, group = name.split(" · ")
        for other_name, (hue, mark) in looks.items():
            assert (colour == hue) == (method == other_name.split(" · ")[0])
            assert (marker == mark) == (group == other_name.split(" · ")[1])
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == ["rtn", "gptq", "awq", "g128", "g32", "BF16"]


def test_accuracy_has_intervals(records: list[Record]) -> None:
    figure = score_against_bits(records, "arc_easy/acc")
    assert figure is not None and all(container.has_yerr for container in figure.axes[0].containers)


def test_nothing_beats_the_front(records: list[Record]) -> None:
    scored = points(records, "arc_easy/acc")
    best = front(scored, True)
    assert best
    for point in scored:
        rivals = [each.score for each in best if each.size <= point.size]
        assert point in best or max(rivals) >= point.score


def test_names_on_the_front_do_not_overlap(records: list[Record]) -> None:
    figure = score_against_size(records, "arc_easy/acc")
    assert figure is not None and figure.axes[0].texts
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for drawn in axes.collections:
        for x, y in axes.transData.transform(drawn.get_offsets()):
            assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes)


def test_bits_needed_is_the_smallest_from_which_all_larger_are_near_enough(
    records: list[Record],
) -> None:
    figure = bits_needed(records, "arc_easy/acc")
    assert figure is not None
    axes = figure.axes[0]
    shown = dict(
        zip((label.get_text() for label in axes.get_yticklabels()), axes.patches, strict=True)
    )
    accuracy = {
        (r.cell.method.name, r.cell.scheme.weight.bits): r.metrics().get("arc_easy/acc")
        for r in records
    }
    full = records[0].metrics()["arc_easy/acc"]
    for method in ("rtn", "gptq"):
        near = [
            bits
            for bits in (8, 4, 3, 2)
            if (a := accuracy[method, bits]) is not None and a >= full - 0.01
        ]
        expected = next(
            (
                bits
                for bits in (2, 3, 4, 8)
                if all(more in near for more in (2, 3, 4, 8) if more >= bits)
            ),
            None,
        )
        bar = shown[method]
        assert (
            (bar.get_width() == pytest.approx(expected + 0.25))
            if expected
            else bar.get_x() == pytest.approx(8.25)
        )
    assert bits_needed(records[1:], "arc_easy/acc") is None  # nothing to be near to
    assert bits_needed(records, "checkpoint/bytes") is None


def test_accuracy_and_perplexity_stand_with_their_correlation(records: list[Record]) -> None:
    figure = accuracy_against_perplexity(records, "wikitext2/perplexity", ["arc_easy/acc"])
    assert figure is not None
    known = [record.metrics() for record in records]
    known = [
        metrics for metrics in known if math.isfinite(metrics.get("wikitext2/perplexity", math.nan))
    ]
    pairs = [
        (math.log(metrics["wikitext2/perplexity"]), metrics["arc_easy/acc"]) for metrics in known
    ]
    expected = np.corrcoef(np.array(pairs).T)[0, 1]
    assert f"r = {expected:.3f} with log perplexity" in figure.axes[0].texts[0].get_text()
    assert f"{len(pairs)} cells" in figure.axes[0].texts[0].get_text()
    assert (
        accuracy_against_perplexity(records[:2], "wikitext2/perplexity", ["arc_easy/acc"]) is None
    )


def test_seeds_are_one_point_with_their_interval(records: list[Record]) -> None:
    gptq = next(record for record in records if record.cell.method.name == "gptq")
    assert gptq.cell.calibration is not None
    draws = [dataclasses.replace(gptq.cell.calibration, seed=seed) for seed in (0, 1, 2)]
    seeds = with_variants([dataclasses.replace(gptq.cell, calibration=draw) for draw in draws])
    made = []
    for cell, loss in zip(seeds, (6.0, 6.2, 6.4), strict=True):
        score = {**gptq.scores["wikitext2"], "metrics": {"wikitext2/perplexity": loss}}
        made.append(
            dataclasses.replace(
                gptq, cell=cell, cell_key=cell_key(cell), scores={"wikitext2": score}
            )
        )
    (point,) = points(made, "wikitext2/perplexity")
    assert point.score == pytest.approx(6.2) and point.interval == pytest.approx(
        4.302653 * 0.2 / math.sqrt(3), rel=1e-6
    )
    # the seed tells nothing apart any more
    assert point.label == "gptq" and len(point.records) == 3
    assert (
        points([*made[:2], dataclasses.replace(made[2], scores={})], "wikitext2/perplexity") == []
    )


def test_no_cells_no_figure() -> None:
    bare = [Record(cell, "q", "c") for cell in cells(LLAMA)]
    assert score_against_bits(bare, "wikitext2/perplexity") is None


def test_plots_load_without_matplotlib() -> None:
    program = (
        "import sys, harness.reporting.figures, harness.reporting.gallery\n"
        "heavy = {'torch', 'matplotlib', 'pandas'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
