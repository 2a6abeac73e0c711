"""The figures of a sweep as files, and one page that shows all of them."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.core.sweep import Sweep
from harness.reporting.drawing import save
from harness.reporting.figures import figures
from harness.storage.record import Record

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;padding:24px;max-width:1500px;color:#1c2733;background:#fff}
h1{font-size:22px}h2{font-size:15px;font-weight:600;margin:0 0 8px}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:24px}
figure{margin:0;break-inside:avoid}img{width:100%;height:auto;background:#fff;border-radius:4px}
@media(prefers-color-scheme:dark){body{color:#dfe6ec;background:#12181f}}
"""


def draw_files(sweep: Sweep, records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw the figures of a sweep into a folder as SVG, PDF and PNG, with index.html; returns the files.

    One figure at a time is kept in memory once it is drawn.
    """
    drawn, paths, images = figures(sweep, records), [], {}
    for name in list(drawn):
        own = save(drawn.pop(name), folder, name)
        images[name] = next(path.read_bytes() for path in own if path.suffix == ".svg")
        paths += own
    if images:
        index = folder / "index.html"
        index.write_text(gallery(sweep.title or sweep.name, images), encoding="utf-8")
        paths.append(index)
    return paths


def gallery(title: str, images: Mapping[str, bytes]) -> str:
    """A self-contained page of SVG images by name."""
    shown = html.escape(title)
    parts = [
        f'<figure id="{html.escape(name)}"><h2>{html.escape(heading(name))}</h2>{image_tag(name, image)}</figure>'
        for name, image in images.items()
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Figures: {shown}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>Figures: {shown}</h1><main>{''.join(parts)}</main></body></html>\n"
    )


def heading(name: str) -> str:
    """A file name of a figure as words."""
    return name.replace("-", " ")


def image_tag(name: str, svg: bytes) -> str:
    """An SVG inside a page, apart from the page's own names and styles."""
    content = base64.b64encode(svg).decode()
    return f'<img alt="{html.escape(heading(name))}" src="data:image/svg+xml;base64,{content}">'
