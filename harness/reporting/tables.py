"""Tables of a sweep: our numbers, the published numbers beside them, and significant differences. Loads without torch.

`build` makes the table, `render` prints it as Markdown, LaTeX, CSV or HTML, `frame` gives it to pandas. Rows are the cells of the
sweep in its order, each model's baseline first; with a published table they follow its order, and published rows without a cell
are shown with the published number only. The same records give the same bytes.

Marks: bold is the best of its model and bit widths; ≈ marks no significant difference from the baseline (paired test, Holm over the
table); ≠ marks a difference from the published number by more than its rounding and our interval; † marks a number computed on a
part of the data; — is a missing number, with the command that computes it below the table. Perplexities above 10,000 are printed as
in the papers (1.9e4); a number that is not finite is printed as "diverged".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.core.cell import Cell, cell_key
from harness.core.errors import ConfigError, unknown_name
from harness.core.labels import bits_text, group_text, replicates, variants, without_settings
from harness.core.sweep import Column, Sweep, Table
from harness.core.text import letters_and_digits
from harness.evaluation import flips
from harness.evaluation.statistics import Comparison, over_seeds, pearson
from harness.reporting.comparisons import compare_cells
from harness.reporting.metrics import (
    better_is_higher,
    headline,
    is_perplexity,
    number_of,
    problem_metrics,
)
from harness.reporting.notes import footnotes
from harness.reporting.published import (
    BASELINES,
    Printed,
    Published,
    PublishedRow,
    load_published,
    match,
    same_model,
)
from harness.reporting.table_data import GAP, PUBLISHED_ONLY, ColumnHead, Row, TableData, Value
from harness.reporting.text_grid import SCIENTIFIC_FROM, number_text
from harness.storage.record import Record
from harness.storage.store import Store

# -- building ----------------------------------------------------------------------------------------------------------


def build(
    sweep: Sweep, table: Table, records: Iterable[Record], store: Store | None = None
) -> TableData:
    """One table of a sweep. With a store, cells are tested against their baselines on the stored results per item.

    Raises ConfigError where a column or a row names a published one that does not exist.
    """
    by_key = {record.cell_key: record for record in records}
    chosen = (
        []
        if table.absent
        else [c for c in sweep.cells if not table.models or c.model.name in table.models]
    )
    cells = _ordered(chosen, by_key, table.order)
    published = load_published(table.published, sweep.path) if table.published else None
    columns = table.columns or default_columns(cells, by_key)
    if store is not None and any(
        name.rpartition("/")[2] in flips.METRICS for c in columns for name in (c.metric, *c.of)
    ):
        by_key = {key: flips.with_flips(record, store) for key, record in by_key.items()}
    if published is not None and table.correlation is None:
        unknown = [
            c.published for c in columns if c.published and c.published not in published.columns
        ]
        problems = [
            unknown_name("published column", name, published.columns, f"table {table.name}")
            for name in unknown
        ]
        if problems:
            raise ConfigError("\n".join(problems))
    if table.correlation is not None:
        return _correlations(sweep, table, cells, by_key, published)
    side_by_side = any(column.model for column in columns)
    members = _members(cells, side_by_side)
    cells = [cell for cell in cells if cell_key(cell) in members]
    matches, ambiguous = (
        match(cells, published, table.methods) if published is not None else ({}, [])
    )
    heads = tuple(_head(column, cells, published) for column in columns)
    labels, texts = _with_variants(*_labels(cells), cells, table, published)
    # a baseline has the bit width of its weights as stored, not that of the dtype of its computation
    for cell in cells:
        record, (method, _, *rest) = by_key.get(cell_key(cell)), texts[cell_key(cell)]
        stored = (
            record.metrics().get("checkpoint/bits_per_weight")
            if record is not None and cell.method.is_baseline
            else None
        )
        if stored is not None:
            texts[cell_key(cell)] = (method, f"{stored:g}", *rest)
    counts = {key: max(map(len, models.values())) for key, models in members.items()}
    if any(count > 1 for count in counts.values()):
        labels, texts = (
            (*labels, "seeds"),
            {key: (*text, str(counts[key])) for key, text in texts.items()},
        )
    everyone = [seeds for models in members.values() for seeds in models.values()]
    metrics = list(
        dict.fromkeys(c.metric for c in columns if c.metric not in ("mean", PUBLISHED_ONLY))
    )
    comparisons = compare_cells(everyone, by_key, metrics, store) if store else {}

    rows: list[Row] = []
    for cell in cells:
        key = cell_key(cell)
        values = []
        for head in heads:
            own = members[key].get(head.column.model or cell.model.name, ())
            known = [by_key.get(cell_key(seed)) for seed in own]
            found = comparisons.get((cell_key(own[0]), head.column.metric)) if own else None
            value = _value(head, known, matches.get(key), published, found)
            values.append(
                replace(value, cell_key=cell_key(own[0])) if own else replace(value, gap="absent")
            )
        others = tuple(
            cell_key(other)
            for seeds in members[key].values()
            for other in seeds
            if other is not cell
        )
        model = "" if side_by_side else cell.model.name
        rows.append(
            Row(texts[key], tuple(values), cell, key, model, cell.method.is_baseline, others)
        )
    rows = _mark_best(rows, heads)
    if published is not None:
        rows = _in_published_order(rows, table, published, matches, heads, labels)
    notes, commands = footnotes(sweep, table, rows, heads, by_key, published, ambiguous)
    return TableData(
        table.name,
        table.caption,
        labels,
        heads,
        tuple(rows),
        tuple(notes),
        tuple(commands),
        sweep.name,
        sweep.method_titles,
    )


def _members(cells: Sequence[Cell], side_by_side: bool) -> dict[str, dict[str, tuple[Cell, ...]]]:
    """Key of a row's first cell -> model -> the row's cells of that model, which differ only in their seeds."""
    members: dict[str, dict[str, tuple[Cell, ...]]] = {}
    for row in replicates(cells, across_models=side_by_side):
        models = dict.fromkeys(cell.model.name for cell in row)
        members[cell_key(row[0])] = {
            name: tuple(cell for cell in row if cell.model.name == name) for name in models
        }
    return members


def _correlations(
    sweep: Sweep,
    table: Table,
    cells: Sequence[Cell],
    by_key: Mapping[str, Record],
    published: Published | None,
) -> TableData:
    """A table with a row for each column: Pearson's r between its metric and the mean of others, over cells."""
    wanted = table.correlation
    assert wanted is not None
    cells = [
        cell
        for cell in cells
        if not cell.method.is_baseline
        and (not wanted.bits or cell.scheme.weight.bits in wanted.bits)
        and (not wanted.methods or cell.method.name in wanted.methods)
    ]
    known = [by_key.get(cell_key(cell)) for cell in cells]
    metrics = [{} if record is None else record.metrics() for record in known]
    smoke = frozenset().union(*(record.smoke_metrics() for record in known if record is not None))
    over = [_mean(Column("mean", of=wanted.over), own) for own in metrics]
    printed = {row.label: row.values for row in published.rows} if published is not None else {}
    unknown = [
        unknown_name("published row", c.published, printed, f"table {table.name}")
        for c in table.columns
        if c.published and c.published not in printed
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    head = ColumnHead(Column("r", digits=3), "Pearson r", None, bool(printed))
    rows = []
    for column in table.columns:
        theirs = next(iter(printed.get(column.published, {}).values()), None)
        ours = [
            _mean(column, own) if column.metric == "mean" else number_of(own, column.metric)
            for own in metrics
        ]
        pairs = [(x, y) for x, y in zip(over, ours, strict=True) if x is not None and y is not None]
        is_complete = len(pairs) == len(cells)
        found = pearson(pairs) if is_complete else None
        number = None if found is None else found.r
        gap = "" if number is not None else "undefined" if is_complete else "missing"
        is_smoke = bool(smoke & {*wanted.over, column.metric, *column.of})
        agrees = None
        if found is not None and theirs is not None and len(pairs) > 3 and not is_smoke:
            agrees = found.low - theirs.rounding <= theirs <= found.high + theirs.rounding
        value = Value(
            number,
            published=theirs,
            published_number=None if theirs is None else float(theirs),
            agrees=agrees,
            smoke=is_smoke,
            gap="unmeasured" if column.metric == PUBLISHED_ONLY else gap,
        )
        rows.append(Row((column.title or column.metric,), (value,)))
    heads = (head,)
    notes, commands = footnotes(sweep, table, rows, heads, by_key, published, ())
    names = ", ".join(metric.partition("/")[0] for metric in wanted.over)
    notes.insert(
        0, f"r over {len(cells)} cells between each benchmark and the mean perplexity ({names})."
    )
    if any(row.values[0].gap == "undefined" for row in rows):
        notes.insert(
            1, f"{GAP} no r: fewer than three cells, or a side that is constant or diverged."
        )
    return TableData(
        table.name,
        table.caption,
        ("benchmark",),
        heads,
        tuple(rows),
        tuple(notes),
        tuple(commands),
        sweep.name,
    )


def default_columns(cells: Sequence[Cell], by_key: Mapping[str, Record]) -> tuple[Column, ...]:
    """The columns of a sweep that defines none: bits per weight, then the headline metric of every evaluation."""
    records = [by_key[key] for cell in cells if (key := cell_key(cell)) in by_key]
    size = Column("checkpoint/bits_per_weight", "bits/weight")
    return (
        size,
        *(
            Column(metric, digits=4 if metric.endswith("/acc") else 2)
            for metric in headline(records)
        ),
    )


def _ordered(cells: Sequence[Cell], records: Mapping[str, Record], metric: str) -> list[Cell]:
    """Cells grouped by model, each model's baseline first, then from the largest value of the metric to the smallest; cells
    without one, and all where no metric is named, in the sweep's order."""
    models = list(dict.fromkeys(cell.model.name for cell in cells))

    def place(cell: Cell) -> tuple[int, bool, float]:
        record = records.get(cell_key(cell)) if metric else None
        value = record.metrics().get(metric, -math.inf) if record is not None else 0.0
        return models.index(cell.model.name), not cell.method.is_baseline, -value

    return sorted(cells, key=place)


def _head(column: Column, cells: Sequence[Cell], published: Published | None) -> ColumnHead:
    direction = column.higher_is_better
    if direction is None and published is not None and column.published:
        direction = published.higher_is_better.get(column.published)
    if direction is None:
        directions = {
            better_is_higher(metric, cells)
            for metric in (column.of if column.metric == "mean" else (column.metric,))
        }
        direction = directions.pop() if len(directions) == 1 else None
    arrow = "" if direction is None else " ↑" if direction else " ↓"
    return ColumnHead(
        column,
        (column.title or column.metric) + arrow,
        direction,
        bool(published and column.published),
    )


def _value(
    head: ColumnHead,
    records: Sequence[Record | None],
    row: PublishedRow | None,
    published: Published | None,
    found: Comparison | None,
) -> Value:
    """The value of one entry of a table, from records of one cell per seed. A mean over seeds needs all of them."""
    column = head.column
    if column.metric == PUBLISHED_ONLY:
        printed, theirs = _published_number(head, row, published)
        return Value(published=printed, published_number=theirs, gap="unmeasured")
    known = [record for record in records if record is not None]
    metrics = [record.metrics() for record in known]
    numbers = [
        _mean(column, own) if column.metric == "mean" else number_of(own, column.metric)
        for own in metrics
    ]
    there = [number * column.scale for number in numbers if number is not None]
    number, half_width = over_seeds(there) if there and len(there) == len(records) else (None, None)
    errors = [
        error * column.scale for own in metrics if (error := _stderr(column, own)) is not None
    ]
    half_width = half_width if len(set(there)) > 1 else None
    named = {column.metric, *column.of}
    smoke = any(record.smoke_metrics() & named for record in known)
    printed, theirs = _published_number(head, row, published)
    failed = any(record.failures for record in known)
    # only methods that store a difference from a base have its sizes
    no_difference = column.metric.startswith("delta/") and not any(
        record.cell.method.needs_base for record in known
    )
    agrees = None
    if number is not None and printed is not None and theirs is not None and not smoke:
        # seeds share their items
        over_items = 1.96 * math.fsum(errors) / len(errors) if errors else 0.0
        agrees = _agrees(column, number, math.hypot(over_items, half_width or 0), printed, theirs)
    return Value(
        number=number,
        stderr=errors[0] if errors and len(records) == 1 else None,
        seeds=max(1, len(records)),
        half_width=half_width,
        published=printed,
        published_number=theirs,
        agrees=agrees,
        comparison=found if number is None or math.isfinite(number) else None,
        smoke=smoke,
        problems=any(problem_metrics(record) & named for record in known),
        gap=""
        if number is not None
        else "unmeasured"
        if no_difference
        else "failed"
        if failed
        else "missing",
    )


def _published_number(
    head: ColumnHead, row: PublishedRow | None, published: Published | None
) -> tuple[Printed | None, float | None]:
    """The published number as printed, and scaled like ours. A fraction beside our percent is shown as percent."""
    printed = (
        row.values.get(head.column.published) if row is not None and head.column.published else None
    )
    if printed is None or published is None:
        return None, None
    if head.column.published in published.fractions and head.column.scale == 100:
        printed = printed.percent
    return printed, float(printed)


def _agrees(
    column: Column, number: float, half_width: float, printed: Printed, theirs: float
) -> bool:
    """Whether a number of ours agrees with the published one within its digits and our 95 % interval.

    Two perplexities above 10,000 always agree: such a model is broken, and its number depends on rounding.
    """
    if not math.isfinite(number):
        return False
    if is_perplexity(column) and min(number, theirs) > SCIENTIFIC_FROM:
        return True
    return abs(number - theirs) <= printed.rounding + half_width + 1e-9


def _stderr(column: Column, metrics: Mapping[str, float]) -> float | None:
    """Standard error over items. For a mean over benchmarks it is that of their weighted mean, with independent items."""
    if column.metric != "mean":
        return metrics.get(f"{column.metric}_stderr")
    errors = [metrics.get(f"{metric}_stderr") for metric in column.of]
    weights = column.weights or (1.0,) * len(column.of)
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    return math.hypot(*(w * error for w, error in zip(weights, known, strict=True))) / math.fsum(
        weights
    )


def _mean(column: Column, metrics: Mapping[str, float]) -> float | None:
    weights = column.weights or (1.0,) * len(column.of)
    if len(weights) != len(column.of) or not column.of:
        counts = f"{len(column.of)} metrics in `of`, {len(weights)} in `weights`"
        raise ConfigError(
            f'column "{column.title or "mean"}": {counts}; give one weight per metric'
        )
    if any(metric not in metrics for metric in column.of):
        return None
    values = [metrics[metric] for metric in column.of]
    if not all(math.isfinite(value) for value in values):
        return math.nan
    return math.fsum(w * value for w, value in zip(weights, values, strict=True)) / math.fsum(
        weights
    )


def _mark_best(rows: Sequence[Row], heads: Sequence[ColumnHead]) -> list[Row]:
    """Mark the best of each column among cells of one model and equal bit widths. Numbers that print equal are equal."""
    best: dict[tuple[Any, int], str] = {}  # (group, column) -> printed number
    for index, head in enumerate(heads):
        if head.column.metric.startswith(("checkpoint/", "delta/")):
            continue  # a size is a cost and not a quality
        groups: dict[Any, list[Value]] = {}
        for row in rows:
            number = row.values[index].number
            if (
                row.cell is not None
                and not row.baseline
                and number is not None
                and math.isfinite(number)
            ):
                groups.setdefault(_bits_group(row.cell), []).append(row.values[index])
        for group, values in groups.items():
            numbers = [value.number for value in values if value.number is not None]
            if (
                head.higher_is_better is not None
                and len({number_text(number, head.column) for number in numbers}) > 1
            ):
                best[group, index] = number_text(
                    (max if head.higher_is_better else min)(numbers), head.column
                )
    marked = []
    for row in rows:
        group = None if row.cell is None or row.baseline else _bits_group(row.cell)
        texts = [
            None if v.number is None else number_text(v.number, heads[i].column)
            for i, v in enumerate(row.values)
        ]
        is_best = [
            text is not None and text == best.get((group, i)) for i, text in enumerate(texts)
        ]
        marked.append(
            replace(
                row,
                values=tuple(replace(v, best=b) for v, b in zip(row.values, is_best, strict=True)),
            )
        )
    return marked


def _bits_group(cell: Cell) -> tuple[Any, ...]:
    scheme = cell.scheme
    return (
        cell.model.name,
        scheme.weight.bits,
        scheme.activation and scheme.activation.bits,
        scheme.kv and scheme.kv.width,
    )


def _in_published_order(
    rows: Sequence[Row],
    table: Table,
    published: Published,
    matches: Mapping[str, PublishedRow],
    heads: Sequence[ColumnHead],
    labels: Sequence[str],
) -> list[Row]:
    """Rows in the paper's order, including rows without a cell of ours; our other cells come last in each model.

    The paper's models without a cell in the sweep follow, unless the table is restricted to some models.
    """
    ordered: list[Row] = []
    seen: set[int] = set()

    def published_only(row: PublishedRow, model: str) -> list[Row]:
        values = tuple(_absent(head, row, published) for head in heads)
        if all(value.published is None for value in values):
            return []
        texts = _published_labels(row)
        return [
            Row(
                tuple(texts[label] for label in labels),
                values,
                model=model,
                baseline=_is_baseline(row),
            )
        ]

    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        cell = next(row.cell for row in own if row.cell is not None)
        for published_row in published.rows:
            if not same_model(cell, published, published_row):
                continue
            seen.add(id(published_row))
            found = [row for row in own if matches.get(row.cell_key) is published_row]
            ordered += found or published_only(published_row, model)
        ordered += [row for row in own if row.cell_key not in matches]
    if not table.models:
        for published_row in published.rows:
            if id(published_row) not in seen and (published_row.model or table.absent):
                ordered += published_only(published_row, published_row.model or published.models[0])
    return ordered


def _is_baseline(row: PublishedRow) -> bool:
    return letters_and_digits(row.method) in BASELINES


def _absent(head: ColumnHead, row: PublishedRow, published: Published) -> Value:
    printed, scaled = _published_number(head, row, published)
    return Value(published=printed, published_number=scaled, gap="absent")


def _published_labels(row: PublishedRow) -> dict[str, str]:
    activation = row.activation_bits or 16
    weight = "" if row.weight_bits is None else f"{row.weight_bits:g}"
    bits = weight if activation == 16 else f"W{weight}A{activation:g}"
    group = "" if row.group_size is None else str(row.group_size)
    return {"method": row.method, "bits": bits, "group": group, "variant": row.label, "seeds": ""}


def _labels(cells: Sequence[Cell]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Heads and texts of the label columns. "variant" names what differs within a method and distinguishes equal labels."""
    texts: dict[str, tuple[str, ...]] = {}
    for cell in cells:
        texts[cell_key(cell)] = (cell.method.name, bits_text(cell), group_text(cell))
    differing = variants(cells, by_scheme=False)
    if not differing:
        return ("method", "bits", "group"), texts
    return ("method", "bits", "group", "variant"), {
        key: (*text, differing.get(key, "")) for key, text in texts.items()
    }


def _with_variants(
    labels: tuple[str, ...],
    texts: dict[str, tuple[str, ...]],
    cells: Sequence[Cell],
    table: Table,
    published: Published | None,
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Add a column "variant" if the published rows cannot be distinguished without one; it holds the paper's names of cells."""
    rows = [] if published is None else published.rows
    alike = [
        (row.model, row.method, row.weight_bits, row.activation_bits, row.group_size)
        for row in rows
    ]
    if "variant" in labels or len(set(alike)) == len(alike):
        return labels, texts
    called: dict[str, tuple[str, ...]] = {}
    for cell in cells:
        method, *others = texts[cell_key(cell)]
        variant = table.methods.get(method, "")
        called[cell_key(cell)] = (without_settings(method) if variant else method, *others, variant)
    return (*labels, "variant"), called


def build_all(
    sweep: Sweep, records: Iterable[Record], store: Store | None = None
) -> dict[str, TableData]:
    """Every table of a sweep by name."""
    known = list(records)
    return {table.name: build(sweep, table, known, store) for table in sweep.shown_tables}
