"""MLflow's addresses: its database or server, its pages, and the command that serves them. Loads without MLflow."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import TrackingError
from harness.core.sweep import Tracking
from harness.storage.places import is_url

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # with it on, one of 200 runs failed
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines per cell into our display otherwise
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves eight processes and 1.8 GB
}
PORT = 5000
MODEL_TRAINING = "workflowType=machine_learning"  # MLflow's pages start in the mode for traces of agents otherwise


def pages(server: str, page: str = "") -> str:
    """The address of a page of MLflow; of the list of experiments where no page is given. server: http://HOST:PORT"""
    return f"{server.rstrip('/')}/{page or f'#/experiments?{MODEL_TRAINING}'}"


def tracking_uri(tracking: Tracking, runs: Path | str) -> str:
    """The address that MLflow gets: the database beside runs/ (of an object store: in the working directory), or the server.

    Raises TrackingError for a kind that does not exist.
    """
    if tracking.kind == "server":
        if not re.match(r"https?://", tracking.uri):
            raise TrackingError(
                f'tracking=server needs tracking.uri=http://HOST:PORT, not "{tracking.uri}"'
            )
        return tracking.uri.rstrip("/")
    if tracking.kind == "sqlite":
        return tracking.uri or f"sqlite:///{_beside(runs) / 'mlflow.db'}"
    raise TrackingError(f'no tracking "{tracking.kind}"; known: none, server, sqlite')


def database_of(tracking: Tracking, runs: Path | str) -> Path | None:
    """The file of MLflow's database; None where a sweep has none."""
    if tracking.kind != "sqlite":
        return None
    uri = tracking_uri(tracking, runs)
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@dataclass(frozen=True)
class Command:
    """A program to start: its words, what its environment adds, where its pages will be."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    url: str


def ui_command(tracking: Tracking, runs: Path | str, port: int = PORT) -> Command:
    """The command that serves MLflow's pages on the loopback interface. Raises TrackingError where there is nothing to show, or
    the port is taken."""
    uri = tracking_uri(tracking, runs)
    if tracking.kind == "server":
        raise TrackingError(f"the tracking server shows its own pages: open {uri}")
    database = Path(uri.removeprefix("sqlite:///"))
    if not database.exists():
        raise TrackingError(
            f"{database} does not exist: nothing was tracked here yet. Run a sweep, or `harness publish SWEEP`"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise TrackingError(
                f"port {port} is taken ({error.strerror}); choose another with --port"
            ) from error
    stores = ("--backend-store-uri", uri, "--default-artifact-root", artifact_folder(runs).as_uri())
    words = (
        sys.executable,
        "-m",
        "mlflow",
        "server",
        *stores,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    )
    return Command(words, ENVIRONMENT, pages(f"http://127.0.0.1:{port}"))


def artifact_folder(runs: Path | str) -> Path:
    """Where artifacts lie beside a runs folder."""
    return _beside(runs) / "mlruns"


def _beside(runs: Path | str) -> Path:
    return Path.cwd() if is_url(runs) else Path(runs).resolve().parent
