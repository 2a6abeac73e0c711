"""Places of stores: folders and URLs."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.grid import load_sweep
from harness.core import units
from harness.core.errors import ConfigError, StoreError
from harness.storage.places import is_url, place_of
from harness.storage.store import Store


def test_places() -> None:
    assert (
        is_url("s3://bucket/runs")
        and not is_url("/runs")
        and not is_url("runs")
        and not is_url(Path("s3://x"))
    )
    assert place_of("s3://bucket/a b") == "s3://bucket/a b" and place_of("file:///x/runs") == Path(
        "/x/runs"
    )
    assert units.bytes_of("1.5 TB", "q") == 1_500_000_000_000
    with pytest.raises(StoreError, match="200GB"):
        units.bytes_of("many", "store.quota")
    with pytest.raises(StoreError, match="do not belong in a URL") as refused:
        Store("s3://key:hunter2@bucket/runs")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(StoreError, match="nosuch"):
        Store("nosuch://bucket")
    with pytest.raises(ConfigError, match=r"store\.quota.*many"):
        load_sweep(None, ["model=demo", "method=rtn", "scheme=w4", "store.quota=many"])
