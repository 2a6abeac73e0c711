"""Addresses of MLflow's pages, and the command that serves them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from harness.core.errors import TrackingError
from harness.core.sweep import Runtime, Tracking
from harness.tracking.serving import serve
from harness.tracking.ui import ENVIRONMENT, ui_command


def test_the_command_for_the_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(TrackingError, match="nothing was tracked here yet"):
        ui_command(Tracking(), runs)
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(TrackingError, match="--port"):
            ui_command(Tracking(), runs, port)
    command = ui_command(Tracking(), runs, port)
    assert "127.0.0.1" in command.words and f"sqlite:///{tmp_path / 'mlflow.db'}" in command.words
    assert (
        command.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"]
        == "false"
        == ENVIRONMENT["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"]
    )
    assert "workflowType=machine_learning" in command.url
    server = f"http://127.0.0.1:{port}"  # nobody listens there: the address is printed all the same
    assert serve(Runtime(runs, tracking=Tracking("server", server))) == 0
    assert f"{server}/#/experiments?workflowType=machine_learning" in capsys.readouterr().out
