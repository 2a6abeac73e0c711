"""Tables as Markdown, CSV and data frames: the same bytes each time, at full precision where numbers are read by programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import re

import pytest
from synthetic_sweep import TABLE
from table_sweeps import records

from harness.core.errors import ConfigError
from harness.core.sweep import Column, Sweep
from harness.reporting.published import load_published
from harness.reporting.render import frame, render
from harness.reporting.table_data import TableData
from harness.reporting.tables import build
from harness.storage.store import Store


def test_the_same_records_give_the_same_bytes(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, data = made
    again = build(sweep, TABLE, reversed(records(sweep, store)), store)
    for format in ("md", "latex", "csv", "html"):
        assert render(data, format) == render(again, format)


def test_markdown_is_aligned(made: tuple[Sweep, Store, TableData]) -> None:
    lines = [line for line in render(made[2]).splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(m.start() for m in re.finditer(r"\|", line)) for line in lines}) == 1


def test_csv_has_full_precision(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, data = made
    rows = list(csv.DictReader(io.StringIO(render(data, "csv"))))
    by_key = {row["cell_key"]: row for row in rows if row["cell_key"]}
    for record in records(sweep, store):
        value = record.metrics().get("wikitext2/perplexity")
        assert by_key[record.cell_key]["WikiText2"] == ("" if value is None else repr(value))
    assert {row["model"] for row in rows} == {"llama3_8b"}


def test_frame_holds_numbers(made: tuple[Sweep, Store, TableData]) -> None:
    table = frame(made[2])
    assert table["WikiText2"].dtype == float and "Holm" in " ".join(table.attrs["notes"])


def test_unknown_names_are_answered_with_the_nearest(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, data = made
    with pytest.raises(ConfigError, match='did you mean "html"'):
        render(data, "htm")
    with pytest.raises(ConfigError, match='did you mean "llama3-empirical-study/table1"'):
        load_published("llama3-empirical-studi/table1")
    wrong = dataclasses.replace(
        TABLE, columns=(Column("wikitext2/perplexity", published="wikitext"),)
    )
    with pytest.raises(ConfigError, match='did you mean "wikitext2"'):
        build(sweep, wrong, records(sweep, store))
