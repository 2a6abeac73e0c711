"""Small sweeps with scores in a store, for tests of tables."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
from synthetic_sweep import EVALUATIONS, LLAMA, TABLE, cells, make_sweep

from harness.core.cell import Cell, Method, Scheme, score_key
from harness.core.labels import with_variants
from harness.core.sweep import Column, Sweep, Table
from harness.reporting.render import render
from harness.reporting.table_data import TableData
from harness.reporting.tables import build
from harness.storage.record import Record
from harness.storage.store import Store

PERPLEXITY = Column("wikitext2/perplexity", "ppl", digits=3)


def records(sweep: Sweep, store: Store) -> list[Record]:
    """The records of a sweep, in its order."""
    return [store.record(cell) for cell in sweep.cells]


def row_of(data: TableData, method: str, bits: str) -> tuple[str, ...]:
    """The texts of a row, as Markdown shows them."""
    lines = render(data).splitlines()
    rows = [
        [text.strip() for text in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    return tuple(next(row for row in rows if row[0] == method and row[1] == bits))


def verdict_of(
    root: Path,
    cell: Cell,
    number: float,
    *,
    stderr: float = 0.0,
    smoke: bool = False,
    protocol: tuple[str, ...] = (),
) -> tuple[bool | None, TableData]:
    """How a perplexity on WikiText2 stands beside the published one, and the table."""
    sweep = dataclasses.replace(make_sweep(root), cells=(cell,))
    store = Store(sweep.runtime.runs)
    score = {
        "metrics": {"wikitext2/perplexity": number},
        "stderr": {"wikitext2/perplexity": stderr},
        "details": {"smoke": smoke},
    }
    store.write_score(store.open_cell(cell), score_key(cell, EVALUATIONS[0]), score)
    data = build(sweep, dataclasses.replace(TABLE, protocol=protocol), records(sweep, store))
    return next(row for row in data.rows if row.cell is cell).values[1].agrees, data


def one_score(
    root: Path, metrics: dict[str, float], limit: int | None = None
) -> tuple[Sweep, Store]:
    evaluation = dataclasses.replace(EVALUATIONS[0], limit=limit)
    cell = Cell(LLAMA, Method("none"), Scheme("full"), evaluations=(evaluation,))
    sweep = make_sweep(root)
    table = Table("t", columns=(Column("wikitext2/perplexity", "ppl"),))
    sweep = dataclasses.replace(
        sweep, cells=(cell,), tables=(table,), path=None, overrides=("+model=llama3_8b", "limit=8")
    )
    store = Store(sweep.runtime.runs)
    details = {"smoke": True} if limit else {}
    store.write_score(
        store.open_cell(cell), score_key(cell, evaluation), {"metrics": metrics, "details": details}
    )
    return sweep, store


def seeded(
    root: Path, losses: dict[int, float], seeds: tuple[int, ...] = (0, 1, 2)
) -> tuple[Sweep, Store]:
    """GPTQ at 4 bits with several seeds; each is worse than the baseline by its own share, in windows of unequal length."""
    baseline, first = cells(LLAMA, ("gptq",), (4,))
    assert first.calibration is not None
    made = [
        dataclasses.replace(
            first, seed=seed, calibration=dataclasses.replace(first.calibration, seed=seed)
        )
        for seed in seeds
    ]
    table = Table("t", columns=(PERPLEXITY,))
    sweep = dataclasses.replace(
        make_sweep(root), cells=with_variants([baseline, *made]), tables=(table,)
    )
    store = Store(sweep.runtime.runs)
    rng = np.random.default_rng(0)
    windows, tokens = rng.normal(1.8, 0.2, 40), rng.integers(2, 2048, 40)
    for cell in sweep.cells:
        if not cell.method.is_baseline and cell.seed not in losses:
            continue
        excess = (
            0.0
            if cell.method.is_baseline
            else losses[cell.seed] * np.where(tokens > 1024, 1.0, 0.2)
        )
        loss = windows + excess
        metrics = {"wikitext2/perplexity": math.exp(float((loss * tokens).sum() / tokens.sum()))}
        items = {"id": list(range(40)), "loss": loss.tolist(), "tokens": tokens.tolist()}
        store.write_score(
            store.open_cell(cell), score_key(cell, EVALUATIONS[0]), {"metrics": metrics}, items
        )
    return sweep, store
