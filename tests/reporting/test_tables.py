"""Tables: the published number beside ours, gaps with their command, marks that mean what they say, the same bytes each time."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_sweep import EVALUATIONS, LLAMA, TABLE, cells, fill, make_sweep, w4a8

from harness.core.cell import (
    ActivationScheme,
    Cell,
    Evaluation,
    Method,
    Model,
    Part,
    Scheme,
    WeightScheme,
    cell_key,
    freeze,
    score_key,
)
from harness.core.errors import ConfigError
from harness.core.labels import bits_text, replicates, with_variants
from harness.core.sweep import Column, Correlation, Sweep, Table
from harness.reporting.comparisons import compare_cells
from harness.reporting.latex import latex_text
from harness.reporting.metrics import better_is_higher
from harness.reporting.published import Printed, load_published, match
from harness.reporting.render import frame, render
from harness.reporting.table_data import TableData
from harness.reporting.tables import build
from harness.storage.record import Record
from harness.storage.store import Store

PUBLISHED = sorted((Path(__file__).parents[2] / "sweeps" / "published").glob("*/*.yaml"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Store, TableData]:
    sweep = make_sweep(tmp_path_factory.mktemp("study"))
    store = fill(sweep)
    return sweep, store, build(sweep, TABLE, records(sweep, store), store)


def records(sweep: Sweep, store: Store) -> list[Record]:
    return [store.record(cell) for cell in sweep.cells]


def row_of(data: TableData, method: str, bits: str) -> tuple[str, ...]:
    lines = render(data).splitlines()
    rows = [
        [text.strip() for text in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    return tuple(next(row for row in rows if row[0] == method and row[1] == bits))


def test_the_same_records_give_the_same_bytes(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, data = made
    again = build(sweep, TABLE, reversed(records(sweep, store)), store)
    for format in ("md", "latex", "csv", "html"):
        assert render(data, format) == render(again, format)


def test_ours_published_and_the_difference(made: tuple[Sweep, Store, TableData]) -> None:
    _, _, data = made
    row = row_of(data, "none", "16")
    ours, published, difference = row[4:7]
    assert published == "6.1" and float(difference) == pytest.approx(float(ours) - 6.1, abs=0.011)
    assert row_of(data, "QuIP", "4")[3:7] == (
        "",
        "",
        "6.5",
        "",
    )  # not in this sweep: their number alone
    assert row_of(data, "rtn", "8")[5:7] == (
        "",
        "",
    )  # w8g128 is not in the paper, w8 without groups is
    assert row_of(data, "awq", "2")[4:7] == ("—", "1.7e+6", "")


def test_baseline_first_gaps_and_failures_with_the_way_out(
    made: tuple[Sweep, Store, TableData],
) -> None:
    sweep, store, data = made
    assert data.rows[0].baseline
    assert data.commands == ("harness run llama3_8b_ptq",)
    text = render(data)
    assert "llama3_8b · awq · w2g128 failed: Hessian of block 12 is singular" in text
    assert "in 2 rows; fill with:\n\n    harness run llama3_8b_ptq\n" in text
    done = dataclasses.replace(sweep, cells=sweep.cells[:3])
    assert build(done, TABLE, records(done, store)).commands == ()


def test_diverged_is_shown_as_such(made: tuple[Sweep, Store, TableData]) -> None:
    _, _, data = made
    assert row_of(data, "rtn", "2")[4] == "diverged"
    assert "inf" not in render(data) and "nan" not in render(data)


def verdict_of(
    root: Path,
    cell: Cell,
    number: float,
    *,
    stderr: float = 0.0,
    smoke: bool = False,
    protocol: tuple[str, ...] = (),
) -> tuple[bool | None, TableData]:
    """How a perplexity on WikiText2 stands beside the published one, and the table."""
    sweep = dataclasses.replace(make_sweep(root), cells=(cell,))
    store = Store(sweep.runtime.runs)
    score = {
        "metrics": {"wikitext2/perplexity": number},
        "stderr": {"wikitext2/perplexity": stderr},
        "details": {"smoke": smoke},
    }
    store.write_score(store.open_cell(cell), score_key(cell, EVALUATIONS[0]), score)
    data = build(sweep, dataclasses.replace(TABLE, protocol=protocol), records(sweep, store))
    return next(row for row in data.rows if row.cell is cell).values[1].agrees, data


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
    per_channel = dataclasses.replace(
        rtn, scheme=Scheme("w2", WeightScheme(bits=2))
    )  # published 2.7e+6
    assert verdict_of(tmp_path / "collapsed", per_channel, 2.0e4)[0] is True


def test_what_could_explain_a_number_that_differs_stands_below_it(tmp_path: Path) -> None:
    protocol = (
        "calibration: other windows",
        "GPTQ: other flags",
        "AWQ: another search",
        "ARC-easy: other prompts",
        "other logits",
    )
    baseline, gptq, rtn = cells(LLAMA, ("gptq", "rtn"), (3,))

    def explaining(cell: Cell, number: float) -> list[str]:
        data = verdict_of(
            tmp_path / f"{cell.method.name}{number}", cell, number, protocol=protocol
        )[1]
        notes = [note for note in data.notes if note.startswith("Protocol")]
        assert len(notes) == len(protocol)
        return [note.partition("): ")[2] for note in notes if "could explain" in note]

    assert explaining(gptq, 9.5) == [
        "calibration: other windows",
        "GPTQ: other flags",
        "other logits",
    ]
    assert explaining(baseline, 7.0) == explaining(rtn, 10.0) == ["other logits"]
    assert explaining(gptq, 8.2) == []
    _, data = verdict_of(tmp_path / "alone", gptq, 9.5, protocol=("AWQ: another search",))
    assert any(
        "no difference of protocol is noted" in note and "gptq 3 128" in note for note in data.notes
    )
    assert "+1.30≠" in render(data) and r"$+1.30$$^{\neq}$" in render(data, "latex")
    assert re.search(r'class="p differs"[^>]*>\+1\.30≠<', render(data, "html"))
    assert "WikiText2 verdict" in render(data, "csv") and ",differs," in render(data, "csv")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (19312.0, "1.9e4"),
        (2.7e6, "2.7e6"),
        (9999.0, "9999.00"),
        (math.nan, "diverged"),
        (math.inf, "diverged"),
    ],
)
def test_large_perplexities_are_printed_like_the_papers(
    tmp_path: Path, value: float, text: str
) -> None:
    sweep, store = one_score(tmp_path, {"wikitext2/perplexity": value})
    assert row_of(build(sweep, sweep.tables[0], records(sweep, store)), "none", "16")[3] == text


def one_score(
    root: Path, metrics: dict[str, float], limit: int | None = None
) -> tuple[Sweep, Store]:
    evaluation = dataclasses.replace(EVALUATIONS[0], limit=limit)
    cell = Cell(LLAMA, Method("none"), Scheme("full"), evaluations=(evaluation,))
    sweep = make_sweep(root)
    table = Table("t", columns=(Column("wikitext2/perplexity", "ppl"),))
    sweep = dataclasses.replace(
        sweep, cells=(cell,), tables=(table,), path=None, overrides=("+model=llama3_8b", "limit=8")
    )
    store = Store(sweep.runtime.runs)
    details = {"smoke": True} if limit else {}
    store.write_score(
        store.open_cell(cell), score_key(cell, evaluation), {"metrics": metrics, "details": details}
    )
    return sweep, store


def test_a_smoke_run_is_marked(tmp_path: Path) -> None:
    sweep, store = one_score(tmp_path, {"wikitext2/perplexity": 7.0}, limit=8)
    text = render(build(sweep, sweep.tables[0], [store.record(c) for c in sweep.cells]))
    assert "7.00†" in text and "first 8 items" in text


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


def test_ties_are_marked_and_real_differences_are_not(made: tuple[Sweep, Store, TableData]) -> None:
    _, _, data = made
    for bits, tie in (("8", True), ("3", False)):
        assert ("≈" in row_of(data, "gptq", bits)[4]) is tie
        assert ("≈" in row_of(data, "gptq", bits)[7]) is tie
    assert "Holm over" in render(data)


def test_without_items_nothing_is_claimed(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, _ = made
    assert "≈" not in render(build(sweep, TABLE, records(sweep, store)))


def test_tasks_of_a_group_are_tested_on_their_own_items(tmp_path: Path) -> None:
    group = Evaluation("two_tasks", "lm_eval_tasks")
    baseline = dataclasses.replace(cells(LLAMA)[0], evaluations=(group,))
    cell = dataclasses.replace(cells(LLAMA, ("gptq",), (4,))[1], evaluations=(group,))
    sweep = dataclasses.replace(make_sweep(tmp_path), cells=(baseline, cell))
    store = Store(sweep.runtime.runs)
    for each, first in ((baseline, 1.0), (cell, 0.0)):
        task = ["first"] * 40 + ["second"] * 40
        items = {
            "id": [f"{t}/{i}" for i, t in enumerate(task)],
            "task": task,
            "acc": [first] * 40 + [1.0] * 40,
        }
        metrics = {
            "two_tasks/acc": first / 2 + 0.5,
            "first/acc": first,
            "second/acc": 1.0,
            "other/acc": 1.0,
        }
        store.write_score(
            store.open_cell(each), score_key(each, group), {"metrics": metrics}, items
        )
    known = {record.cell_key: record for record in records(sweep, store)}
    names = ["two_tasks/acc", "first/acc", "second/acc", "other/acc"]
    found = compare_cells([(each,) for each in sweep.cells], known, names, store)
    key = cell_key(cell)
    assert {metric: comparison.items for (_, metric), comparison in found.items()} == {
        "two_tasks/acc": 80,
        "first/acc": 40,
        "second/acc": 40,
    }
    assert (
        found[key, "first/acc"].differs
        and found[key, "two_tasks/acc"].differs
        and not found[key, "second/acc"].differs
    )


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


def test_latex_is_balanced_and_escaped(made: tuple[Sweep, Store, TableData]) -> None:
    text = render(made[2], "latex")
    assert text.count("{") == text.count("}") and text.count("$") % 2 == 0
    assert text.isascii() and "?" not in text
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    counts = {
        len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines() if line.endswith(r"\\")
    }
    assert len(counts) == 1
    assert latex_text("50% of a_b & {c} # $ ~ ^ \\") == (
        r"50\% of a\_b \& \{c\} \# \$ \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_as_it_is_and_fits_its_page(
    made: tuple[Sweep, Store, TableData], tmp_path: Path
) -> None:
    packages = re.findall(r"\\usepackage\{.*\}", render(made[2], "latex"))
    lines = [
        r"\documentclass{article}",
        *packages,
        r"\begin{document}",
        render(made[2], "latex"),
        r"\end{document}",
    ]
    (tmp_path / "t.tex").write_text("\n".join(lines))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 0 and "Overfull" not in done.stdout and "too large" not in done.stdout
    ), done.stdout


def test_html_is_self_contained_and_escaped(made: tuple[Sweep, Store, TableData]) -> None:
    text = render(made[2], "html")
    assert "http" not in text and "src=" not in text
    assert "Perplexity &amp; accuracy" in text

    class Balance(HTMLParser):
        open_tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "meta":
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    parser = Balance()
    parser.feed(text)
    assert parser.open_tags == []


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


def seeded(
    root: Path, losses: dict[int, float], seeds: tuple[int, ...] = (0, 1, 2)
) -> tuple[Sweep, Store]:
    """GPTQ at 4 bits with several seeds; each is worse than the baseline by its own share, in windows of unequal length."""
    baseline, first = cells(LLAMA, ("gptq",), (4,))
    assert first.calibration is not None
    made = [
        dataclasses.replace(
            first, seed=seed, calibration=dataclasses.replace(first.calibration, seed=seed)
        )
        for seed in seeds
    ]
    table = Table("t", columns=(PERPLEXITY,))
    sweep = dataclasses.replace(
        make_sweep(root), cells=with_variants([baseline, *made]), tables=(table,)
    )
    store = Store(sweep.runtime.runs)
    rng = np.random.default_rng(0)
    windows, tokens = rng.normal(1.8, 0.2, 40), rng.integers(2, 2048, 40)
    for cell in sweep.cells:
        if not cell.method.is_baseline and cell.seed not in losses:
            continue
        excess = (
            0.0
            if cell.method.is_baseline
            else losses[cell.seed] * np.where(tokens > 1024, 1.0, 0.2)
        )
        loss = windows + excess
        metrics = {"wikitext2/perplexity": math.exp(float((loss * tokens).sum() / tokens.sum()))}
        items = {"id": list(range(40)), "loss": loss.tolist(), "tokens": tokens.tolist()}
        store.write_score(
            store.open_cell(cell), score_key(cell, EVALUATIONS[0]), {"metrics": metrics}, items
        )
    return sweep, store


PERPLEXITY = Column("wikitext2/perplexity", "ppl", digits=3)


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
    assert "fill with" in render(constant) and "in 1 row" in render(
        constant
    )  # of C-EVAL, which has no scores


def test_windows_of_unequal_length_count_by_their_tokens(tmp_path: Path) -> None:
    sweep, store = seeded(tmp_path, {0: 0.05}, seeds=(0,))
    known = {record.cell_key: record for record in records(sweep, store)}
    found = compare_cells([sweep.cells[1:]], known, [PERPLEXITY.metric], store)[
        cell_key(sweep.cells[1]), PERPLEXITY.metric
    ]
    ours, theirs = (
        known[cell_key(cell)].metrics()[PERPLEXITY.metric]
        for cell in (sweep.cells[1], sweep.cells[0])
    )
    assert found.difference == pytest.approx(
        math.log(ours / theirs)
    )  # the difference that the table shows


def test_names_tell_apart_what_a_sweep_varies() -> None:
    first = cells(LLAMA, ("gptq",), (4, 3))[1]
    assert first.calibration is not None
    other = dataclasses.replace(
        first.calibration, name="pile", source="pile", digest="p", packing="document"
    )
    grid = [
        dataclasses.replace(
            first, inputs=inputs, calibration=dataclasses.replace(calibration, seed=seed), seed=seed
        )
        for inputs in ("quantized", "full_precision")
        for calibration in (first.calibration, other)
        for seed in (0, 1)
    ]
    titles = [cell.title for cell in with_variants(grid)]
    assert len(set(titles)) == 8 and titles[-1].endswith(
        "w4g128 · calibration pile · inputs full_precision · seed 1"
    )
    plain = with_variants([*cells(LLAMA), w4a8(LLAMA)])
    assert not any(cell.variant for cell in plain)  # nothing to tell apart
    assert list(map(cell_key, with_variants(grid))) == list(
        map(cell_key, grid)
    )  # names are no part of a key
    other_settings = dataclasses.replace(
        first,
        method=dataclasses.replace(
            first.method,
            rounding=Part("gptq", freeze({"damping_fraction": 0.1}), needs=("hessian",)),
        ),
    )
    assert [cell.variant for cell in with_variants([first, other_settings])] == [
        "rounding.damping_fraction 0.01",
        "rounding.damping_fraction 0.1",
    ]
    assert [len(row) for row in replicates(grid)] == [2] * 4


def test_two_models_are_two_sections(made: tuple[Sweep, Store, TableData]) -> None:
    sweep, store, _ = made
    both = dataclasses.replace(
        sweep, cells=(*cells(Model("demo", "demo", digest="x"), ("rtn",), (4,)), *sweep.cells)
    )
    data = build(both, TABLE, records(both, store), store)
    text = render(data)
    assert text.index("demo:") < text.index("llama3_8b:")
    assert [row.baseline for row in data.rows if row.model == "demo"] == [True, False]
    assert not any(
        v.published for row in data.rows if row.model == "demo" for v in row.values
    )  # the paper is of another model


def test_labels() -> None:
    assert bits_text(w4a8(LLAMA)) == "W4A8"
    assert bits_text(cells(LLAMA)[0]) == "16"
    fp8 = Scheme("fp8", WeightScheme("fp8_e4m3", 8), ActivationScheme("fp8_e4m3", bits=8))
    assert bits_text(Cell(LLAMA, Method("rtn", rounding=Part("rtn")), fp8)) == "W8A8 fp8_e4m3"
    nf4 = Cell(
        LLAMA, Method("rtn", rounding=Part("rtn")), Scheme("nf4", WeightScheme("nf4", 4, 64))
    )
    assert bits_text(nf4) == "4 nf4"


def test_direction_comes_from_the_evaluator() -> None:
    assert better_is_higher("wikitext2/perplexity", cells(LLAMA)) is False
    assert better_is_higher("arc_easy/acc", cells(LLAMA)) is True
    assert better_is_higher("strange/number") is None


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_published_files_are_whole(path: Path) -> None:
    published = load_published(f"{path.parent.name}/{path.stem}")
    assert (
        published.path.samefile(path)
        and published.rows
        and published.arxiv
        and f"table{published.table}" == path.stem
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
        score = {
            "metrics": {"piqa/acc": ours},
            "stderr": {"piqa/acc": 0.0},
            "details": {},
        }  # published 0.8166
        store.write_score(store.open_cell(cell), score_key(cell, evaluation), score)
        table = dataclasses.replace(table, columns=(dataclasses.replace(column, digits=digits),))
        found = build(sweep, table, records(sweep, store))
        value = next(row for row in found.rows if row.cell is cell).values[0]
        assert (
            value.agrees is wanted
            and value.published is not None
            and value.published.text == "81.66"
        )


@pytest.mark.parametrize(
    ("text", "percent", "rounding"),
    [("0.8166", "81.66", 0.005), ("0.40", "40", 0.5), ("0.4", "40", 5.0)],
)
def test_percent_has_the_digits_of_the_fraction(text: str, percent: str, rounding: float) -> None:
    found = Printed(text).percent
    assert found.text == percent and found.rounding == pytest.approx(rounding)


def test_tables_load_without_torch() -> None:
    program = (
        "import sys, harness.reporting.tables, harness.reporting.figures, harness.reporting.report, harness.reporting.files\n"
        "heavy = {'torch', 'mlflow', 'matplotlib', 'pandas', 'scipy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
