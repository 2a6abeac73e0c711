"""Published numbers: read as they were printed, matched to cells."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from harness.core.cell import (
    ActivationScheme,
    Cell,
    Method,
    Model,
    Part,
    Scheme,
    WeightScheme,
    cell_key,
)
from harness.core.errors import ConfigError
from harness.reporting.published import Printed, load_published, match

PUBLISHED = sorted((Path(__file__).parents[2] / "sweeps" / "published").glob("*/*.yaml"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_published_files_are_whole(path: Path) -> None:
    published = load_published(f"{path.parent.name}/{path.stem}")
    assert (
        published.path.samefile(path)
        and published.rows
        and published.arxiv
        and path.stem in (f"table{published.table}", published.table.lower())  # or a README
    )
    assert all(row.values.keys() <= published.columns and row.method for row in published.rows)


def test_published_numbers_keep_their_text(tmp_path: Path) -> None:
    published = load_published("llama3-empirical-study/table1")
    row = next(
        row
        for row in published.rows
        if row.method == "RTN" and row.weight_bits == 2 and row.group_size == 128
    )
    assert row.values["wikitext2"].text == "1.9e+3" and row.values["wikitext2"] == 1900.0
    folder, sweep = tmp_path / "published" / "study", tmp_path / "sweep.yaml"
    folder.mkdir(parents=True)
    (folder / "table1.yaml").write_text("paper: p\nrows: []\n")
    with pytest.raises(ConfigError, match=r'"arxiv" is missing(.|\n)*"columns" is missing'):
        load_published("study/table1", sweep)
    (folder / "table1.yaml").write_text(
        'paper: p\narxiv: "1"\nversion: v1\ntable: 1\nmodel: m\ncolumns: [{name: ppl}]\n'
        "rows:\n  - {method: RTN, values: {pppl: 1}}\n"
    )
    with pytest.raises(
        ConfigError, match=r'"w_bits" is missing(.|\n)*no column "pppl"; did you mean "ppl"'
    ):
        load_published("study/table1", sweep)


def test_rows_are_matched_by_model_method_and_scheme() -> None:
    published = load_published("llama3-70b-per-channel/table1")
    model = Model("llama3_70b", "meta-llama/Meta-Llama-3-70B", digest="x")
    per_channel = Scheme("w8", WeightScheme(bits=8))
    rtn = Cell(model, Method("rtn", rounding=Part("rtn")), per_channel)
    smooth = Scheme("w8a8", WeightScheme(bits=8), ActivationScheme(bits=8))
    bi_smoothing = Cell(model, Method("bi_smoothing", transform=Part("bi_smoothing")), smooth)
    other = dataclasses.replace(rtn, model=Model("llama2_7b", "meta-llama/Llama-2-7b-hf"))
    matches, ambiguous = match([rtn, bi_smoothing, other], published)
    assert list(matches) == [cell_key(rtn)] and matches[cell_key(rtn)].label == "LLaMA3-70B, W8A16"
    assert len(ambiguous) == 1 and "3 published rows fit" in ambiguous[0]


@pytest.mark.parametrize(
    ("text", "percent", "rounding"),
    [("0.8166", "81.66", 0.005), ("0.40", "40", 0.5), ("0.4", "40", 5.0)],
)
def test_percent_has_the_digits_of_the_fraction(text: str, percent: str, rounding: float) -> None:
    found = Printed(text).percent
    assert found.text == percent and found.rounding == pytest.approx(rounding)
