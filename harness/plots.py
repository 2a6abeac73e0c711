"""Figures of a sweep: score against bits per weight, score against size, errors of the layers. Loads without torch or Matplotlib.

`figures` makes those of a sweep, `layer_errors` that of one cell, `save` writes SVG, PDF and PNG. Nothing is shown on a screen
and no global state of Matplotlib is touched, so that a notebook's own style survives.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.naming import group_text
from harness.store import Record, write_aside
from harness.sweep import Sweep
from harness.tables import better_is_higher, quality_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, then three more
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#8c6d31", "#b22222")
MARKERS = "osD^vPX*h"
FULL_PRECISION = "full precision"
BITS, SIZE = "checkpoint/bits_per_weight", "checkpoint/bytes"
NAMES = {"perplexity": "perplexity", "acc": "accuracy", "acc_norm": "length-normalised accuracy", "exact_match": "exact match"}
ERRORS = ("output_error", "weight_error")       # of a layer, the first that is known is drawn


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
        for metric in quality_metrics(sweep, own):
            for name, make in (("bits", score_against_bits), ("size", score_against_size)):
                figure = make(own, metric)
                if figure is not None:
                    made[_file_name(f"{metric}-against-{name}{suffix}")] = figure
        overview = error_overview(own)
        if overview is not None:
            made[_file_name(f"layer-errors{suffix}")] = overview
    return made


def score_against_bits(records: Sequence[Record], metric: str) -> Figure | None:
    """One line per method over the bits per weight as stored, with 95 % intervals where a standard error is known."""
    points = [record for record in records if _finite(record, metric, BITS)]
    if not any(not record.cell.method.is_baseline for record in points):
        return None
    figure, axes = _figure(points[0].cell.model.name)
    for index, (label, group) in enumerate(_by_method(points).items()):
        group.sort(key=lambda record: record.metrics()[BITS])
        bits = [record.metrics()[BITS] for record in group]
        scores = [record.metrics()[metric] for record in group]
        intervals = [1.96 * record.metrics().get(f"{metric}_stderr", 0.0) for record in group]
        bars = intervals if any(intervals) else None
        axes.errorbar(bits, scores, yerr=bars, capsize=3, linewidth=1.5, markersize=5, label=label, **_style(index))
    _draw_baseline(axes, points, metric)
    _score_axis(axes, points, metric)
    axes.set_xlabel("bits per weight as stored (quantized matrices)")
    axes.legend(frameon=False, fontsize=9)
    return figure


def score_against_size(records: Sequence[Record], metric: str) -> Figure | None:
    """Every cell at the size of its whole checkpoint; the front joins those that no smaller cell beats."""
    points = [record for record in records if _finite(record, metric, SIZE)]
    higher = better_is_higher(metric, [record.cell for record in records])
    if len(points) < 2 or higher is None:
        return None
    figure, axes = _figure(points[0].cell.model.name)
    largest = max(record.metrics()[SIZE] for record in points)
    unit, factor = next((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0)) if largest >= f or f == 1.0)
    for index, (label, group) in enumerate(_by_method(points).items()):
        sizes = [record.metrics()[SIZE] / factor for record in group]
        axes.scatter(sizes, [record.metrics()[metric] for record in group], s=36, zorder=3, label=label, **_style(index))
    full = [record for record in points if record.cell.method.is_baseline]
    if full:
        style: dict[str, Any] = {"color": "#777777", "marker": "s", "s": 36}
        axes.scatter(full[0].metrics()[SIZE] / factor, full[0].metrics()[metric], label=FULL_PRECISION, **style)
    best = front(points, metric, higher)
    corners = [(record.metrics()[SIZE] / factor, record.metrics()[metric]) for record in best]
    axes.step(*zip(*corners, strict=True), where="post", color="#999999", linewidth=1, zorder=1, label="front")
    for record, corner in zip(best, corners, strict=True):
        name = FULL_PRECISION if record.cell.method.is_baseline else f"{record.cell.method.name} {record.cell.scheme.name}"
        axes.annotate(name, corner, (5, 5), textcoords="offset points", fontsize=8)
    _score_axis(axes, points, metric)
    axes.set_xlabel(f"size of the checkpoint, {unit}")
    axes.legend(frameon=False, fontsize=9)
    return figure


def front(records: Sequence[Record], metric: str, higher_is_better: bool) -> list[Record]:
    """Records that no record of equal or smaller size beats, by size."""
    sign = -1.0 if higher_is_better else 1.0
    best: list[Record] = []
    for record in sorted(records, key=lambda r: (r.metrics()[SIZE], sign * r.metrics()[metric])):
        if not best or sign * record.metrics()[metric] < sign * best[-1].metrics()[metric]:
            best.append(record)
    return best


def layer_errors(record: Record) -> Figure | None:
    """Heat map of one cell, block × matrix: the relative error of each matrix on a logarithmic scale."""
    name = _error_name(record)
    if name is None:
        return None
    rows = [row for row in record.layer_errors if _positive(row.get(name))]
    if not rows:
        return None
    blocks = sorted({int(row["block"]) for row in rows})
    linears = list(dict.fromkeys(str(row["linear"]) for row in rows))
    grid = [[math.nan] * len(blocks) for _ in linears]
    for row in rows:
        grid[linears.index(str(row["linear"]))][blocks.index(int(row["block"]))] = float(row[name])
    labels = [linear.rsplit(".", 1)[-1] for linear in linears]
    return _heat_map(grid, blocks, labels, record.cell.title, _error_text(name))


def error_overview(records: Sequence[Record]) -> Figure | None:
    """Heat map of all cells, cell × block: the mean error of a block's matrices, so that cells can be compared."""
    known = [record for record in records if _error_name(record)]
    if not known:
        return None
    name = ERRORS[0] if all(_error_name(record) == ERRORS[0] for record in known) else ERRORS[-1]
    labels, grid = [], []
    blocks = sorted({int(row["block"]) for record in known for row in record.layer_errors})
    for record in known:
        values: dict[int, list[float]] = {}
        for row in record.layer_errors:
            if _positive(row.get(name)):
                values.setdefault(int(row["block"]), []).append(float(row[name]))
        if values:
            grid.append([math.fsum(values[b]) / len(values[b]) if b in values else math.nan for b in blocks])
            labels.append(f"{record.cell.method.name} · {record.cell.scheme.name}")
    return _heat_map(grid, blocks, labels, known[0].cell.model.name, f"{_error_text(name)}, mean of a block") if grid else None


