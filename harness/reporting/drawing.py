"""How figures look: their size, colours, markers, legends, labels that do not overlap, axes, and the files they are saved as.

Loads without torch or Matplotlib. Nothing is shown on a screen and no global state of Matplotlib is touched, so that a notebook's
own style survives.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.storage.atomic_write import write_aside

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
DASHES = ("-", "--", ":", "-.")  # of the first to the fourth use of a colour
GREY = "#777777"
LEGEND_INSIDE = 8  # entries that have room beside the lines
LEGEND_ROWS = 20  # that a figure of 4.2 inches holds
MARKER_POINTS = 6  # width of a point
# of a name beside its point: how far in points, and which of its corners lies there
PLACES: tuple[tuple[tuple[int, int], Literal["left", "right"], Literal["bottom", "top"]], ...] = (
    ((6, 5), "left", "bottom"),
    ((6, -5), "left", "top"),
    ((-6, 5), "right", "bottom"),
    ((-6, -5), "right", "top"),
    ((6, 16), "left", "bottom"),
    ((6, -16), "left", "top"),
    ((-6, 16), "right", "bottom"),
)
# fonts are embedded in a PDF as TrueType: publishers refuse Matplotlib's default, Type 3
SAVING = {"svg.fonttype": "none", "pdf.fonttype": 42}

# Matplotlib's settings are those of the whole process, and tracking has a thread
_writing = threading.Lock()


def new_figure(title: str, width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; its size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def style(hue: int, marker: int = 0) -> dict[str, Any]:
    """Colour, marker and dashes of a line: a hue per method, a marker per group. Dashes tell apart methods of one hue."""
    return {
        "color": COLOURS[hue % len(COLOURS)],
        "marker": MARKERS[marker % len(MARKERS)],
        "linestyle": DASHES[hue // len(COLOURS) % len(DASHES)],
    }


def legend(
    figure: Figure,
    axes: Axes,
    hues: Mapping[str, int],
    markers: Mapping[str, int],
    lines: Collection[str],
) -> None:
    """A line per hue, a grey mark per marker where there are several, then the artists whose labels are not in `lines`.

    It stands beside the lines while it is short; else on the right, for which the figure is made wider.

    hues     name of a method -> its hue
    markers  name of a group -> its marker
    lines    labels of the artists that hues and markers explain
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D

    only = next(iter(markers.values()), 0) if len(markers) < 2 else None
    handles: list[Any] = []
    for name, hue in hues.items():
        own = style(hue, only or 0) | ({} if only is not None else {"marker": ""})
        handles.append(Line2D([], [], label=name, markersize=5, linewidth=1.8, **own))
    if only is None:
        handles += [
            Line2D([], [], label=name, linestyle="", color=GREY, marker=style(0, index)["marker"])
            for name, index in markers.items()
        ]
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        handles += [handle] if label not in lines else []
    if len(handles) <= LEGEND_INSIDE:
        axes.legend(handles=handles, frameon=False, fontsize=9)
        return
    shown = axes.legend(
        handles=handles,
        frameon=False,
        fontsize=8,
        ncols=math.ceil(len(handles) / LEGEND_ROWS),
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    renderer = FigureCanvasAgg(figure).get_renderer()
    width = shown.get_window_extent(renderer).width / figure.dpi  # known before it has its place
    figure.set_size_inches(figure.get_figwidth() + width, figure.get_figheight())


def annotate(
    figure: Figure,
    axes: Axes,
    corners: Sequence[tuple[float, float]],
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
) -> None:
    """Names beside their corners, each at the first of several places where it meets no other name and no point.

    A name that has no such place is left out. All places are in the data's units.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    box = axes.get_window_extent()
    legend = axes.get_legend()
    taken = [] if legend is None else [legend.get_window_extent()]
    radius = MARKER_POINTS / 2 * figure.dpi / 72
    for x, y in axes.transData.transform(list(points)):
        taken.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
    for name, corner in zip(names, corners, strict=True):
        for shift, across, up in PLACES:
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
            inside = box.x0 <= own.x0 and own.x1 <= box.x1 and box.y0 <= own.y0 <= own.y1 <= box.y1
            if inside and not any(own.overlaps(other) for other in taken):
                taken.append(own)
                break
            text.remove()


def log_axis(set_scale: Callable[[str], None], axis: Any, values: Sequence[float]) -> None:
    """Logarithmic where values span more than a factor of 3, with plain numbers at 1, 2 and 5 up to a factor of 1,000."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    if min(values) <= 0 or max(values) / min(values) <= 3:
        return
    set_scale("log")
    if max(values) / min(values) < 1e3:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())


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
    with _writing, matplotlib.rc_context(SAVING | {"svg.hashsalt": name}):
        for form in formats:
            path = folder / f"{name}.{form}"
            draw = functools.partial(
                figure.savefig, format=form, dpi=160, metadata=metadata.get(form, {})
            )
            write_aside(path, draw)
            paths.append(path)
    return paths
