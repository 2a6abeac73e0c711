"""Tables of a sweep: our numbers, the published ones beside them, and which differences are real. Loads without torch.

`build` makes the table, `render` prints it as Markdown, LaTeX, CSV or HTML, `frame` gives it to pandas. Rows are the cells of the
sweep in its order, each model's baseline first; with a published table they stand in its order, and its rows that the sweep has no
cell for are shown with their number alone. The same records give the same bytes.

Marks: bold is the best of its model and bit widths; ≈ no difference from the baseline could be shown (paired test, Holm over the
table); ≠ differs from the published number by more than its rounding and our interval; † stands on a part of the data only; — is a
gap, with the command that fills it below. Perplexities above 10,000 are printed as the papers do (1.9e4); what is not a finite
number is printed as "diverged".
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import flips, plugins
from harness.cell import Cell, Evaluation, baseline_of, cell_key
from harness.errors import ConfigError, unknown_name
from harness.naming import bits_text, group_text, replicates, variants
from harness.published import BASELINES, Printed, Published, PublishedRow, load_published, match, same_model
from harness.statistics import Comparison, compare_seeds, correlation_interval, holm, over_seeds
from harness.store import Record, Store
from harness.sweep import Column, Sweep, Table

if TYPE_CHECKING:
    import pandas

FORMATS = {"md": ".md", "latex": ".tex", "csv": ".csv", "html": ".html"}
GAP = "—"
PUBLISHED_ONLY = "published"                    # the metric of a column that only the paper has
SCIENTIFIC_FROM = 1e4                           # perplexities above are printed as 1.9e4
LOWER_IS_BETTER = ("perplexity", "bits_per_weight", "bits_per_weight_total", "bytes", "seconds", "peak_memory_bytes")
ITEM_COLUMNS = {"perplexity": ("loss",)}         # metric -> columns of its items; others are named like the metric
# column of items -> the column that says how much each counts
ITEM_WEIGHTS = {"loss": "tokens", "kl": "tokens", "top1_agreement": "tokens", "delta_nll": "targets"}


@dataclass(frozen=True)
class Value:
    """One entry. number: ours, scaled as printed, None for a gap; with several seeds their mean.

    stderr  over items, for one seed; of a mean of metrics, that of independent ones
    half_width  of the 95 % interval of the mean over seeds; None for one seed
    gap  why there is no number: "missing", "failed", "absent" (no cell of the sweep), "unmeasured" (no metric of ours), or
         "undefined" (a correlation that these numbers do not have)
    """

    number: float | None = None
    stderr: float | None = None
    seeds: int = 1
    half_width: float | None = None
    published: Printed | None = None
    published_number: float | None = None       # scaled like ours
    agrees: bool | None = None                  # with the published number; None where the two cannot be compared
    comparison: Comparison | None = None
    best: bool = False
    smoke: bool = False
    gap: str = ""
    cell_key: str = ""                          # of the cell that the number was made by, the first of several seeds

    @property
    def difference(self) -> float | None:
        return None if self.number is None or self.published_number is None else self.number - self.published_number


@dataclass(frozen=True)
class Row:
    """labels: texts of the label columns; cell None: a published row that the sweep has no cell for.

    others: keys of the cells of further models and seeds that stand in this row too.
    """

    labels: tuple[str, ...]
    values: tuple[Value, ...]
    cell: Cell | None = None
    cell_key: str = ""
    model: str = ""
    baseline: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class ColumnHead:
    """column as in the sweep; title with the direction that is better; published: three sub-columns."""

    column: Column
    title: str
    higher_is_better: bool | None
    published: bool = False


@dataclass(frozen=True)
class TableData:
    """A table with its values but without a form: labels and columns, rows in order, and the notes printed below it."""

    name: str
    caption: str
    labels: tuple[str, ...]                     # heads of the label columns
    columns: tuple[ColumnHead, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = field(default=())


# -- building ----------------------------------------------------------------------------------------------------------


def build(sweep: Sweep, table: Table, records: Iterable[Record], store: Store | None = None) -> TableData:
    """One table of a sweep. With a store, its item results decide which cells differ from their baseline."""
    by_key = {record.cell_key: record for record in records}
    chosen = [] if table.absent else [c for c in sweep.cells if not table.models or c.model.name in table.models]
    cells = _ordered(chosen)
    published = load_published(table.published, _published_folders(sweep)) if table.published else None
    columns = table.columns or default_columns(cells, by_key)
    if store is not None and any(name.rpartition("/")[2] in flips.METRICS for c in columns for name in (c.metric, *c.of)):
        by_key = {key: flips.with_flips(record, store) for key, record in by_key.items()}
    if published is not None and table.correlation is None:
        unknown = [c.published for c in columns if c.published and c.published not in published.columns]
        problems = [unknown_name("published column", name, published.columns, f"table {table.name}") for name in unknown]
        if problems:
            raise ConfigError("\n".join(problems))
    if table.correlation is not None:
        return _correlations(sweep, table, cells, by_key, published)
    side_by_side = any(column.model for column in columns)
    members = _members(cells, side_by_side)
    cells = [cell for cell in cells if cell_key(cell) in members]
    matches, ambiguous = match(cells, published, table.methods) if published is not None else ({}, [])
    heads = tuple(_head(column, cells, published) for column in columns)
    labels, texts = _with_variants(*_labels(cells), cells, table, published)
    for cell in cells:                          # a baseline has the width of its weights as stored, whatever it is computed in
        record, (method, _, *rest) = by_key.get(cell_key(cell)), texts[cell_key(cell)]
        stored = record.metrics().get("checkpoint/bits_per_weight") if record is not None and cell.method.is_baseline else None
        if stored is not None:
            texts[cell_key(cell)] = (method, f"{stored:g}", *rest)
    counts = {key: max(map(len, models.values())) for key, models in members.items()}
    if any(count > 1 for count in counts.values()):
        labels, texts = (*labels, "seeds"), {key: (*text, str(counts[key])) for key, text in texts.items()}
    everyone = [seeds for models in members.values() for seeds in models.values()]
    metrics = list(dict.fromkeys(c.metric for c in columns if c.metric not in ("mean", PUBLISHED_ONLY)))
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
            values.append(replace(value, cell_key=cell_key(own[0])) if own else replace(value, gap="absent"))
        others = tuple(cell_key(other) for seeds in members[key].values() for other in seeds if other is not cell)
        model = "" if side_by_side else cell.model.name
        rows.append(Row(texts[key], tuple(values), cell, key, model, cell.method.is_baseline, others))
    rows = _mark_best(rows, heads)
    if published is not None:
        rows = _in_published_order(rows, table, published, matches, heads, labels)
    notes, commands = _notes(sweep, table, rows, heads, by_key, published, ambiguous)
    return TableData(table.name, table.caption, labels, heads, tuple(rows), tuple(notes), tuple(commands))


def _members(cells: Sequence[Cell], side_by_side: bool) -> dict[str, dict[str, tuple[Cell, ...]]]:
    """The cells of each row, under the key of its first: model -> its cells, which differ in their seeds alone."""
    members: dict[str, dict[str, tuple[Cell, ...]]] = {}
    for row in replicates(cells, across_models=side_by_side):
        models = dict.fromkeys(cell.model.name for cell in row)
        members[cell_key(row[0])] = {name: tuple(cell for cell in row if cell.model.name == name) for name in models}
    return members


def _correlations(
    sweep: Sweep, table: Table, cells: Sequence[Cell], by_key: Mapping[str, Record], published: Published | None
) -> TableData:
    """Each column of the table as a row: Pearson's r of its metric with the mean of others, over cells."""
    wanted = table.correlation
    assert wanted is not None
    cells = [
        cell for cell in cells
        if not cell.method.is_baseline and (not wanted.bits or cell.scheme.weight.bits in wanted.bits)
        and (not wanted.methods or cell.method.name in wanted.methods)
    ]
    known = [by_key.get(cell_key(cell)) for cell in cells]
    metrics = [{} if record is None else record.metrics() for record in known]
    smoke = frozenset().union(*(record.smoke_metrics() for record in known if record is not None))
    over = [_mean(Column("mean", of=wanted.over), own) for own in metrics]
    printed = {row.label: row.values for row in published.rows} if published is not None else {}
    unknown = [unknown_name("published row", c.published, printed, f"table {table.name}") for c in table.columns
               if c.published and c.published not in printed]
    if unknown:
        raise ConfigError("\n".join(unknown))
    head = ColumnHead(Column("r", digits=3), "Pearson r", None, bool(printed))
    rows = []
    for column in table.columns:
        theirs = next(iter(printed.get(column.published, {}).values()), None)
        ours = [_mean(column, own) if column.metric == "mean" else own.get(column.metric) for own in metrics]
        pairs = [(x, y) for x, y in zip(over, ours, strict=True) if x is not None and y is not None]
        is_complete = len(pairs) == len(cells)
        number = pearson(pairs) if is_complete else None
        gap = "" if number is not None else "undefined" if is_complete else "missing"
        is_smoke = bool(smoke & {*wanted.over, column.metric, *column.of})
        agrees = None
        if number is not None and theirs is not None and len(pairs) > 3 and not is_smoke:
            low, high = correlation_interval(number, len(pairs))
            agrees = low - theirs.rounding <= theirs <= high + theirs.rounding
        value = Value(
            number, published=theirs, published_number=None if theirs is None else float(theirs), agrees=agrees, smoke=is_smoke,
            gap="unmeasured" if column.metric == PUBLISHED_ONLY else gap,
        )
        rows.append(Row((column.title or column.metric,), (value,)))
    heads = (head,)
    notes, commands = _notes(sweep, table, rows, heads, by_key, published, ())
    names = ", ".join(metric.partition("/")[0] for metric in wanted.over)
    notes.insert(0, f"r over {len(cells)} cells between each benchmark and the mean perplexity ({names}).")
    if any(row.values[0].gap == "undefined" for row in rows):
        notes.insert(1, f"{GAP} no r: fewer than three cells, or a side that is constant or diverged.")
    return TableData(table.name, table.caption, ("benchmark",), heads, tuple(rows), tuple(notes), tuple(commands))


