"""The report: one page that loads nothing, says how each number was made, and works in a browser, on a phone and on paper."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from synthetic_sweep import fill, make_sweep

from harness.core.cell import Evaluation, cell_key, freeze
from harness.core.sweep import Finding, Sweep, Term
from harness.reporting.files import refresh, report_path, write_report
from harness.storage.store import Store

VOID = {"meta", "input", "img", "br"}


class Parsed(HTMLParser):
    """Tags that are open, every id, every address, the text, and the rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.images: list[str] = []
        self.rows: list[dict[str, str | None]] = []
        self.tips: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.addresses += [found["href"] or ""] if "href" in found else []
        self.images += [found["src"] or ""] if "src" in found else []
        self.tips += [found["data-tip"] or ""] if "data-tip" in found else []
        if tag == "tr" and "data-method" in found:
            self.rows.append(found)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Store, Path]:
    sweep = make_sweep(tmp_path_factory.mktemp("study"))
    finding = Finding(
        "GPTQ beats RTN at 3 bits <on this model>",
        "section 4",
        "table1",
        "WikiText2",
        better=(Term("gptq", 3, 128), Term("rtn", 3, 128)),
    )
    sweep = dataclasses.replace(sweep, findings=(finding,))
    store = fill(sweep)
    return sweep, store, refresh(sweep, store)


def test_the_page_is_whole_and_loads_nothing(made: tuple[Sweep, Store, Path]) -> None:
    sweep, store, path = made
    assert path == report_path(sweep, store) == store.root / "reports" / "llama3_8b_ptq.html"
    page = Parsed(path.read_text(encoding="utf-8"))
    assert not page.open and len(page.ids) == len(set(page.ids))
    assert all(image.startswith("data:image/svg+xml;base64,") for image in page.images)
    assert len(page.images) == len(list((store.root / "figures" / sweep.name).glob("*.svg"))) > 5
    inside = [address for address in page.addresses if address.startswith("#")]
    assert {address[1:] for address in inside} <= set(page.ids)
    others = [address for address in page.addresses if not address.startswith("#")]
    assert others and all((path.parent / address).resolve().is_file() for address in others[:-1])
    assert "default-src 'none'" in path.read_text(encoding="utf-8")
    index = (store.root / "figures" / sweep.name / "index.html").read_text(encoding="utf-8")
    assert len(Parsed(index).images) == len(page.images)


def test_the_page_says_what_stands_behind_its_numbers(made: tuple[Sweep, Store, Path]) -> None:
    sweep, store, path = made
    page = Parsed(path.read_text(encoding="utf-8"))
    gptq = next(cell for cell in sweep.cells if cell.method.name == "gptq")
    key = cell_key(gptq)
    (tip,) = [tip for tip in page.tips if key in tip and "WikiText2" in tip]
    value = store.record(gptq).metrics()["wikitext2/perplexity"]
    assert f"{value:.2f}" in tip and f"harness show {key[:12]}" in tip
    assert "95 % interval" in tip and "adjusted p" in tip
    rows = [row for row in page.rows if row["id"] == f"row-table1-{key[:12]}"]
    assert [(row["data-method"], row["data-bits"]) for row in rows] == [("gptq", "8")]
    assert (
        f"cell-{key[:12]}" in page.ids and "GPTQ beats RTN at 3 bits <on this model>" in page.text
    )
    assert "holds" in page.text and "128 windows of 2048 tokens from c4" in page.text
    assert "Hessian of block 12 is singular" in page.text and "diverged" in page.text
    assert "inf" not in [tip.rpartition(" ")[2] for tip in page.tips] and "nan" not in page.text
    assert "11 of 14 cells done, 1 failed" in page.text or "cells done, 1 failed" in page.text


def test_the_protocol_shows_settings_as_a_reader_writes_them(tmp_path: Path) -> None:
    settings = {"documents": None, "special_tokens": True, "separator": "\n\n", "include": ""}
    own = Evaluation("text", "perplexity", freeze(settings), data_digest="d")
    bare = Evaluation("bare", "perplexity")
    sweep = make_sweep(tmp_path, published=False)
    sweep = dataclasses.replace(
        sweep,
        cells=tuple(dataclasses.replace(cell, evaluations=(own, bare)) for cell in sweep.cells),
    )
    path = write_report(sweep, [], {}, Store(sweep.runtime.runs))
    text = Parsed(path.read_text(encoding="utf-8")).text.rpartition("How each number was made")[0]
    assert r'include "", separator "\n\n", special_tokens yes; data d' in text
    assert "perplexity, version 1; data without a digest" in text
    assert "None" not in text and "True" not in text


def test_the_page_of_a_running_sweep_loads_itself_again(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, published=False)
    store = Store(sweep.runtime.runs)
    records = [store.record(cell) for cell in sweep.cells]
    path = write_report(sweep, records, {}, store, "0 of 14 cells done")
    text = path.read_text(encoding="utf-8")
    assert "data-reload" in text and "0 of 14 cells done" in Parsed(text).text
    write_report(sweep, records, {}, store)
    assert "data-reload=" not in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(made: tuple[Sweep, Store, Path]) -> Iterator[Page]:
    if os.environ.get("HARNESS_BROWSER_TESTS") != "1":
        pytest.skip("drives a browser and waits for it: make test-browser")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with browser() as opened:
        opened.size(1300, 900)
        opened.open(made[2].as_uri())
        yield opened


