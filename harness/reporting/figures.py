"""Figures of a sweep. Loads without torch or Matplotlib.

    score against bits      a line per method and group, with 95 % intervals
    score against size      every cell at the size of its checkpoint, and the front that no smaller cell beats
    bits needed             per method, the fewest bits with which a score stays within one point of full precision
    perplexity, accuracy    one against the other over cells, with their correlation
    layer errors            heat map, cell × block: the output errors where Hessians were measured, else the weight errors

Cells that differ in their seeds alone are one point, their mean, with Student's interval over seeds. Methods, scores and units are
named as the sweep's tables in LaTeX name them; a method has a hue, a group a marker. `figures` makes those of a sweep,
`drawing.save` writes SVG, PDF and PNG.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.core.cell import Cell, cell_key
from harness.core.labels import baseline_title, group_text, method_title, replicates, variants
from harness.core.sweep import Column, Sweep
from harness.core.text import file_name
from harness.evaluation.statistics import over_seeds, pearson
from harness.reporting.drawing import (
    GREY,
    MARKER_POINTS,
    annotate,
    legend,
    log_axis,
    new_figure,
    style,
)
from harness.reporting.heat_maps import error_overview
from harness.reporting.metrics import better_is_higher, quality_metrics
from harness.storage.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BITS, SIZE = "checkpoint/bits_per_weight", "checkpoint/bytes"
# of models that were made smaller: what is stored, over the weights that there were
ORIGINAL_BITS = "checkpoint/bits_per_original_weight"
NAMES = {
    "perplexity": "perplexity",
    "acc": "accuracy",
    "acc_norm": "length-normalised accuracy",
    "exact_match": "exact match",
}
TOLERANCE = 0.01  # one point of accuracy; of a perplexity, one percent


@dataclass(frozen=True)
class Words:
    """What a sweep's tables call its methods and scores, and the units that they print.

    methods  name of a method -> what papers call it
    columns  metric -> the first column of a table that shows it
    """

    methods: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Column] = field(default_factory=dict)

    def scale(self, metric: str) -> float:
        """What a number is multiplied by, as in the table: 100 for percent."""
        return self.columns[metric].scale if metric in self.columns else 1.0

    def score(self, metric: str) -> str:
        """ "ARC-easy accuracy, %": the title of the table's column, what is measured, and its unit."""
        prefix, _, short = metric.rpartition("/")
        measured = NAMES.get(short, short)
        column = self.columns.get(metric)
        title = column.title if column is not None and column.title else prefix
        name = title if measured in title else f"{title} {measured}"
        return f"{name}, %" if self.scale(metric) == 100 else name

    def bits(self) -> str:
        """The axis of bits per weight."""
        column = self.columns.get(BITS)
        return f"{column.title if column is not None and column.title else 'bits per weight'} as stored"


def words_of(sweep: Sweep) -> Words:
    """The words of a sweep."""
    columns: dict[str, Column] = {}
    for table in sweep.tables:
        for column in table.columns:
            columns.setdefault(column.metric, column)
    return Words(sweep.method_titles, columns)


PLAIN = Words()


@dataclass(frozen=True)
class Point:
    """One cell in a figure, or several that differ in their seeds alone: means over them.

    method, group     what its method and what else tells its line apart are called, such as a group size; "" for a baseline
    hue, marker       the places of these two among those of all records
    records           of all its cells
    score, interval   the mean and half of its 95 % interval: over seeds, else from the standard error; 0 where neither is known
    bits, size        per weight as stored (`bits_axis`); bytes of the whole checkpoint
    """

    method: str
    group: str
    hue: int
    marker: int
    records: tuple[Record, ...]
    score: float
    interval: float
    bits: float
    size: float

    @property
    def cell(self) -> Cell:
        return self.records[0].cell

    @property
    def label(self) -> str:
        """What its line is called, "" for a baseline."""
        return " · ".join(filter(None, (self.method, self.group)))

    @property
    def title(self) -> str:
        """What the point itself is called: "GPTQ w4g128", "FP16"."""
        if self.cell.method.is_baseline:
            return baseline_title(self.cell.model.dtype, f"{self.bits:g}")
        return f"{self.method} {self.cell.scheme.name}"


