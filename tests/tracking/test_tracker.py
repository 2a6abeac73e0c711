"""Tracking that is off, and tracking that loads only when it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_sweep import make_sweep

from harness.core.errors import TrackingError
from harness.core.sweep import Tracking
from harness.storage.store import Store
from harness.tracking.mlflow_runs import open_tracker, publish
from harness.tracking.tracker import NullTracker


def test_no_tracking_is_an_object() -> None:
    tracker = open_tracker(make_sweep(Path("unused"), tracking=Tracking("none")))
    assert isinstance(tracker, NullTracker)
    tracker.finish({}, (), "")
    with pytest.raises(TrackingError, match="tracking=none"):
        publish(Store("unused"), make_sweep(Path("unused"), tracking=Tracking("none")))


def test_tracking_loads_without_mlflow() -> None:
    program = (
        "import sys, harness.tracking.mlflow_runs, harness.tracking.diagnoses, harness.tracking.serving\n"
        "heavy = {'torch', 'mlflow', 'pandas', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
