"""A sweep with its table, for tests of what stands in tables and below them."""

from __future__ import annotations

import pytest
from synthetic_sweep import TABLE, fill, make_sweep
from table_sweeps import records

from harness.core.sweep import Sweep
from harness.reporting.table_data import TableData
from harness.reporting.tables import build
from harness.storage.store import Store


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Store, TableData]:
    sweep = make_sweep(tmp_path_factory.mktemp("study"))
    store = fill(sweep)
    return sweep, store, build(sweep, TABLE, records(sweep, store), store)
