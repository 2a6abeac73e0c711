"""Figures of a sweep. Loads without torch or Matplotlib.

    score against bits      a line per method, with 95 % intervals
    score against size      every cell at the size of its checkpoint, and the front that no smaller cell beats
    bits needed             per method, the fewest bits with which a score stays within one point of full precision
    perplexity, accuracy    one against the other over cells, with their correlation
    layer errors            heat map, cell × block: the output errors where Hessians were measured, else the weight errors

Cells that differ in their seeds alone are one point, their mean, with Student's interval over seeds. `figures` makes those of a
sweep, `save` writes SVG, PDF and PNG. Nothing is shown on a screen and no global state of Matplotlib is touched, so that a
notebook's own style survives.
"""

from __future__ import annotations

import functools
import math
import statistics
import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.cell import Cell, cell_key
from harness.core.labels import budget_of, group_text, replicates, variants
from harness.core.sweep import Sweep
from harness.core.text import file_name
from harness.evaluation.statistics import over_seeds, pearson
from harness.reporting.metrics import (
    LAYER_ERRORS,
    better_is_higher,
    layer_error_name,
    quality_metrics,
)
from harness.storage.atomic_write import write_aside
from harness.storage.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which colour-blind readers tell apart, then three more
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#6a51a3",
    "#8c6d31",
    "#b22222",
)
MARKERS = "osD^vPX*h"
FULL_PRECISION = "full precision"
BITS, SIZE = "checkpoint/bits_per_weight", "checkpoint/bytes"
NAMES = {
    "perplexity": "perplexity",
    "acc": "accuracy",
    "acc_norm": "length-normalised accuracy",
    "exact_match": "exact match",
}
TOLERANCE = 0.01  # one point of accuracy; of a perplexity, one percent
OVERVIEW_ROWS = 60  # cells in the overview of layer errors
LETTERS_PER_INCH = 14  # of a label at 9 points


# Matplotlib's settings are those of the whole process, and tracking has a thread
_writing = threading.Lock()


@dataclass(frozen=True)
class Point:
    """One cell in a figure, or several that differ in their seeds alone: means over them.

    label, line       what its line is called, "" for a baseline; the place of the line among those of all records
    records           of all its cells
    score, interval   the mean and half of its 95 % interval: over seeds, else from the standard error; 0 where neither is known
    bits, size        per weight as stored; bytes of the whole checkpoint
    """

    label: str
    line: int
    records: tuple[Record, ...]
    score: float
    interval: float
    bits: float
    size: float

    @property
    def cell(self) -> Cell:
        return self.records[0].cell


def points(records: Sequence[Record], metric: str) -> list[Point]:
    """Every point whose numbers are finite, in the records' order; seeds together, where all of them have the metric."""
    by_key = {cell_key(record.cell): record for record in records}
    rows = replicates(record.cell for record in records)
    labels = _labels([cells[0] for cells in rows])
    lines = list(dict.fromkeys(labels.values()))
    made = []
    for cells in rows:
        label = labels.get(cell_key(cells[0]), "")
        own = [by_key[cell_key(cell)] for cell in cells]
        if not all(_finite(record, metric, BITS, SIZE) for record in own):
            continue
        score, interval = over_seeds([record.metrics()[metric] for record in own])
        if interval is None:
            interval = 1.96 * own[0].metrics().get(f"{metric}_stderr", 0.0)
        bits, size = (
            math.fsum(record.metrics()[name] for record in own) / len(own) for name in (BITS, SIZE)
        )
        made.append(
            Point(
                label, lines.index(label) if label else 0, tuple(own), score, interval, bits, size
            )
        )
    return made