def pearson(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Correlation of finite pairs; None for fewer than three, or where one side is constant or not finite."""
    if len(pairs) < 3 or not all(math.isfinite(number) for pair in pairs for number in pair):
        return None
    centres = [math.fsum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
    moved = [(x - centres[0], y - centres[1]) for x, y in pairs]
    squares = math.fsum(x * x for x, _ in moved) * math.fsum(y * y for _, y in moved)
    return math.fsum(x * y for x, y in moved) / math.sqrt(squares) if squares > 0 else None


def default_columns(cells: Sequence[Cell], by_key: Mapping[str, Record]) -> tuple[Column, ...]:
    """Columns of a sweep that names none: bits per weight, then the headline metric of every evaluation."""
    records = [by_key[key] for cell in cells if (key := cell_key(cell)) in by_key]
    size = Column("checkpoint/bits_per_weight", "bits/weight")
    return (size, *(Column(metric, digits=4 if metric.endswith("/acc") else 2) for metric in headline(records)))


def headline(records: Iterable[Record]) -> list[str]:
    """The first metric of each evaluation that any record has a score of: perplexity, acc, …; in order of appearance."""
    found: dict[str, None] = {}
    for record in records:
        for name in record.scores:
            metrics = record.scores[name]["metrics"]
            if metrics:
                preferred = [m for m in metrics if m.rsplit("/", 1)[-1] in ("perplexity", "acc", "exact_match")]
                found.setdefault((preferred or list(metrics))[0])
    return list(found)


def quality_metrics(sweep: Sweep, records: Iterable[Record]) -> list[str]:
    """What a sweep is about: the scores its tables show, or the headline of every evaluation where it has no tables."""
    shown = [c.metric for table in sweep.tables for c in table.columns if c.metric not in ("mean", PUBLISHED_ONLY)]
    return list(dict.fromkeys(m for m in shown if not m.startswith(("checkpoint/", "quantize/")))) or headline(records)


def better_is_higher(metric: str, cells: Iterable[Cell] = ()) -> bool | None:
    """Whether larger is better, as the evaluator of the metric says in its literals; None where nobody says."""
    short = metric.rpartition("/")[2]
    for cell in cells:
        for evaluation in cell.evaluations:
            own = metric.removeprefix(f"{evaluation.name}/")
            if own != metric:
                found = plugins.find("evaluator").get(evaluation.evaluator)
                short = own.partition("/")[0]               # "exact_match/strict-match" is an exact_match
                says = (found.get("metrics", {}) if found else {}).get(short, {}).get("higher_is_better")
                if says is not None:
                    return bool(says)
    if short in LOWER_IS_BETTER:
        return False
    return True if short in ("acc", "acc_norm", "exact_match") else None


def compare_cells(
    rows: Sequence[Sequence[Cell]], by_key: Mapping[str, Record], metrics: Sequence[str], store: Store
) -> dict[tuple[str, str], Comparison]:
    """(key of a row's first cell, metric) -> paired test against the cells' baseline, Holm over all.

    rows: cells that differ in their seeds alone stand together and are tested as one. Left out: what has no items, or other items
    or weights than its baseline.
    """
    raw: dict[tuple[str, str], Comparison] = {}
    columns: dict[tuple[str, str], Items | None] = {}

    def column(key: str, metric: str) -> Items | None:
        if (key, metric) not in columns:
            columns[key, metric] = _items(by_key[key], metric, store) if key in by_key else None
        return columns[key, metric]

    for row in rows:
        keys, reference = [cell_key(cell) for cell in row], cell_key(baseline_of(row[0]))
        if reference in keys:
            continue
        for metric in metrics:
            theirs = column(reference, metric)
            ours = [each for key in keys if (each := column(key, metric)) is not None]
            if theirs is None or len(ours) < len(keys) or any(set(each.values) != set(theirs.values) for each in ours):
                continue
            if any(each.weights != theirs.weights for each in ours):
                continue
            names = list(theirs.values)
            weights = None if theirs.weights is None else [theirs.weights[name] for name in names]
            found = compare_seeds([[each.values[name] for name in names] for each in ours], list(theirs.values.values()), weights)
            if found is not None:
                raw[keys[0], metric] = found
    adjusted = holm({name: comparison.p_value for name, comparison in raw.items()})
    return {name: replace(comparison, adjusted=adjusted[name]) for name, comparison in raw.items()}


@dataclass(frozen=True)
class Items:
    """Item results of one metric by id, and what each item counts; weights None: all the same."""

    values: dict[Any, float]
    weights: dict[Any, float] | None = None


def _items(record: Record, metric: str, store: Store) -> Items | None:
    """Item results of one metric by id; None where the evaluation kept none of it."""
    evaluation = _evaluation_of(record, metric)
    items = None if evaluation is None else store.evaluation_items(record, evaluation)
    if items is None or evaluation is None or "id" not in items or items["id"].duplicated().any():
        return None
    if metric.startswith(f"{evaluation.name}/"):
        own = metric.removeprefix(f"{evaluation.name}/")
    else:                                       # one task of a group of tasks
        task, _, own = metric.partition("/")
        if "task" not in items or task not in set(items["task"]):
            return None
        items = items[items["task"] == task]
    for name in (own, *ITEM_COLUMNS.get(own, ())):
        if name in items:
            found = {column: dict(zip(items["id"], map(float, items[column]), strict=True))
                     for column in (name, ITEM_WEIGHTS.get(name, "")) if column in items}
            return Items(found[name], found.get(ITEM_WEIGHTS.get(name, "")))
    return None


def _evaluation_of(record: Record, metric: str) -> Evaluation | None:
    names = [name for name, score in record.scores.items() if metric in score["metrics"]]
    return next((e for e in reversed(record.cell.evaluations) if e.name in names), None)


def _ordered(cells: Sequence[Cell]) -> list[Cell]:
    """Model by model, each model's baseline first, else in the sweep's order."""
    models = list(dict.fromkeys(cell.model.name for cell in cells))
    return sorted(cells, key=lambda cell: (models.index(cell.model.name), not cell.method.is_baseline))


def _published_folders(sweep: Sweep) -> list[Path]:
    return [] if sweep.path is None else [sweep.path.parent / "published"]


def _head(column: Column, cells: Sequence[Cell], published: Published | None) -> ColumnHead:
    direction = column.higher_is_better
    if direction is None and published is not None and column.published:
        direction = published.higher_is_better.get(column.published)
    if direction is None:
        directions = {better_is_higher(metric, cells) for metric in (column.of if column.metric == "mean" else (column.metric,))}
        direction = directions.pop() if len(directions) == 1 else None
    arrow = "" if direction is None else " ↑" if direction else " ↓"
    return ColumnHead(column, (column.title or column.metric) + arrow, direction, bool(published and column.published))


def _value(
    head: ColumnHead, records: Sequence[Record | None], row: PublishedRow | None, published: Published | None,
    found: Comparison | None,
) -> Value:
    """records: of the cells that stand here together, one per seed. A mean over seeds needs all of them."""
    column = head.column
    if column.metric == PUBLISHED_ONLY:
        printed, theirs = _published_number(head, row, published)
        return Value(published=printed, published_number=theirs, gap="unmeasured")
    known = [record for record in records if record is not None]
    metrics = [record.metrics() for record in known]
    numbers = [_mean(column, own) if column.metric == "mean" else own.get(column.metric) for own in metrics]
    there = [number * column.scale for number in numbers if number is not None]
    number, half_width = over_seeds(there) if there and len(there) == len(records) else (None, None)
    errors = [error * column.scale for own in metrics if (error := _stderr(column, own)) is not None]
    half_width = half_width if len(set(there)) > 1 else None
    smoke = any(record.smoke_metrics() & {column.metric, *column.of} for record in known)
    printed, theirs = _published_number(head, row, published)
    failed = any(record.failures for record in known)
    agrees = None
    if number is not None and printed is not None and theirs is not None and not smoke:
        over_items = 1.96 * math.fsum(errors) / len(errors) if errors else 0.0      # seeds share their items
        agrees = _agrees(column, number, math.hypot(over_items, half_width or 0), printed, theirs)
    return Value(
        number=number,
        stderr=errors[0] if errors and len(records) == 1 else None,
        seeds=max(1, len(records)),
        half_width=half_width,
        published=printed,
        published_number=theirs,
        agrees=agrees,
        comparison=found,
        smoke=smoke,
        gap="" if number is not None else "failed" if failed else "missing",
    )


def _published_number(
    head: ColumnHead, row: PublishedRow | None, published: Published | None
) -> tuple[Printed | None, float | None]:
    """As printed, and scaled like ours. A fraction beside our percent is shown as percent."""
    printed = row.values.get(head.column.published) if row is not None and head.column.published else None
    if printed is None or published is None:
        return None, None
    if head.column.published in published.fractions and head.column.scale == 100:
        printed = printed.percent
    return printed, float(printed)


def _agrees(column: Column, number: float, half_width: float, printed: Printed, theirs: float) -> bool:
    """Whether a number of ours is the published one, as far as its digits and our 95 % interval can tell.

    Perplexities above 10,000 on both sides are alike: such a model says nothing, and its number hangs on rounding.
    """
    if not math.isfinite(number):
        return False
    if _is_perplexity(column) and min(number, theirs) > SCIENTIFIC_FROM:
        return True
    return abs(number - theirs) <= printed.rounding + half_width + 1e-9


def _stderr(column: Column, metrics: Mapping[str, float]) -> float | None:
    """Standard error over items; of a mean over benchmarks, whose items are independent, that of their weighted mean."""
    if column.metric != "mean":
        return metrics.get(f"{column.metric}_stderr")
    errors = [metrics.get(f"{metric}_stderr") for metric in column.of]
    weights = column.weights or (1.0,) * len(column.of)
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    return math.hypot(*(w * error for w, error in zip(weights, known, strict=True))) / math.fsum(weights)


def _is_perplexity(column: Column) -> bool:
    return any(name.endswith("perplexity") for name in (column.metric, *column.of))


def _mean(column: Column, metrics: Mapping[str, float]) -> float | None:
    weights = column.weights or (1.0,) * len(column.of)
    if len(weights) != len(column.of) or not column.of:
        counts = f"{len(column.of)} metrics in `of`, {len(weights)} in `weights`"
        raise ConfigError(f'column "{column.title or "mean"}": {counts}; give one weight per metric')
    if any(metric not in metrics for metric in column.of):
        return None
    values = [metrics[metric] for metric in column.of]
    if not all(math.isfinite(value) for value in values):
        return math.nan
    return math.fsum(w * value for w, value in zip(weights, values, strict=True)) / math.fsum(weights)


def _mark_best(rows: Sequence[Row], heads: Sequence[ColumnHead]) -> list[Row]:
    """Best of each column among cells of one model and equal bit widths; equal when printed is equal."""
    best: dict[tuple[Any, int], str] = {}       # (group, column) -> printed number
    for index, head in enumerate(heads):
        if head.column.metric.startswith("checkpoint/"):
            continue                            # a size is a price paid, not a quality reached
        groups: dict[Any, list[Value]] = {}
        for row in rows:
            number = row.values[index].number
            if row.cell is not None and not row.baseline and number is not None and math.isfinite(number):
                groups.setdefault(_bits_group(row.cell), []).append(row.values[index])
        for group, values in groups.items():
            numbers = [value.number for value in values if value.number is not None]
            if head.higher_is_better is not None and len({_text(number, head.column) for number in numbers}) > 1:
                best[group, index] = _text((max if head.higher_is_better else min)(numbers), head.column)
    marked = []
    for row in rows:
        group = None if row.cell is None or row.baseline else _bits_group(row.cell)
        texts = [None if v.number is None else _text(v.number, heads[i].column) for i, v in enumerate(row.values)]
        is_best = [text is not None and text == best.get((group, i)) for i, text in enumerate(texts)]
        marked.append(replace(row, values=tuple(replace(v, best=b) for v, b in zip(row.values, is_best, strict=True))))
    return marked


def _bits_group(cell: Cell) -> tuple[Any, ...]:
    scheme = cell.scheme
    return cell.model.name, scheme.weight.bits, scheme.activation and scheme.activation.bits, scheme.kv and scheme.kv.bits


def _in_published_order(
    rows: Sequence[Row],
    table: Table,
    published: Published,
    matches: Mapping[str, PublishedRow],
    heads: Sequence[ColumnHead],
    labels: Sequence[str],
) -> list[Row]:
    """Rows in the paper's order, those it has and we lack among them; our further cells last in each model.

    Models of the paper that the sweep has no cell of follow, unless the table is about some models only.
    """
    ordered: list[Row] = []
    seen: set[int] = set()

    def alone(row: PublishedRow, model: str) -> list[Row]:
        values = tuple(_absent(head, row, published) for head in heads)
        if all(value.published is None for value in values):
            return []
        texts = _published_labels(row)
        return [Row(tuple(texts[label] for label in labels), values, model=model, baseline=_is_baseline(row))]

    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        cell = next(row.cell for row in own if row.cell is not None)
        for published_row in published.rows:
            if not same_model(cell, published, published_row):
                continue
            seen.add(id(published_row))
            found = [row for row in own if matches.get(row.cell_key) is published_row]
            ordered += found or alone(published_row, model)
        ordered += [row for row in own if row.cell_key not in matches]
    if not table.models:
        for published_row in published.rows:
            if id(published_row) not in seen and (published_row.model or table.absent):
                ordered += alone(published_row, published_row.model or published.models[0])
    return ordered


def _is_baseline(row: PublishedRow) -> bool:
    return re.sub(r"[^a-z0-9]", "", row.method.lower()) in BASELINES


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
    """Heads and texts of the label columns; "variant" says what differs within a method, and tells equal labels apart."""
    texts: dict[str, tuple[str, ...]] = {}
    for cell in cells:
        texts[cell_key(cell)] = (cell.method.name, bits_text(cell), group_text(cell))
    differing = variants(cells, by_scheme=False)
    if not differing:
        return ("method", "bits", "group"), texts
    return ("method", "bits", "group", "variant"), {key: (*text, differing.get(key, "")) for key, text in texts.items()}


def _with_variants(
    labels: tuple[str, ...], texts: dict[str, tuple[str, ...]], cells: Sequence[Cell], table: Table, published: Published | None
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """With a column "variant" where the published rows need one to be told apart; cells are then called as the paper calls them."""
    rows = [] if published is None else published.rows
    alike = [(row.model, row.method, row.weight_bits, row.activation_bits, row.group_size) for row in rows]
    if "variant" in labels or len(set(alike)) == len(alike):
        return labels, texts
    called: dict[str, tuple[str, ...]] = {}
    for cell in cells:
        method, *others = texts[cell_key(cell)]
        variant = table.methods.get(method, "")
        called[cell_key(cell)] = (method.partition("[")[0] if variant else method, *others, variant)
    return (*labels, "variant"), called


def command_line(sweep: Sweep, command: str = "run") -> str:
    """What runs the sweep again (finished work is not repeated), or shows its table."""
    words = [] if sweep.path is None else [sweep.name if sweep.path.parent.name == "sweeps" else str(sweep.path)]
    return without_password(shlex.join(["harness", command, *words, *sweep.overrides]))


def without_password(text: str) -> str:
    """Text with the user and password left out of every address: what is shown or tracked goes through here."""
    return re.sub(r"(://)[^/\s]+@", r"\1", text)


def _notes(
    sweep: Sweep,
    table: Table,
    rows: Sequence[Row],
    heads: Sequence[ColumnHead],
    by_key: Mapping[str, Record],
    published: Published | None,
    ambiguous: Sequence[str],
) -> tuple[list[str], list[str]]:
    values = [value for row in rows for value in row.values]
    notes: list[str] = []
    if any(value.best for value in values):
        notes.append("Bold: best of its model and bit widths.")
    if any(value.comparison is not None for value in values):
        count = sum(value.comparison is not None for value in values)
        notes.append(f"≈ no difference from the baseline shown (paired test over the items, Holm over {count} tests, 5 %).")
    if any(value.half_width is not None for value in values):
        notes.append("± half of the 95 % interval of the mean over seeds (Student's t); tests draw seeds as well as items.")
    limits = sorted({e.limit for row in rows if row.cell for e in row.cell.evaluations if e.limit is not None})
    if any(value.smoke for value in values):
        listed = f" (first {', '.join(map(str, limits))} items)" if limits else ""
        notes.append(f"† smoke run: stands on a part of the data only{listed}; not comparable with published numbers.")
    if published is not None and any(value.published is not None for value in values):
        notes.append(f"Published: {published.paper}, {published.source}. Δ is ours minus published.")
    if table.absent:
        notes.append(f"Published numbers alone: {table.absent}")
    elif any(value.gap == "absent" for value in values):
        notes.append("Rows with a published number alone are not in this sweep.")
    notes += [f"{c.title}: published numbers alone; {c.reason}." for c in table.columns if c.metric == PUBLISHED_ONLY and c.reason]
    notes += _verdicts(table, rows, heads, published)
    notes += ambiguous
    for row in rows:
        for key in (row.cell_key, *row.others):
            record = by_key.get(key)
            if record is not None and record.failures and any(value.gap == "failed" for value in row.values):
                reason = record.failures[-1].get("reason", "")
                notes.append(f"{record.cell.title} failed: {reason} (harness show {key[:12]}).")
    waiting = sum(any(value.gap in ("missing", "failed") for value in row.values) for row in rows)
    commands = [command_line(sweep)] if waiting else []
    if waiting:
        notes.append(f"{GAP} not there yet, in {waiting} {'row' if waiting == 1 else 'rows'}; fill with:")
    return notes, commands


def _verdicts(table: Table, rows: Sequence[Row], heads: Sequence[ColumnHead], published: Published | None) -> list[str]:
    """How many numbers agree with the published ones, and each difference of protocol with the rows whose ≠ it could explain."""
    compared = [value.agrees for row in rows for value in row.values if value.agrees is not None]
    differing = {(at, i): row for at, row in enumerate(rows) for i, value in enumerate(row.values) if value.agrees is False}
    interval = "over cells (Fisher's z)" if table.correlation is not None else "over items and seeds"
    alike = "" if table.correlation is not None else " Perplexities above 10,000 are alike."
    notes = []
    if compared:
        notes.append(
            f"Verdict: {len(compared) - len(differing)} of {len(compared)} numbers agree with the published ones; "
            + (f"{len(differing)} (≠) differ" if differing else "none differs")
            + f" by more than the published rounding and our 95 % interval {interval}.{alike}"
        )
    unexplained = dict(differing)
    for line in table.protocol:
        could = {at: row for at, row in differing.items() if _explains(line, table, row, heads[at[1]], heads, rows, published)}
        for at in could:
            unexplained.pop(at, None)
        notes.append(f"Protocol{f' (could explain ≠ of {_some(could.values())})' if could else ''}: {line}")
    if unexplained:
        notes.append(f"≠ of {_some(unexplained.values())}: no difference of protocol is noted that could explain it.")
    return notes


def _some(rows: Iterable[Row]) -> str:
    names = list(dict.fromkeys(" ".join(label for label in row.labels[:3] if label) for row in rows))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _explains(
    line: str, table: Table, row: Row, head: ColumnHead, heads: Sequence[ColumnHead], rows: Sequence[Row],
    published: Published | None,
) -> bool:
    """Whether a difference of protocol is about a number. "GPTQ: …" and "C4 and PTB: …" are about their rows and columns alone,
    "calibration: …" about the methods that are calibrated, others about everything."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    words = {plain(word) for word in re.findall(r"[\w.()-]+", line.partition(": ")[0])} if ": " in line else set()
    if "calibration" in words and row.cell is not None and not row.cell.method.needs:
        return False
    known = {plain(each.method) for each in (published.rows if published is not None else ())}
    known |= {plain(each.labels[0]) for each in rows} | set(map(plain, table.methods.values()))
    own = {plain(row.labels[0]), plain(row.cell.method.name if row.cell else ""), plain(table.methods.get(row.labels[0], ""))}
    columns = {name for each in heads for name in _column_words(each, plain)}
    asked_rows, asked_columns = words & known, words & columns
    return (not asked_rows or bool(asked_rows & own)) and (not asked_columns or bool(asked_columns & _column_words(head, plain)))


def _column_words(head: ColumnHead, plain: Callable[[str], str]) -> set[str]:
    return {plain(word) for word in (head.column.title, *head.column.title.split())} - {""}


# -- rendering ---------------------------------------------------------------------------------------------------------


def _text(number: float, column: Column) -> str:
    if not math.isfinite(number):
        return "diverged"
    if _is_perplexity(column) and abs(number) > SCIENTIFIC_FROM:
        return _scientific(number)
    return f"{number:.{column.digits}f}"


def _scientific(number: float) -> str:
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _difference_text(value: Value, column: Column) -> str:
    mark = "≠" if value.agrees is False else ""
    if value.published is None or value.difference is None or not math.isfinite(value.difference):
        return mark
    text = _text(value.difference, column)
    if float(text) == 0:
        return text.lstrip("-") + mark
    return (text if text.startswith("-") else f"+{text}") + mark


def _ours_text(value: Value, column: Column) -> str:
    if value.number is None:
        return "" if value.gap == "absent" else GAP
    tie = "≈" if value.comparison is not None and not value.comparison.differs else ""
    spread = "" if value.half_width is None else f" ± {_text(value.half_width, column)}"
    return _text(value.number, column) + spread + tie + ("†" if value.smoke else "")


def build_all(sweep: Sweep, records: Iterable[Record], store: Store | None = None) -> dict[str, TableData]:
    """Every table of a sweep by name."""
    known = list(records)
    return {table.name: build(sweep, table, known, store) for table in sweep.shown_tables}


def _grid(data: TableData, bold: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    """Heads and texts of every printed column; bold is put around the best."""
    heads = list(data.labels)
    for head in data.columns:
        heads += [head.title, "published", "Δ"] if head.published else [head.title]
    lines = []
    for row in data.rows:
        line = list(row.labels)
        for head, value in zip(data.columns, row.values, strict=True):
            ours = _ours_text(value, head.column)
            line.append(f"{bold[0]}{ours}{bold[1]}" if value.best else ours)
            if head.published:
                line += [value.published.text if value.published is not None else "", _difference_text(value, head.column)]
        lines.append(line)
    return heads, lines


def render(data: TableData, format: str = "md", links: Mapping[str, str] | None = None) -> str:
    """The table as text: md, latex, csv (full precision) or html. Ends with a newline.

    links: cell_key -> an address; HTML then links every number to the cell that made it, Markdown every row's name.
    """
    if format not in FORMATS:
        raise ConfigError(unknown_name("table format", format, FORMATS))
    if format == "latex":
        return _latex(data)
    return _csv(data) if format == "csv" else (_markdown if format == "md" else _html)(data, links or {})


def _sections(data: TableData, lines: Sequence[list[str]]) -> list[tuple[str, list[list[str]]]]:
    """(heading, lines) for each model; no heading where the table has one model only."""
    sections: dict[str, list[list[str]]] = {}
    for row, line in zip(data.rows, lines, strict=True):
        sections.setdefault(row.model, []).append(line)
    return list(sections.items()) if len(sections) > 1 else [("", list(lines))]


def _markdown(data: TableData, links: Mapping[str, str]) -> str:
    heads, lines = _grid(data, ("**", "**"))
    for row, line in zip(data.rows, lines, strict=True):
        if row.cell_key in links:
            line[0] = f"[{line[0]}]({links[row.cell_key]})"
    heads = [head.replace("|", r"\|") for head in heads]
    lines = [[text.replace("|", r"\|") for text in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in [heads, *lines])) for i in range(len(heads))]
    left = len(data.labels)

    def print_line(texts: Sequence[str]) -> str:
        padded = [text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(texts, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join(f" {'-' * w} " if i < left else f" {'-' * (w - 1)}: " for i, w in enumerate(widths)) + "|"
    out = [f"**{data.caption or data.name}**", ""]
    for section, section_lines in _sections(data, lines):
        out += [f"{section}:", ""] if section else []
        out += [print_line(heads), rule, *(print_line(line) for line in section_lines), ""]
    out += [line for note in data.notes for line in (note, "")]
    out += [f"    {command}" for command in data.commands]
    return "\n".join(out).rstrip() + "\n"


LATEX_FIT = (                                   # a table larger than its page is shrunk
    r"\ifdim\wd0>\textwidth\sbox0{\resizebox{\textwidth}{!}{\usebox0}}\fi",
    r"\ifdim\dimexpr\ht0+\dp0\relax>0.7\textheight\sbox0{\resizebox*{!}{0.7\textheight}{\usebox0}}\fi",
    r"\usebox0",
)
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "—": "--", "–": "--", "…": r"\ldots{}", "\n": " ",
    "≈": r"$^{\approx}$", "†": r"$^{\dagger}$", "Δ": r"$\Delta$", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
    "·": r"$\cdot$", "×": r"$\times$", "−": "$-$", "<": "$<$", ">": "$>$", "≥": r"$\geq$", "≤": r"$\leq$", "|": "$|$",
    "±": r"$\pm$", "≠": r"$^{\neq}$", "α": r"$\alpha$", "λ": r"$\lambda$",
}


def latex_text(text: str) -> str:
    """Text for LaTeX: specials escaped, and what has no letter in its default encoding left as a question mark."""
    return "".join(LATEX.get(c, c if ord(c) < 0x250 else "?") for c in text)


def _latex_number(text: str) -> str:
    best = text.startswith("\x02")
    text = text.strip("\x02\x03")
    match = re.fullmatch(r"([+-]?)([0-9.]+)(?:e\+?(-?[0-9]+))?( ± [0-9.e]+)?([≈†≠]*)", text)
    if match is None:
        return latex_text(text)
    sign, mantissa, exponent, spread, marks = match.groups()
    marks = (spread or "") + marks
    power = rf"{{\times}}10^{{{exponent}}}" if exponent else ""
    number = f"${sign}{mantissa}{power}$" if sign or exponent else mantissa
    return (rf"\textbf{{{mantissa}{f'${power}$' if power else ''}}}" if best else number) + latex_text(marks)


def _latex(data: TableData) -> str:
    heads, lines = _grid(data, ("\x02", "\x03"))
    left = len(data.labels)
    out = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{latex_text(data.caption or data.name)}}}",
        rf"\sbox0{{\begin{{tabular}}{{{'l' * left}{'r' * (len(heads) - left)}}}",
        r"\toprule",
        " & ".join(latex_text(head) for head in heads) + r" \\",
    ]
    for section, section_lines in _sections(data, lines):
        out.append(r"\midrule")
        if section:
            out.append(rf"\multicolumn{{{len(heads)}}}{{l}}{{\emph{{{latex_text(section)}}}}} \\")
        for line in section_lines:
            out.append(" & ".join([*map(latex_text, line[:left]), *map(_latex_number, line[left:])]) + r" \\")
    out += [r"\bottomrule", r"\end{tabular}}%", *LATEX_FIT, r"\par\smallskip\raggedright\scriptsize"]
    out += [rf"\par {latex_text(note)}" for note in data.notes]
    out += [rf"\par\texttt{{{latex_text(command)}}}" for command in data.commands]
    return "\n".join([*out, r"\end{table}"]) + "\n"


