"""A heat map as hand-written SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

VIRIDIS = tuple(
    map(
        bytes.fromhex,
        (  # Matplotlib's colour map at equal steps
            "440154",
            "481c6e",
            "453581",
            "3d4d8a",
            "34618d",
            "2b748e",
            "24878e",
            "1f998a",
            "25ac82",
            "40bd72",
            "67cc5c",
            "98d83e",
            "cde11d",
            "fde725",
        ),
    )
)
INK = "#262626"


def svg_heat_map(
    grid: Sequence[Sequence[float | None]],
    blocks: Sequence[int],
    labels: Sequence[str],
    title: str,
    unit: str,
) -> str:
    """As `_heat_map`, as the text of an SVG file; a value shows where the pointer rests. grid[row][column]: None stays empty."""
    known = [value for row in grid for value in row if value is not None]
    low, high = math.log(min(known)), math.log(max(known))
    wide = max(480.0, min(1440.0, 38.0 * len(blocks))) / len(
        blocks
    )  # pixels of one block and one row
    tall = max(4.0, min(34.0, 1400.0 / len(labels)))
    left, top = 24 + 8 * max(map(len, labels)), 62
    right, bottom = left + wide * len(blocks), top + tall * len(labels)
    bar = right + 28
    parts: list[str] = []

    def text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> None:
        parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{more}>{html.escape(words)}</text>'
        )

    def box(x: float, y: float, width: float, height: float, fill: str, words: str = "") -> None:
        inside = f"><title>{html.escape(words)}</title></rect>" if words else "/>"
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{inside}'
        )

    text(left, 26, title, more=' font-size="17"')
    text(left, 48, unit, more=' font-size="13"')
    for row, (values, label) in enumerate(zip(grid, labels, strict=True)):
        y = top + row * tall
        for column, value in enumerate(values):
            if value is not None:
                share = (math.log(value) - low) / (high - low) if high > low else 0.5
                box(
                    left + column * wide,
                    y,
                    wide,
                    tall,
                    _viridis(share),
                    f"block {blocks[column]}, {label}: {value:.4g}",
                )
        if row % math.ceil(15 / tall) == 0:
            text(left - 8, y + tall / 2 + 5, label, "end")
    for column in range(0, len(blocks), max(1, len(blocks) // 16)):
        text(left + (column + 0.5) * wide, bottom + 20, str(blocks[column]), "middle")
    text((left + right) / 2, bottom + 42, "block", "middle")
    steps = 64
    for step in range(steps):
        height = (bottom - top) / steps
        box(bar, bottom - (step + 1) * height, 16, height + 0.5, _viridis((step + 0.5) / steps))
    for tick in _ticks(math.exp(low), math.exp(high)):
        y = bottom - (bottom - top) * ((math.log(tick) - low) / (high - low) if high > low else 0.5)
        box(bar + 16, y - 0.5, 4, 1, INK)
        text(bar + 25, y + 5, f"{tick:.3g}")
    width, height = max(bar + 92, left + 10 * len(title), left + 8 * len(unit)), bottom + 58
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="14" fill="{INK}">'
    )
    return "\n".join(
        [head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>", ""]
    )


def _viridis(share: float) -> str:
    """The colour of a share between 0 and 1."""
    at = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    first = min(int(at), len(VIRIDIS) - 2)
    pairs = zip(VIRIDIS[first], VIRIDIS[first + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - first)):02x}" for a, b in pairs)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic scale: of powers of ten, and of 2 and 5 times them where those are few; else the ends."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [
            tick
            for decade in decades
            for factor in factors
            if low <= (tick := factor * 10.0**decade) <= high
        ]
        if len(found) >= 3:
            return found
    return list(dict.fromkeys((low, *found, high))) if len(found) < 2 else found