def figures(sweep: Sweep, records: Iterable[Record]) -> dict[str, Figure]:
    """Name -> figure for every score that the sweep is about and every model that has it; names are good file names.

    Cells whose score is not finite stay out of the figures; the tables name them.
    """
    known = list(records)
    made: dict[str, Figure] = {}
    models = list(dict.fromkeys(record.cell.model.name for record in known))
    for model in models:
        own = [record for record in known if record.cell.model.name == model]
        suffix = f"-{model}" if len(models) > 1 else ""
        metrics = quality_metrics(sweep, own)
        drawn = {
            f"{metric}-against-{name}": make(own, metric)
            for metric in metrics
            for name, make in (("bits", score_against_bits), ("size", score_against_size))
        }
        drawn |= {f"{metric}-bits-needed": bits_needed(own, metric) for metric in metrics}
        perplexities = [metric for metric in metrics if metric.endswith("/perplexity")]
        accuracies = [metric for metric in metrics if _in_points(metric)]
        drawn |= {
            f"accuracy-against-{metric}": accuracy_against_perplexity(own, metric, accuracies)
            for metric in perplexities
        }
        drawn["layer-errors"] = error_overview(own)
        made |= {
            file_name(f"{name}{suffix}"): figure
            for name, figure in drawn.items()
            if figure is not None
        }
    return made


def score_against_bits(records: Sequence[Record], metric: str) -> Figure | None:
    """One line per method over the bits per weight as stored, with 95 % intervals where they are known."""
    found = points(records, metric)
    if not any(not point.cell.method.is_baseline for point in found):
        return None
    figure, axes = _figure(found[0].cell.model.name)
    for label, group in _by_method(found).items():
        group.sort(key=lambda point: point.bits)
        intervals = [point.interval for point in group]
        bars = intervals if any(intervals) else None
        style = _style(group[0].line) | {"linewidth": 1.5, "markersize": 5, "capsize": 3}
        axes.errorbar(
            [point.bits for point in group],
            [point.score for point in group],
            yerr=bars,
            label=label,
            **style,
        )
    baseline = _baseline(found)
    if baseline is not None:
        axes.axhline(
            baseline.score, color="#777777", linestyle="--", linewidth=1, label=FULL_PRECISION
        )
    _score_axis(axes, found, metric)
    axes.set_xlabel("bits per weight as stored (quantized matrices)")
    _legend(axes)
    return figure


def score_against_size(records: Sequence[Record], metric: str) -> Figure | None:
    """Every cell at the size of its whole checkpoint; the front joins those that no smaller cell beats."""
    found = points(records, metric)
    higher = better_is_higher(metric, [point.cell for point in found])
    if len(found) < 2 or higher is None:
        return None
    figure, axes = _figure(found[0].cell.model.name)
    largest = max(point.size for point in found)
    unit, factor = next(
        (u, f)
        for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
        if largest >= f or f == 1.0
    )
    for label, group in _by_method(found).items():
        sizes = [point.size / factor for point in group]
        axes.scatter(
            sizes,
            [point.score for point in group],
            s=36,
            zorder=3,
            label=label,
            **_style(group[0].line),
        )
    baseline = _baseline(found)
    if baseline is not None:
        axes.scatter(
            baseline.size / factor,
            baseline.score,
            label=FULL_PRECISION,
            color="#777777",
            marker="s",
            s=36,
        )
    best = front(found, higher)
    corners = [(point.size / factor, point.score) for point in best]
    axes.step(
        *zip(*corners, strict=True),
        where="post",
        color="#999999",
        linewidth=1,
        zorder=1,
        label="front",
    )
    _score_axis(axes, found, metric)
    axes.set_xlabel(f"size of the checkpoint, {unit}")
    _legend(axes)
    names = [
        FULL_PRECISION
        if p.cell.method.is_baseline
        else f"{p.cell.method.name} {p.cell.scheme.name}"
        for p in best
    ]
    _annotate(figure, axes, corners, names)
    return figure