def _flat(data: TableData) -> list[dict[str, Any]]:
    """One dictionary per row, numbers at full precision and scaled as printed."""
    flat = []
    for row in data.rows:
        line: dict[str, Any] = {"model": row.model}
        line |= dict(zip(data.labels, row.labels, strict=True))
        line["cell_key"] = row.cell_key
        for head, value in zip(data.columns, row.values, strict=True):
            name = head.column.title or head.column.metric
            line[name] = value.number
            line[f"{name} stderr"] = value.stderr
            line[f"{name} ±"] = value.half_width
            if head.published:
                line[f"{name} published"] = value.published_number
                line[f"{name} difference"] = value.difference
                line[f"{name} verdict"] = None if value.agrees is None else "agrees" if value.agrees else "differs"
            line[f"{name} p"] = value.comparison.adjusted if value.comparison else None
            line[f"{name} smoke"] = value.smoke or None
        flat.append(line)
    filled = {name for line in flat for name, value in line.items() if value is not None}
    optional = (" stderr", " ±", " p", " smoke")
    return [{n: v for n, v in line.items() if n in filled or not n.endswith(optional)} for line in flat]


def _csv(data: TableData) -> str:
    flat = _flat(data)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]) if flat else list(data.labels), lineterminator="\n")
    writer.writeheader()
    for line in flat:
        writer.writerow({n: "" if v is None else repr(v) if isinstance(v, float) else v for n, v in line.items()})
    return out.getvalue()


