"""A hook of mkdocs: links of pages to files outside docs/ become their paths, because a site has the pages alone."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[notebook](../notebooks/demo.ipynb)` reads "notebook (`notebooks/demo.ipynb`)"; a text that is the path stays alone."""
    return OUTSIDE.sub(_plain, markdown)


def _plain(link: re.Match[str]) -> str:
    text, path = link.groups()
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"