COLUMN = (  # the texts of a column, of the rows that are shown
    "[...document.querySelectorAll('#table-table1 tbody tr')].filter(r => !r.hidden)"
    ".map(r => r.cells[{}].textContent.replace(/#$/, ''))"
)


def show_all(page: Page) -> None:
    """Press the button that empties the filters, and wait until they have acted: they do so after the event."""
    page.click(".filters button[type=reset]")
    page.wait("document.querySelectorAll('tr[data-method][hidden]').length === 0")
    page.wait("document.getElementById('count').textContent === ''")


def number(text: str) -> float:
    return float(text.rstrip("≈†≠"))


def test_a_click_on_a_head_sorts(page: Page) -> None:
    page.run("sessionStorage.clear(); location.hash = ''")
    page.reload()
    heads = page.run(
        "[...document.querySelectorAll('#table-table1 thead th')].map(h => h.textContent)"
    )
    column = next(index for index, head in enumerate(heads) if head.startswith("WikiText2"))
    click = f"#table-table1 thead th:nth-child({column + 1}) button"
    page.click(click)
    first = page.run(COLUMN.format(column))
    known = [
        number(text) for text in first if text not in ("", "—") and not text.startswith("diverged")
    ]
    assert known == sorted(known) and len(known) > 8
    assert all(text in ("", "—", "diverged") for text in first[len(known) :])  # no number: last
    page.click(click)
    second = page.run(COLUMN.format(column))
    assert [number(text) for text in second[: len(known)]] == sorted(known, reverse=True)
    assert all(text in ("", "—", "diverged") for text in second[len(known) :])


def test_methods_and_bits_filter_together(page: Page) -> None:
    show_all(page)
    page.click("[data-filter=method] label:has([value=gptq])")
    page.click("[data-filter=bits] label:has([value='3'])")
    assert set(page.run(COLUMN.format(0))) == {"gptq"} and set(page.run(COLUMN.format(1))) == {"3"}
    assert "rows" in page.run("document.getElementById('count').textContent")
    page.reload()  # as a running sweep's page does: the choice stays
    page.wait("document.querySelectorAll('tr[hidden]').length > 0")
    assert set(page.run(COLUMN.format(0))) == {"gptq"}
    show_all(page)
    page.run("document.getElementById('find').value = 'AWQ'; filter()")
    assert {text.lower() for text in page.run(COLUMN.format(0))} == {"awq"}
    show_all(page)


def test_a_number_under_the_pointer_says_its_interval_and_its_cell(
    made: tuple[Sweep, Store, Path], page: Page
) -> None:
    cell = next(cell for cell in made[0].cells if cell.method.name == "gptq")
    show_all(page)
    page.hover(f"#row-table1-{cell_key(cell)[:12]} td.n[data-tip]:nth-of-type(5)")
    page.wait("!document.getElementById('tip').hidden")
    tip = page.run("document.getElementById('tip').textContent")
    assert "95 % interval" in tip and cell_key(cell) in tip
    box = page.run(
        "(() => { const r = document.getElementById('tip').getBoundingClientRect();"
        "return [r.left, r.top, innerWidth - r.right, innerHeight - r.bottom] })()"
    )
    assert min(box) >= 0  # all of it is on the screen


def test_every_row_has_an_address(made: tuple[Sweep, Store, Path], page: Page) -> None:
    key = cell_key(made[0].cells[-2])[:12]
    page.size(1300, 500)
    page.open("about:blank")
    page.open(f"{made[2].as_uri()}#row-table1-{key}")
    seen = f"document.getElementById('row-table1-{key}').getBoundingClientRect()"
    page.wait(f"{seen}.top >= 0 && {seen}.bottom <= innerHeight")
    assert page.run(f"document.getElementById('row-table1-{key}').matches(':target')")
    page.run(f"location.hash = 'cell-{key}'")
    page.wait(f"document.getElementById('cell-{key}').open")
    page.size(1300, 900)


def test_light_dark_and_phone(page: Page) -> None:
    def light(colour: str) -> float:
        return sum(map(float, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3

    for dark in (False, True):
        page.size(400, 800, dark)
        ground, ink = page.run(
            "(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] })()"
        )
        assert (light(ground) > 200) is not dark and (light(ink) > 150) is dark
        # tables scroll inside
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
    page.size(1300, 900)
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run("getComputedStyle(document.querySelector('.filters')).display") == "none"
    page.call("Emulation.setEmulatedMedia", media="")


def test_nothing_is_asked_of_the_network(page: Page) -> None:
    names = page.run("performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in names), names
    assert not math.isnan(page.run("document.querySelectorAll('img').length"))
