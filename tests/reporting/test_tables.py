"""Tables: the published number beside ours, gaps with their command, marks that mean what they say."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_sweep import EVALUATIONS, LLAMA, TABLE, cells, make_sweep
from table_sweeps import records, row_of, seeded, verdict_of

from harness.core.cell import (
    Cell,
    Evaluation,
    Method,
    Model,
    Part,
    Scheme,
    WeightScheme,
    cell_key,
    score_key,
)
from harness.core.errors import ConfigError
from harness.core.sweep import Column, Correlation, Sweep, Table
from harness.reporting.render import frame, render
from harness.reporting.table_data import TableData
from harness.reporting.tables import build
from harness.storage.store import Store


def test_ours_published_and_the_difference(made: tuple[Sweep, Store, TableData]) -> None:
    _, _, data = made
    row = row_of(data, "none", "16")
    ours, published, difference = row[4:7]
    assert published == "6.1" and float(difference) == pytest.approx(float(ours) - 6.1, abs=0.011)
    # not in this sweep: their number alone
    assert row_of(data, "QuIP", "4")[3:7] == ("", "", "6.5", "")
    # w8g128 is not in the paper, w8 without groups is
    assert row_of(data, "rtn", "8")[5:7] == ("", "")
    assert row_of(data, "awq", "2")[4:7] == ("—", "1.7e+6", "")


def test_a_number_agrees_with_the_published_one_within_its_rounding_and_our_interval(
    tmp_path: Path,
) -> None:
    baseline, gptq, two = cells(LLAMA, ("gptq",), (3, 2))  # published 6.1, 8.2, 2.1e+2
    asked = [
        (baseline, 6.149, {}, True),
        (baseline, 6.16, {}, False),
        (baseline, 6.16, {"stderr": 0.01}, True),
        (baseline, 6.16, {"smoke": True}, None),
        (gptq, math.inf, {}, False),
        (two, 214.0, {}, True),
        (two, 216.0, {}, False),
    ]
    for number, (cell, ours, more, wanted) in enumerate(asked):
        assert verdict_of(tmp_path / str(number), cell, ours, **more)[0] is wanted, (ours, more)
    rtn = cells(LLAMA, ("rtn",), (2,))[1]
    # published 2.7e+6
    per_channel = dataclasses.replace(rtn, scheme=Scheme("w2", WeightScheme(bits=2)))
    assert verdict_of(tmp_path / "collapsed", per_channel, 2.0e4)[0] is True


def test_best_is_bold_among_equal_bits_only(made: tuple[Sweep, Store, TableData]) -> None:
    _, _, data = made
    for index in (1, 2):
        for bits in (8, 4, 3, 2):
            quantized = [row for row in data.rows if row.cell is not None and not row.baseline]
            group = [row for row in quantized if row.labels[1] == str(bits)]
            values = [r.values[index] for r in group if r.values[index].number is not None]
            finite = [v.number for v in values if v.number is not None and math.isfinite(v.number)]
            target = min(finite) if index == 1 else max(finite)
            for value in values:
                if value.best:
                    assert value.number == pytest.approx(target, abs=0.005)
    assert not any(row.values[0].best for row in data.rows)  # all equal: no best
    assert not data.rows[0].values[1].best


def test_weighted_mean_and_its_gap(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, _ = made
    of = ("arc_easy/acc", "checkpoint/bits_per_weight")
    column = Column("mean", "mix", of=of, weights=(3.0, 1.0), digits=6)
    data = build(sweep, Table("t", columns=(column,)), records(sweep, store))
    metrics = store.record(sweep.cells[0]).metrics()
    assert data.rows[0].values[0].number == pytest.approx((3 * metrics[of[0]] + metrics[of[1]]) / 4)
    assert data.rows[-1].values[0].number is None
    with pytest.raises(ConfigError, match="one weight per metric"):
        build(
            sweep,
            Table("t", columns=(dataclasses.replace(column, weights=(1.0,)),)),
            records(sweep, store),
        )


def test_cells_of_equal_labels_are_told_apart(tmp_path: Path) -> None:
    first = cells(LLAMA, ("gptq",), (4,))[1]
    both = (first, dataclasses.replace(first, inputs="full_precision"))
    sweep = dataclasses.replace(make_sweep(tmp_path), cells=both)
    data = build(sweep, Table("t", columns=TABLE.columns[:1]), [])
    assert data.labels[-1] == "variant"
    assert [row.labels[-1] for row in data.rows] == ["inputs quantized", "inputs full_precision"]


def test_seeds_are_replicates_of_one_row(tmp_path: Path) -> None:
    sweep, store = seeded(tmp_path, {0: 0.050, 1: 0.052, 2: 0.051})
    assert [cell.title.rpartition(" · ")[2] for cell in sweep.cells[1:]] == [
        "seed 0",
        "seed 1",
        "seed 2",
    ]
    data = build(sweep, sweep.tables[0], records(sweep, store), store)
    assert data.labels == ("method", "bits", "group", "seeds") and [
        row.labels[-1] for row in data.rows
    ] == ["1", "3"]
    value = data.rows[1].values[0]
    numbers = [record.metrics()["wikitext2/perplexity"] for record in records(sweep, store)[1:]]
    assert value.number == pytest.approx(sum(numbers) / 3) and value.seeds == 3
    assert value.half_width == pytest.approx(
        4.302653 * np.std(numbers, ddof=1) / math.sqrt(3), rel=1e-6
    )
    assert (
        value.comparison is not None
        and value.comparison.differs
        and "3 seeds" in value.comparison.test
    )
    assert data.rows[1].others == tuple(map(cell_key, sweep.cells[2:]))
    assert f"{value.number:.3f} ± {value.half_width:.3f}" in render(
        data
    ) and "mean over seeds" in render(data)
    assert r"{$\pm$}" not in render(data, "latex") and r"$\pm$" in render(data, "latex")
    assert frame(data)["ppl ±"].iloc[1] == value.half_width


def test_a_mean_over_seeds_waits_for_all_of_them_and_shows_a_diverged_one(tmp_path: Path) -> None:
    sweep, store = seeded(tmp_path / "a", {0: 0.05, 1: 0.05})
    assert (
        build(sweep, sweep.tables[0], records(sweep, store), store).rows[1].values[0].gap
        == "missing"
    )
    sweep, store = seeded(tmp_path / "b", {0: 0.05, 1: 0.05, 2: math.inf})
    assert (
        row_of(build(sweep, sweep.tables[0], records(sweep, store), store), "gptq", "4")[4]
        == "diverged"
    )


def test_seeds_do_not_make_the_items_certain(tmp_path: Path) -> None:
    """Three seeds that agree by chance stand within the interval over items that they share, as one seed does."""
    baseline, first = cells(LLAMA, ("gptq",), (3,))  # published 8.2
    made = tuple(
        dataclasses.replace(
            first,
            seed=seed,
            method=dataclasses.replace(
                first.method,
                rounding=dataclasses.replace(first.method.rounding, stochastic=True)
                if first.method.rounding
                else None,
            ),
        )
        for seed in range(3)
    )
    for cells_ in ((made[0],), made):
        sweep = dataclasses.replace(
            make_sweep(tmp_path / str(len(cells_))), cells=(baseline, *cells_)
        )
        store = Store(sweep.runtime.runs)
        for number, cell in enumerate(cells_):
            score = {
                "metrics": {"wikitext2/perplexity": 8.4 + 1e-4 * number},
                "stderr": {"wikitext2/perplexity": 0.2},
            }
            store.write_score(store.open_cell(cell), score_key(cell, EVALUATIONS[0]), score)
        value = next(
            row for row in build(sweep, TABLE, records(sweep, store)).rows if row.cell is cells_[0]
        ).values[1]
        assert value.seeds == len(cells_) and value.agrees is True


def correlated(
    root: Path, r_like: float, *, smoke: bool = False, constant: bool = False
) -> TableData:
    """Table 3 of arXiv 2402.16775 over six cells; its first row is published with r = -0.892."""
    names = {"MMLU": "arc_easy/acc", "C-EVAL": "other/acc"}
    columns = tuple(
        Column(metric, title, published=f"{title} accuracy") for title, metric in names.items()
    )
    over = Correlation(("wikitext2/perplexity",))
    table = Table(
        "t", columns=columns, published="comprehensive-evaluation/table3", correlation=over
    )
    own = cells(LLAMA, ("rtn", "gptq"), (4, 3, 2))
    sweep = dataclasses.replace(make_sweep(root), cells=tuple(own), tables=(table,))
    store = Store(sweep.runtime.runs)
    for number, cell in enumerate(own[1:]):
        key, odd = store.open_cell(cell), 0.1 * (-1) ** number
        numbers = {
            "wikitext2/perplexity": 5.0 if constant else 5.0 + number,
            "arc_easy/acc": 0.8 + r_like * 0.1 * number + odd,
        }
        for evaluation, (name, value) in zip(EVALUATIONS, numbers.items(), strict=True):
            score = {"metrics": {name: value}, "stderr": {}, "details": {"smoke": smoke}}
            store.write_score(key, score_key(cell, evaluation), score)
    return build(sweep, table, records(sweep, store))


def test_correlations_are_compared_with_the_published_ones(tmp_path: Path) -> None:
    alike, other = correlated(tmp_path / "a", -1.0), correlated(tmp_path / "b", 1.0)
    assert alike.rows[0].values[0].agrees is True and other.rows[0].values[0].agrees is False
    assert alike.rows[1].values[0].gap == "missing" and alike.rows[1].values[0].agrees is None
    assert any(
        "1 of 1 numbers agree" in note and "over cells (Fisher's z)" in note for note in alike.notes
    )
    assert any("1 (≠) differ" in note for note in other.notes) and "≠" in render(other)


def test_correlations_of_a_part_of_the_data_or_of_a_constant_claim_nothing(tmp_path: Path) -> None:
    smoke = correlated(tmp_path / "a", 1.0, smoke=True)
    assert (
        smoke.rows[0].values[0].smoke
        and smoke.rows[0].values[0].agrees is None
        and "†" in render(smoke)
    )
    constant = correlated(tmp_path / "b", 1.0, constant=True)
    assert constant.rows[0].values[0].gap == "undefined" and any(
        "no r: " in note for note in constant.notes
    )
    # of C-EVAL, which has no scores
    assert "fill with" in render(constant) and "in 1 row" in render(constant)


def test_fractions_stand_as_percent_beside_percent(tmp_path: Path) -> None:
    model = Model("llama3_70b", "meta-llama/Meta-Llama-3-70B", digest="x")
    evaluation = Evaluation("piqa", "lm_eval_tasks")
    cell = Cell(
        model,
        Method("rtn", rounding=Part("rtn")),
        Scheme("w8", WeightScheme(bits=8)),
        evaluations=(evaluation,),
    )
    column = Column("piqa/acc", "PIQA", published="piqa", digits=2, scale=100.0)
    table = Table("t", columns=(column,), published="llama3-70b-per-channel/table1")
    sweep = dataclasses.replace(make_sweep(tmp_path), cells=(cell,), tables=(table,))
    row = next(row for row in build(sweep, table, []).rows if row.cell is cell)
    assert row.values[0].published is not None and row.values[0].published.text == "81.66"
    store = Store(sweep.runtime.runs)
    for ours, digits, wanted in ((0.81664, 2, True), (0.8169, 1, False)):
        # published 0.8166
        score = {"metrics": {"piqa/acc": ours}, "stderr": {"piqa/acc": 0.0}, "details": {}}
        store.write_score(store.open_cell(cell), score_key(cell, evaluation), score)
        table = dataclasses.replace(table, columns=(dataclasses.replace(column, digits=digits),))
        found = build(sweep, table, records(sweep, store))
        value = next(row for row in found.rows if row.cell is cell).values[0]
        assert (
            value.agrees is wanted
            and value.published is not None
            and value.published.text == "81.66"
        )


def test_tables_load_without_torch() -> None:
    program = (
        "import sys, harness.reporting.tables, harness.reporting.figures, harness.reporting.report, harness.reporting.files\n"
        "heavy = {'torch', 'mlflow', 'matplotlib', 'pandas', 'scipy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_rows_can_be_ordered_by_a_metric(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, _ = made
    name = "checkpoint/bits_per_original_weight"
    table = Table("by_size", columns=(Column("wikitext2/perplexity", "ppl"),), order=name)
    by_key = {record.cell_key: record.metrics() for record in records(sweep, store)}
    rows = build(sweep, table, records(sweep, store)).rows
    first, others = rows[0], [row.cell_key for row in rows if row.cell and not row.baseline]
    assert first.baseline
    sizes = [by_key[key].get(name, -math.inf) for key in others]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2