def bits_axis(records: Iterable[Record], words: Words = PLAIN) -> tuple[str, str]:
    """The metric of the bits axis of a model's figures, and the label.

    Bits per weight of the quantized matrices; where a cell's reduction removed weights, all stored bits over the weights of the
    unreduced model, so that pruned and quantized cells stand on one axis.
    """
    if any(record.cell.method.reduction is not None for record in records):
        return ORIGINAL_BITS, "bits per weight of the unreduced model, everything stored counted"
    return BITS, words.bits()


def points(records: Sequence[Record], metric: str, words: Words = PLAIN) -> list[Point]:
    """Every point whose numbers are finite, in the records' order; seeds together, where all of them have the metric."""
    by_key = {cell_key(record.cell): record for record in records}
    rows = replicates(record.cell for record in records)
    labels = _labels([cells[0] for cells in rows], words)
    methods = list(dict.fromkeys(method for method, _ in labels.values()))
    groups = list(dict.fromkeys(group for _, group in labels.values()))
    stored = bits_axis(records)[0]
    made = []
    for cells in rows:
        method, group = labels.get(cell_key(cells[0]), ("", ""))
        own = [by_key[cell_key(cell)] for cell in cells]
        if not all(_finite(record, metric, stored, SIZE) for record in own):
            continue
        score, interval = over_seeds([record.metrics()[metric] for record in own])
        if interval is None:
            interval = 1.96 * own[0].metrics().get(f"{metric}_stderr", 0.0)
        bits, size = (
            math.fsum(record.metrics()[name] for record in own) / len(own)
            for name in (stored, SIZE)
        )
        hue, marker = (methods.index(method), groups.index(group)) if method else (0, 0)
        made.append(Point(method, group, hue, marker, tuple(own), score, interval, bits, size))
    return made


