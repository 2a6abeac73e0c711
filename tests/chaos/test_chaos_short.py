"""The short version of `make chaos`: two kills of one sweep."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import chaos


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_with_the_same_table(tmp_path: Path) -> None:
    report = chaos.chaos(tmp_path, kills=2, seed=1)
    assert not report.problems, "\n".join(report.problems)
    assert report.sweeps >= 1 and sum(report.kills.values()) == 2