def frame(data: TableData) -> pandas.DataFrame:
    """The table for a notebook: numbers at full precision, p-values after Holm; captions and notes in `.attrs`."""
    import pandas

    table = pandas.DataFrame(_flat(data))
    table.attrs.update(caption=data.caption, notes=list(data.notes), commands=list(data.commands))
    return table


STYLE = """
body{font:14px/1.45 system-ui,sans-serif;color:#1c2733;background:#fff;margin:24px}
table{border-collapse:collapse}caption{caption-side:top;text-align:left;font-weight:600;font-size:16px;padding-bottom:8px}
th,td{padding:4px 12px;text-align:right;white-space:nowrap}th{border-bottom:2px solid #1c2733;cursor:pointer}
td{border-bottom:1px solid #e4e8ec}th.l,td.l{text-align:left}tr.base td{background:#f3f6f9}td.p,th.p{color:#66717d}
tr.section td{font-weight:600;border-bottom:1px solid #1c2733;padding-top:14px}
td.best{font-weight:700}td.agrees{color:#1b7a3d}td.differs{color:#b3261e;background:#fdecea}
a{color:inherit;text-decoration:none}a:hover{text-decoration:underline}
p{max-width:80ch;margin:8px 0}code{background:#f3f6f9;padding:2px 6px}
"""
SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const index = head.cellIndex, up = head.dataset.up !== "1";
  head.dataset.up = up ? "1" : "";
  const key = row => { const text = row.cells[index].textContent, n = parseFloat(text); return isNaN(n) ? text : n };
  for (const body of document.querySelectorAll("tbody")) {
    const rows = [...body.rows].filter(row => !row.classList.contains("section"));
    rows.sort((a, b) => {
      const x = key(a), y = key(b);
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
    });
    body.append(...rows);
  }
};
"""


def _html(data: TableData, links: Mapping[str, str]) -> str:
    heads, lines = _grid(data, ("\x02", "\x03"))
    left = len(data.labels)
    quiet = {left + i for i, head in enumerate(heads[left:]) if head in ("published", "Δ")}

    makers: list[int | None] = []               # printed column -> column of the table, None beside it
    verdicts: list[int | None] = []             # the same for the columns of differences
    for position, head in enumerate(data.columns):
        makers += [position, None, None] if head.published else [position]
        verdicts += [None, None, position] if head.published else [None]

    def classes(index: int, text: str, row: Row | None = None) -> str:
        names = [n for n, on in (("l", index < left), ("p", index in quiet), ("best", text.startswith("\x02"))) if on]
        column = verdicts[index - left] if row is not None and index >= left else None
        agrees = row.values[column].agrees if row is not None and column is not None else None
        names += [] if agrees is None else ["agrees" if agrees else "differs"]
        return f' class="{" ".join(names)}"' if names else ""

    def entry(row: Row, index: int, text: str) -> str:
        """A number of ours says on hovering which cell made it, and leads there where links are known."""
        shown, column = html.escape(text.strip("\x02\x03")), makers[index - left] if index >= left else None
        key = "" if column is None or not shown else row.values[column].cell_key
        if key in links:
            shown = f'<a href="{html.escape(links[key])}" target="_blank">{shown}</a>'
        hint = f' title="harness show {key[:12]}"' if key else ""
        return f"<td{classes(index, text, row)}{hint}>{shown}</td>"

    title = html.escape(data.caption or data.name)
    out = [f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>']
    out += [f"<style>{STYLE}</style></head><body>"]
    out += [f"<table><caption>{title}</caption><thead><tr>"]
    out += [f"<th{classes(i, head)}>{html.escape(head)}</th>" for i, head in enumerate(heads)]
    out += ["</tr></thead>"]
    rows = {id(line): row for row, line in zip(data.rows, lines, strict=True)}
    for section, section_lines in _sections(data, lines):
        out.append("<tbody>")
        if section:
            out.append(f'<tr class="section"><td class="l" colspan="{len(heads)}">{html.escape(section)}</td></tr>')
        for line in section_lines:
            base = ' class="base"' if rows[id(line)].baseline else ""
            out.append(f"<tr{base}>{''.join(entry(rows[id(line)], i, text) for i, text in enumerate(line))}</tr>")
        out.append("</tbody>")
    out += ["</table>", *(f"<p>{html.escape(note)}</p>" for note in data.notes)]
    out += [f"<p><code>{html.escape(command)}</code></p>" for command in data.commands]
    return "\n".join([*out, f"<script>{SORT}</script></body></html>"]) + "\n"
