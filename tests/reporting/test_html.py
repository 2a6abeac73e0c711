"""Tables as HTML pages: whole, escaped, and loading nothing."""

from __future__ import annotations

from html.parser import HTMLParser

from harness.core.sweep import Sweep
from harness.reporting.render import render
from harness.reporting.table_data import TableData
from harness.storage.store import Store


def test_html_is_self_contained_and_escaped(made: tuple[Sweep, Store, TableData]) -> None:
    text = render(made[2], "html")
    assert "http" not in text and "src=" not in text
    assert "Perplexity &amp; accuracy" in text

    class Balance(HTMLParser):
        open_tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "meta":
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    parser = Balance()
    parser.feed(text)
    assert parser.open_tags == []