def diagnosis_map(linears: Sequence[Mapping[str, Any]], value: str, title: str) -> Figure:
    """Heat map of `harness diagnose`, block × matrix: one value of every linear's report on a logarithmic scale."""
    blocks = sorted({int(row["block"]) for row in linears})
    names = list(dict.fromkeys(str(row["linear"]) for row in linears))
    grid = [[math.nan] * len(blocks) for _ in names]
    for row in linears:
        grid[names.index(str(row["linear"]))][blocks.index(int(row["block"]))] = max(float(row[value]), 1e-12)
    texts = {"both": "relative error, both sides rounded", "weight_ratio": "max / median channel of |W|",
             "activation_ratio": "max / median channel of |x|", "grouped": "relative error in groups"}
    return _heat_map(grid, blocks, [name.rsplit(".", 1)[-1] for name in names], title, texts.get(value, value))


def channel_magnitudes(channels: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Of one linear, the largest weight and the largest activation of each input channel; one set of bars above the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawn

    figure = Drawn(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (axes, name, text) in enumerate(zip(
        figure.subplots(2, 1, sharex=True), ("weights", "activations"), ("largest |W|", "largest |x|"), strict=True
    )):
        values = list(channels[name])
        axes.vlines(range(len(values)), 1e-12, values, color=COLOURS[index], linewidth=max(0.5, min(3.0, 200 / len(values))))
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5 * min(value for value in values if value > 0))
        axes.set_ylabel(text)
        axes.spines[["top", "right"]].set_visible(False)
        if not index:
            axes.set_title(title, loc="left", fontsize=11)
        else:
            axes.set_xlabel("input channel")
    return figure


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("svg", "pdf", "png")) -> list[Path]:
    """Write the figure in each format; the same figure gives the same bytes. Returns the paths."""
    import matplotlib

    paths = []
    metadata: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        for form in formats:
            path = folder / f"{name}.{form}"
            draw = functools.partial(figure.savefig, format=form, dpi=160, metadata=metadata.get(form, {}))
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


def _by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Label -> records, without baselines. Groups join the label where there are several, activation and KV bits always."""
    quantized = [record for record in records if not record.cell.method.is_baseline]
    groups = {group_text(record.cell) for record in quantized}
    found: dict[str, list[Record]] = {}
    for record in quantized:
        cell = record.cell
        words = [cell.method.name]
        words += [f"g{group_text(cell)}" if group_text(cell) != "row" else "per row"] if len(groups) > 1 else []
        words += [f"A{cell.scheme.activation.bits}"] if cell.scheme.activation else []
        words += [f"KV{cell.scheme.kv.bits}"] if cell.scheme.kv else []
        found.setdefault(" · ".join(words), []).append(record)
    return found


def _draw_baseline(axes: Axes, records: Sequence[Record], metric: str) -> None:
    baseline = next((record for record in records if record.cell.method.is_baseline), None)
    if baseline is not None:
        axes.axhline(baseline.metrics()[metric], color="#777777", linestyle="--", linewidth=1, label=FULL_PRECISION)


def _score_axis(axes: Axes, records: Sequence[Record], metric: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    prefix, _, short = metric.rpartition("/")
    higher = better_is_higher(metric, [record.cell for record in records])
    arrow = "" if higher is None else ", higher is better" if higher else ", lower is better"
    axes.set_ylabel(f"{prefix} {NAMES.get(short, short)}{arrow}")
    values = [record.metrics()[metric] for record in records]
    if higher is False and min(values) > 0 and max(values) / min(values) > 3:
        axes.set_yscale("log")
        if max(values) / min(values) < 1e3:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())


def _heat_map(grid: Sequence[Sequence[float]], blocks: Sequence[int], labels: Sequence[str], title: str, unit: str) -> Figure:
    from matplotlib.colors import LogNorm

    figure, axes = _figure(title, max(5.2, 2.6 + 0.24 * len(blocks)), max(2.4, 1.3 + 0.3 * len(labels)))
    axes.grid(False)
    known = [value for row in grid for value in row if math.isfinite(value)]
    low, high = min(known), max(known)
    image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=LogNorm(low, high if high > low else low * 1.01))
    step = max(1, len(blocks) // 16)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_xlabel("block")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(unit, fontsize=9)
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    return figure


def _error_name(record: Record) -> str | None:
    rows = record.layer_errors
    return next((name for name in ERRORS if rows and any(_positive(row.get(name)) for row in rows)), None)


def _error_text(name: str) -> str:
    return {"output_error": "relative output error ‖(W−Ŵ)X‖² / ‖WX‖²", "weight_error": "relative weight error ‖W−Ŵ‖² / ‖W‖²"}[name]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _finite(record: Record, *metrics: str) -> bool:
    known = record.metrics()
    return all(math.isfinite(known.get(metric, math.nan)) for metric in metrics)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
