"""The connection to MLflow: one sentence for everything that may be wrong with it, and a database that is whole."""

from __future__ import annotations

import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from synthetic_sweep import make_sweep

from harness.core.errors import TrackingError
from harness.core.sweep import Tracking
from harness.tracking.connection import _translated, silence
from harness.tracking.mlflow_runs import open_tracker
from harness.tracking.ui import tracking_uri


def test_a_server_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # taken, but nobody listens
        sweep = make_sweep(tmp_path, tracking=Tracking("server", f"http://127.0.0.1:{port}"))
        with pytest.raises(TrackingError, match="no tracking server at"):
            open_tracker(sweep)
    with pytest.raises(TrackingError, match=r"needs tracking\.uri"):
        tracking_uri(Tracking("server"), tmp_path)
    with pytest.raises(TrackingError, match="known: none, server, sqlite"):
        tracking_uri(Tracking("sqlit"), tmp_path)


def test_a_damaged_database_is_a_tracking_error(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(TrackingError, match="could not open sqlite"):
        open_tracker(sweep)


def test_a_database_is_made_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed while MLflow makes its tables leaves nothing that a later run could stumble over."""
    import mlflow

    sweep = make_sweep(tmp_path / "study", published=False)
    database = Path(
        tracking_uri(sweep.runtime.tracking, sweep.runtime.runs).removeprefix("sqlite:///")
    )
    seen: list[bool] = []

    def killed(client: Any, **words: Any) -> None:
        seen.append(database.exists())
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "search_experiments", killed)
        with pytest.raises(KeyboardInterrupt):
            open_tracker(sweep, "plan")
    assert seen == [False] and not database.exists()
    open_tracker(sweep, "plan")
    with sqlite3.connect(database) as whole:
        assert whole.execute("SELECT COUNT(*) FROM runs").fetchone() == (1,)


def test_a_server_that_dies_is_a_sentence() -> None:
    refused = (
        "API request to http://127.0.0.1:5077/api/2.0/mlflow/runs/get failed with exception HTTPConnectionPool("
        "host='127.0.0.1', port=5077): Max retries exceeded with url: /api (Caused by NewConnectionError("
        "'<HTTPConnection>: Failed to establish a new connection: [Errno 111] Connection refused'))"
    )
    assert silence(refused) == "Connection refused"
    assert silence("('Connection aborted.', RemoteDisconnected())") == "the connection broke"
    assert (
        silence("HTTPConnectionPool(host='x', port=1): Read timed out. (read timeout=20)")
        == "timed out"
    )
    assert not silence("RESOURCE_DOES_NOT_EXIST: Run 5 not found")
    uri = "http://user:secret@127.0.0.1:9"
    with pytest.raises(TrackingError) as caught, _translated("record a cell", uri):
        raise OSError(refused)
    assert "does not answer any more (Connection refused)" in str(caught.value)
    assert "secret" not in str(caught.value) and "HTTPConnectionPool" not in str(caught.value)
