"""Heat maps and bars of what happens inside a model: layer errors of cells, and what `harness diagnose` finds.

Loads without torch or Matplotlib.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.labels import method_title
from harness.reporting.drawing import COLOURS, new_figure
from harness.reporting.metrics import LAYER_ERRORS, layer_error_name
from harness.storage.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


OVERVIEW_ROWS = 60  # cells in the overview of layer errors
LETTERS_PER_INCH = 14  # of a label at 9 points


def error_overview(
    records: Sequence[Record], titles: Mapping[str, str] | None = None
) -> Figure | None:
    """Heat map of cells, cell × block: the mean error of a block's matrices, so that cells can be compared.

    Where some cells have output errors, which need the Hessians of calibration, these are drawn and the other cells are left out:
    GPTQ and its like trade larger weight errors for smaller output errors. Of more than OVERVIEW_ROWS cells, those with the largest
    mean are drawn: a figure of hundreds of rows cannot be read and fills the memory.

    titles: name of a method -> what papers call it
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
                        (
                            method_title(record.cell.method.name, titles or {}),
                            record.cell.scheme.name,
                            record.cell.variant,
                        ),
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


def _heat_map(
    grid: Sequence[Sequence[float]],
    blocks: Sequence[int],
    labels: Sequence[str],
    title: str,
    unit: str,
) -> Figure:
    from matplotlib.colors import LogNorm

    height = max(2.4, 1.3 + 0.3 * len(labels))
    figure, axes = new_figure(title, max(5.2, 2.6 + 0.24 * len(blocks)), height)
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