def front(found: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Points that no point of equal or smaller size beats, by size."""
    sign = -1.0 if higher_is_better else 1.0
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.size, sign * p.score)):
        if not best or sign * point.score < sign * best[-1].score:
            best.append(point)
    return best


def bits_needed(records: Sequence[Record], metric: str) -> Figure | None:
    """Bars: per method, the fewest bits per weight with which it stays within one point of full precision, there and above.

    A point is one percent: of the questions for an accuracy, of full precision for a perplexity. A method none of whose cells stays
    within it has an open bar from its largest cell on.
    """
    found = points(records, metric)
    baseline = _baseline(found)
    higher = better_is_higher(metric, [point.cell for point in found])
    groups = _by_method(found)
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
    figure, axes = _figure(found[0].cell.model.name, height=max(2.2, 1.4 + 0.34 * len(groups)))
    end = 1.2 * max(point.bits for group in groups.values() for point in group)
    for index, (label, group) in enumerate(groups.items()):
        colour, bits = _style(group[0].line)["color"], needed[label]
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
    prefix, short = metric.rpartition("/")[::2]
    unit = "one point" if _in_points(metric) else "one percent"
    axes.set_xlabel(
        f"bits per weight to stay within {unit} of full precision: {prefix} {NAMES.get(short, short)}",
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
    records: Sequence[Record], perplexity: str, accuracies: Sequence[str]
) -> Figure | None:
    """Every cell at its perplexity and the mean of its accuracies, with Pearson's r over cells: with log perplexity, as drawn."""
    found = [
        point
        for point in points(records, perplexity)
        if point.score > 0 and all(_finite(record, *accuracies) for record in point.records)
    ]
    if len(found) < 3 or not accuracies:
        return None

    def accuracy(point: Point) -> float:
        own = [record.metrics() for record in point.records]
        return math.fsum(metrics[name] for metrics in own for name in accuracies) / (
            len(own) * len(accuracies)
        )

    figure, axes = _figure(found[0].cell.model.name)
    means = {id(point): accuracy(point) for point in found}
    for label, group in _by_method(found).items():
        style = _style(group[0].line) | {"s": 36, "zorder": 3}
        axes.scatter(
            [point.score for point in group],
            [means[id(point)] for point in group],
            label=label,
            **style,
        )
    baseline = _baseline(found)
    if baseline is not None:
        axes.scatter(
            baseline.score,
            means[id(baseline)],
            label=FULL_PRECISION,
            color="#777777",
            marker="s",
            s=36,
        )
    logs = pearson([(math.log(point.score), means[id(point)]) for point in found])
    plain = pearson([(point.score, means[id(point)]) for point in found])
    if logs is not None and plain is not None:
        text = f"r = {logs.r:.3f} with log perplexity\nr = {plain.r:.3f} with perplexity\n{len(found)} cells"
        axes.text(
            0.03, 0.05, text, transform=axes.transAxes, fontsize=9, va="bottom", color="#333333"
        )
    _log_axis(axes.set_xscale, axes.xaxis, [point.score for point in found])
    axes.set_xlabel(f"{perplexity.rpartition('/')[0]} perplexity, lower is better")
    names = [metric.rpartition("/")[0] for metric in accuracies]
    axes.set_ylabel(
        f"{names[0]} accuracy" if len(names) == 1 else f"mean accuracy of {len(names)} tasks"
    )
    _legend(axes)
    return figure


def error_overview(records: Sequence[Record]) -> Figure | None:
    """Heat map of cells, cell × block: the mean error of a block's matrices, so that cells can be compared.

    Where some cells have output errors, which need the Hessians of calibration, these are drawn and the other cells are left out:
    GPTQ and its like trade larger weight errors for smaller output errors. Of more than OVERVIEW_ROWS cells, those with the largest
    mean are drawn: a figure of hundreds of rows cannot be read and fills the memory.
    """
    names = {record.cell_key: layer_error_name(record) for record in records}
    name = next((each for each in LAYER_ERRORS if each in names.values()), None)
    if name is None:
        return None
    known = [record for record in records if names[record.cell_key] == name]
    labels, grid = [], []
    blocks = sorted({int(row["block"]) for record in known for row in record.layer_errors})
    for record in known:
        values: dict[int, list[float]] = {}
        for row in record.layer_errors:
            if _positive(row.get(name)):
                values.setdefault(int(row["block"]), []).append(float(row[name]))
        if values:
            grid.append(
                [math.fsum(values[b]) / len(values[b]) if b in values else math.nan for b in blocks]
            )
            labels.append(
                " · ".join(
                    filter(
                        None,
                        (record.cell.method.name, record.cell.scheme.name, record.cell.variant),
                    )
                )
            )
    if not grid:
        return None
    title = known[0].cell.model.name
    if len(grid) > OVERVIEW_ROWS:
        title = f"{title}: {OVERVIEW_ROWS} of {len(grid)} cells, those with the largest error"
        means = [statistics.fmean(value for value in row if not math.isnan(value)) for row in grid]
        # in their order
        kept = sorted(sorted(range(len(grid)), key=lambda row: -means[row])[:OVERVIEW_ROWS])
        grid, labels = [grid[row] for row in kept], [labels[row] for row in kept]
    return _heat_map(
        grid, blocks, labels, title, f"{_error_text(name)}, {_unbroken('mean of a block')}"
    )


def diagnosis_map(linears: Sequence[Mapping[str, Any]], value: str, title: str) -> Figure:
    """Heat map of `harness diagnose`, block × matrix: one value of every linear's report on a logarithmic scale."""
    blocks = sorted({int(row["block"]) for row in linears})
    names = list(dict.fromkeys(str(row["linear"]) for row in linears))
    grid = [[math.nan] * len(blocks) for _ in names]
    for row in linears:
        grid[names.index(str(row["linear"]))][blocks.index(int(row["block"]))] = max(
            float(row[value]), 1e-12
        )
    texts = {
        "both": "relative error, both sides rounded",
        "weight_ratio": "max / median channel of |W|",
        "activation_ratio": "max / median channel of |x|",
        "grouped": "relative error in groups",
    }
    return _heat_map(
        grid, blocks, [name.rsplit(".", 1)[-1] for name in names], title, texts.get(value, value)
    )


def channel_magnitudes(channels: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Of one linear, the largest weight and the largest activation of each input channel; one set of bars above the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawn

    figure = Drawn(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (axes, name, text) in enumerate(
        zip(
            figure.subplots(2, 1, sharex=True),
            ("weights", "activations"),
            ("largest |W|", "largest |x|"),
            strict=True,
        )
    ):
        values = list(channels[name])
        axes.vlines(
            range(len(values)),
            1e-12,
            values,
            color=COLOURS[index],
            linewidth=max(0.5, min(3.0, 200 / len(values))),
        )
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5 * min(value for value in values if value > 0))
        axes.set_ylabel(text)
        axes.spines[["top", "right"]].set_visible(False)
        if not index:
            axes.set_title(title, loc="left", fontsize=11)
        else:
            axes.set_xlabel("input channel")
    return figure


def save(
    figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("svg", "pdf", "png")
) -> list[Path]:
    """Write the figure in each format; the same figure gives the same bytes. Returns the paths."""
    import matplotlib

    paths = []
    metadata: dict[str, dict[str, None]] = {
        "svg": {"Date": None},
        "pdf": {"CreationDate": None},
        "png": {},
    }
    with _writing, matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        for form in formats:
            path = folder / f"{name}.{form}"
            draw = functools.partial(
                figure.savefig, format=form, dpi=160, metadata=metadata.get(form, {})
            )
            write_aside(path, draw)
            paths.append(path)
    return paths


def _figure(title: str, width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _legend(axes: Axes) -> None:
    """Inside where few labels leave room, else to the right."""
    many = len(axes.get_legend_handles_labels()[0]) > 8
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}
    axes.legend(frameon=False, fontsize=8 if many else 9, **place)


def _annotate(
    figure: Figure, axes: Axes, corners: Sequence[tuple[float, float]], names: Sequence[str]
) -> None:
    """Names beside points, each at the first of four sides where it meets no other name; left out where there is none."""
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    legend = axes.get_legend()
    taken = [] if legend is None else [legend.get_window_extent()]
    for name, corner in zip(names, corners, strict=True):
        for shift, across, up in (
            ((6, 5), "left", "bottom"),
            ((6, -5), "left", "top"),
            ((-6, 5), "right", "bottom"),
            ((-6, -5), "right", "top"),
        ):
            text = axes.annotate(
                name,
                corner,
                shift,
                textcoords="offset points",
                fontsize=8,
                ha=across,
                va=up,
                color="#333333",
            )
            own = text.get_window_extent()
            if (
                not any(own.overlaps(other) for other in taken)
                and box.x0 <= own.x0
                and own.x1 <= box.x1
                and own.y1 <= box.y1
            ):
                taken.append(own)
                break
            text.remove()


def _labels(cells: Sequence[Cell]) -> dict[str, str]:
    """cell_key -> what its line is called. What differs within a method joins the name, activation and KV bits always."""
    quantized = [cell for cell in cells if not cell.method.is_baseline]
    groups = {group_text(cell) for cell in quantized if not budget_of(cell)[0]}
    told = variants(quantized)
    labels = {}
    for cell in quantized:
        mixed, _ = budget_of(cell)  # a line of its own for a budget over its sizes
        words = [mixed or cell.method.name]
        words += (
            [f"g{group_text(cell)}" if group_text(cell) != "row" else "per row"]
            if len(groups) > 1 and not mixed
            else []
        )
        words += [f"A{cell.scheme.activation.bits}"] if cell.scheme.activation else []
        words += [f"KV{cell.scheme.kv.bits}"] if cell.scheme.kv else []
        labels[cell_key(cell)] = " · ".join(filter(None, (*words, told.get(cell_key(cell), ""))))
    return labels


def _by_method(found: Sequence[Point]) -> dict[str, list[Point]]:
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


def _score_axis(axes: Axes, found: Sequence[Point], metric: str) -> None:
    prefix, _, short = metric.rpartition("/")
    higher = better_is_higher(metric, [point.cell for point in found])
    arrow = "" if higher is None else ", higher is better" if higher else ", lower is better"
    axes.set_ylabel(f"{prefix} {NAMES.get(short, short)}{arrow}")
    if higher is False:
        _log_axis(axes.set_yscale, axes.yaxis, [point.score for point in found])


def _log_axis(set_scale: Callable[[str], None], axis: Any, values: Sequence[float]) -> None:
    """Logarithmic where values span more than a factor of 3, with plain numbers at 1, 2 and 5 up to a factor of 1,000."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    if min(values) <= 0 or max(values) / min(values) <= 3:
        return
    set_scale("log")
    if max(values) / min(values) < 1e3:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())


def _heat_map(
    grid: Sequence[Sequence[float]],
    blocks: Sequence[int],
    labels: Sequence[str],
    title: str,
    unit: str,
) -> Figure:
    from matplotlib.colors import LogNorm

    height = max(2.4, 1.3 + 0.3 * len(labels))
    figure, axes = _figure(title, max(5.2, 2.6 + 0.24 * len(blocks)), height)
    axes.grid(False)
    known = [value for row in grid for value in row if math.isfinite(value)]
    low, high = min(known), max(known)
    image = axes.imshow(
        grid, aspect="auto", cmap="viridis", norm=LogNorm(low, high if high > low else low * 1.01)
    )
    step = max(1, len(blocks) // 16)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_xlabel("block")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(textwrap.fill(unit, int((height - 0.8) * LETTERS_PER_INCH)), fontsize=9)
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    return figure


def _error_text(name: str) -> str:
    """The name of an error and its formula."""
    text, formula = {
        "output_error": ("relative output error", "‖(W−Ŵ)X‖² / ‖WX‖²"),
        "weight_error": ("relative weight error", "‖W−Ŵ‖² / ‖W‖²"),
    }[name]
    return f"{text} {_unbroken(formula)}"


def _unbroken(text: str) -> str:
    """Text that stays on one line of a label."""
    return text.replace(" ", "\u00a0")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _finite(record: Record, *metrics: str) -> bool:
    known = record.metrics()
    return all(math.isfinite(known.get(metric, math.nan)) for metric in metrics)