def figures(sweep: Sweep, records: Iterable[Record]) -> dict[str, Figure]:
    """Name -> figure for every score that the sweep is about and every model that has it; names are good file names.

    Cells whose score is not finite stay out of the figures; the tables name them.
    """
    drawn = {name: draw() for name, draw in recipes(sweep, records).items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def recipes(sweep: Sweep, records: Iterable[Record]) -> dict[str, Callable[[], Figure | None]]:
    """Name -> what draws the figure of that name, or returns None where the records have too little for it."""
    known = list(records)
    words = words_of(sweep)
    made: dict[str, Callable[[], Figure | None]] = {}
    models = list(dict.fromkeys(record.cell.model.name for record in known))
    for model in models:
        own = [record for record in known if record.cell.model.name == model]
        suffix = f"-{model}" if len(models) > 1 else ""
        metrics = quality_metrics(sweep, own)
        perplexities = [metric for metric in metrics if metric.endswith("/perplexity")]
        accuracies = [metric for metric in metrics if _in_points(metric)]
        drawn: dict[str, Callable[[], Figure | None]] = {
            f"{metric}-against-{name}": functools.partial(make, own, metric, words)
            for metric in metrics
            for name, make in (("bits", score_against_bits), ("size", score_against_size))
        }
        drawn |= {
            f"{metric}-bits-needed": functools.partial(bits_needed, own, metric, words)
            for metric in metrics
        }
        drawn |= {
            f"accuracy-against-{metric}": functools.partial(
                accuracy_against_perplexity, own, metric, accuracies, words
            )
            for metric in perplexities
        }
        drawn["layer-errors"] = functools.partial(error_overview, own, words.methods)
        made |= {file_name(f"{name}{suffix}"): draw for name, draw in drawn.items()}
    return made


def score_against_bits(
    records: Sequence[Record], metric: str, words: Words = PLAIN
) -> Figure | None:
    """One line per method and group over the bits per weight as stored, with 95 % intervals where they are known."""
    found = points(records, metric, words)
    if not any(not point.cell.method.is_baseline for point in found):
        return None
    figure, axes = new_figure(found[0].cell.model.name)
    scale = words.scale(metric)
    for label, group in _by_line(found).items():
        group.sort(key=lambda point: point.bits)
        intervals = [scale * point.interval for point in group]
        axes.errorbar(
            [point.bits for point in group],
            [scale * point.score for point in group],
            yerr=intervals if any(intervals) else None,
            label=label,
            **_style(group[0]) | {"linewidth": 1.5, "markersize": 5, "capsize": 3},
        )
    baseline = _baseline(found)
    if baseline is not None:
        axes.axhline(
            scale * baseline.score, color=GREY, linestyle="--", linewidth=1, label=baseline.title
        )
    _score_axis(axes, found, metric, words)
    axes.set_xlabel(bits_axis(records, words)[1])
    _legend(figure, axes, found)
    return figure


def score_against_size(
    records: Sequence[Record], metric: str, words: Words = PLAIN
) -> Figure | None:
    """Every cell at the size of its whole checkpoint; the front joins those that no smaller cell beats."""
    found = points(records, metric, words)
    higher = better_is_higher(metric, [point.cell for point in found])
    if len(found) < 2 or higher is None:
        return None
    figure, axes = new_figure(found[0].cell.model.name)
    scale = words.scale(metric)
    largest = max(point.size for point in found)
    unit, factor = next(
        (u, f)
        for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
        if largest >= f or f == 1.0
    )

    def place(point: Point) -> tuple[float, float]:
        return point.size / factor, scale * point.score

    _scatter(axes, found, place)
    best = front(found, higher)
    corners = [place(point) for point in best]
    axes.step(
        *zip(*corners, strict=True),
        where="post",
        color="#999999",
        linewidth=1,
        zorder=1,
        label="front",
    )
    _score_axis(axes, found, metric, words)
    axes.set_xlabel(f"size of the checkpoint, {unit}")
    _legend(figure, axes, found)
    annotate(figure, axes, corners, [point.title for point in best], list(map(place, found)))
    return figure


def front(found: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Points that no point of equal or smaller size beats, by size."""
    sign = -1.0 if higher_is_better else 1.0
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.size, sign * p.score)):
        if not best or sign * point.score < sign * best[-1].score:
            best.append(point)
    return best


def bits_needed(records: Sequence[Record], metric: str, words: Words = PLAIN) -> Figure | None:
    """Bars: per method, the fewest bits per weight with which it stays within one point of full precision, there and above.

    A point is one percent: of the questions for an accuracy, of full precision for a perplexity. A method none of whose cells stays
    within it has an open bar from its largest cell on.
    """
    found = points(records, metric, words)
    baseline = _baseline(found)
    higher = better_is_higher(metric, [point.cell for point in found])
    groups = _by_line(found)
    if (
        baseline is None
        or higher is None
        or not groups
        or not (_in_points(metric) or metric.endswith("/perplexity"))
    ):
        return None
    margin = TOLERANCE if _in_points(metric) else TOLERANCE * baseline.score
    needed = {
        label: _fewest_bits(group, baseline.score, margin, higher)
        for label, group in groups.items()
    }
    figure, axes = new_figure(found[0].cell.model.name, height=max(2.2, 1.4 + 0.34 * len(groups)))
    end = 1.2 * max(point.bits for group in groups.values() for point in group)
    for index, (label, group) in enumerate(groups.items()):
        colour, bits = _style(group[0])["color"], needed[label]
        if bits is None:
            most = max(point.bits for point in group)
            axes.barh(
                index,
                end - most,
                left=most,
                height=0.6,
                color="none",
                edgecolor=colour,
                linestyle=":",
                linewidth=1,
            )
            axes.text(
                (most + end) / 2,
                index,
                f"above {most:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="#555555",
            )
        else:
            axes.barh(index, bits, height=0.6, color=colour)
            axes.text(bits, index, f" {bits:.2f}", va="center", fontsize=9)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, end)
    unit = "one point" if _in_points(metric) else "one percent"
    axes.set_xlabel(
        f"{bits_axis(records, words)[1]} to stay within {unit} of {baseline.title}: {words.score(metric)}",
        fontsize=9,
    )
    return figure


def _fewest_bits(
    group: Sequence[Point], reference: float, margin: float, higher: bool
) -> float | None:
    """Bits of the smallest point from which on every larger one is within the margin too; None where the largest is not."""
    fewest = None
    for point in sorted(group, key=lambda p: -p.bits):
        loss = reference - point.score if higher else point.score - reference
        if loss > margin + 1e-12:
            break
        fewest = point.bits
    return fewest


def accuracy_against_perplexity(
    records: Sequence[Record], perplexity: str, accuracies: Sequence[str], words: Words = PLAIN
) -> Figure | None:
    """Every cell at its perplexity and the mean of its accuracies, with Pearson's r over cells: with log perplexity, as drawn."""
    found = [
        point
        for point in points(records, perplexity, words)
        if point.score > 0 and all(_finite(record, *accuracies) for record in point.records)
    ]
    if len(found) < 3 or not accuracies:
        return None
    scales = {words.scale(name) for name in accuracies}
    scale = scales.pop() if len(scales) == 1 else 1.0

    def accuracy(point: Point) -> float:
        own = [record.metrics() for record in point.records]
        total = math.fsum(metrics[name] for metrics in own for name in accuracies)
        return scale * total / (len(own) * len(accuracies))

    figure, axes = new_figure(found[0].cell.model.name)
    means = {id(point): accuracy(point) for point in found}
    _scatter(axes, found, lambda point: (point.score, means[id(point)]))
    logs = pearson([(math.log(point.score), means[id(point)]) for point in found])
    plain = pearson([(point.score, means[id(point)]) for point in found])
    if logs is not None and plain is not None:
        text = f"r = {logs.r:.3f} with log perplexity\nr = {plain.r:.3f} with perplexity\n{len(found)} cells"
        axes.text(
            0.03, 0.05, text, transform=axes.transAxes, fontsize=9, va="bottom", color="#333333"
        )
    log_axis(axes.set_xscale, axes.xaxis, [point.score for point in found])
    axes.set_xlabel(f"{words.score(perplexity)}, lower is better")
    several = f"mean accuracy of {len(accuracies)} tasks{', %' if scale == 100 else ''}"
    axes.set_ylabel(words.score(accuracies[0]) if len(accuracies) == 1 else several)
    _legend(figure, axes, found)
    return figure


def _style(point: Point) -> dict[str, Any]:
    return style(point.hue, point.marker)


def _scatter(
    axes: Axes, found: Sequence[Point], place: Callable[[Point], tuple[float, float]]
) -> None:
    """Every point at its place, the baseline in grey."""
    baseline = _baseline(found)
    for label, group in _by_line(found).items():
        looks = {name: value for name, value in _style(group[0]).items() if name != "linestyle"}
        across, up = zip(*map(place, group), strict=True)
        axes.scatter(across, up, s=MARKER_POINTS**2, zorder=3, label=label, **looks)
    if baseline is not None:
        x, y = place(baseline)
        axes.scatter(x, y, s=MARKER_POINTS**2, color=GREY, marker="p", label=baseline.title)


def _legend(figure: Figure, axes: Axes, found: Sequence[Point]) -> None:
    quantized = [point for point in found if point.method]
    legend(
        figure,
        axes,
        {point.method: point.hue for point in quantized},
        {point.group: point.marker for point in quantized},
        {point.label for point in quantized},
    )


def _labels(cells: Sequence[Cell], words: Words) -> dict[str, tuple[str, str]]:
    """cell_key -> (method, group): the method's name, and what else differs within it; activation and KV bits always."""
    quantized = [cell for cell in cells if not cell.method.is_baseline]
    groups = {group_text(cell) for cell in quantized}
    told = variants(quantized)
    labels = {}
    for cell in quantized:
        group = group_text(cell)
        parts = [f"g{group}" if group != "row" else "per row"] if len(groups) > 1 else []
        parts += [f"A{cell.scheme.activation.bits}"] if cell.scheme.activation else []
        parts += [cell.scheme.kv.text] if cell.scheme.kv else []
        parts.append(told.get(cell_key(cell), ""))
        name = method_title(cell.method.name, words.methods)
        labels[cell_key(cell)] = (name, " · ".join(filter(None, parts)))
    return labels


def _by_line(found: Sequence[Point]) -> dict[str, list[Point]]:
    """Label -> points, without baselines."""
    labelled: dict[str, list[Point]] = {}
    for point in found:
        if point.label:
            labelled.setdefault(point.label, []).append(point)
    return labelled


def _baseline(found: Sequence[Point]) -> Point | None:
    return next((point for point in found if point.cell.method.is_baseline), None)


def _in_points(metric: str) -> bool:
    return metric.rpartition("/")[2] in ("acc", "acc_norm", "exact_match")


def _score_axis(axes: Axes, found: Sequence[Point], metric: str, words: Words) -> None:
    higher = better_is_higher(metric, [point.cell for point in found])
    arrow = "" if higher is None else ", higher is better" if higher else ", lower is better"
    axes.set_ylabel(f"{words.score(metric)}{arrow}")
    if higher is False:
        scores = [words.scale(metric) * point.score for point in found]
        log_axis(axes.set_yscale, axes.yaxis, scores)


def _finite(record: Record, *metrics: str) -> bool:
    known = record.metrics()
    return all(math.isfinite(known.get(metric, math.nan)) for metric in metrics)
