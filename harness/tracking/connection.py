"""The connection to MLflow: a tracking server, or the database beside runs/. The only importer of MLflow, loaded on use."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.core.errors import TrackingError
from harness.core.sweep import Sweep
from harness.core.text import without_password
from harness.storage.store import Store
from harness.tracking.run_contents import TAG_LIMIT, cut_text
from harness.tracking.ui import ENVIRONMENT, artifact_folder, tracking_uri


class Connection:
    """A tracking server, or mlflow.db beside runs/, for one experiment."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.store = Store(sweep.runtime.runs)
        self.uri = tracking_uri(sweep.runtime.tracking, sweep.runtime.runs)
        self.experiment = sweep.runtime.tracking.experiment or sweep.name or "sweeps"
        with self.writing(f"open {self.uri}"):
            if self.uri.startswith("http"):
                _check_server(self.uri)
            self.mlflow = _import_mlflow()
            if self.uri.startswith("sqlite:///"):
                _make_database(self.mlflow, Path(self.uri.removeprefix("sqlite:///")))
            self.client = self.mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def find_experiment(self, note: str) -> str:
        """Its number; made, with this description, where it does not exist yet."""
        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                raise TrackingError(
                    f'experiment "{self.experiment}" was deleted in {self.uri}; restore it there (mlflow experiments restore '
                    f"-x {found.experiment_id}) or name another with tracking.experiment=NAME"
                )
            return str(found.experiment_id)
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.note.content": cut_text(note, TAG_LIMIT),
        }
        place = (
            None
            if self.uri.startswith("http")
            else artifact_folder(self.sweep.runtime.runs).as_uri()
        )
        return str(
            self.client.create_experiment(self.experiment, artifact_location=place, tags=tags)
        )

    def search(self, experiment_id: str, filter: str, deleted: bool = False) -> list[Any]:
        """All runs of an experiment that fit a filter, live ones or deleted ones, the oldest first."""
        kinds = self.mlflow.entities.ViewType
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs(
                [experiment_id],
                filter,
                kinds.DELETED_ONLY if deleted else kinds.ACTIVE_ONLY,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return found

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Errors translated; writers of SQLite one after the other."""
        lock = (
            contextlib.nullcontext()
            if self.uri.startswith("http")
            else Store(self.store.root).lock("tracking")
        )
        with _translated(what, self.uri), lock:
            yield


def _check_server(uri: str) -> None:
    """MLflow retries for minutes; this asks once."""
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=10):
            pass
    except urllib.error.HTTPError as error:
        way_out = (
            "; start the server with --allowed-hosts naming this host" if error.code == 403 else ""
        )
        raise TrackingError(
            f"the tracking server at {uri} answers {error.code} {error.reason}{way_out}"
        ) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"no tracking server at {uri} ({reason}); start it, or run with tracking=sqlite"
        ) from error


def _import_mlflow() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    # seconds; a slow server must not hold a sweep for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow
    import mlflow.entities

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow


def _make_database(mlflow: Any, database: Path) -> None:
    """MLflow's tables in a new file, whole or not at all.

    MLflow makes them step by step, and a database whose maker was killed between two steps never opens again.
    """
    if database.exists():
        return
    # of one that was killed; the caller holds the lock
    for left in database.parent.glob(f".{database.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{database.name}-", dir=database.parent) as folder:
        aside = Path(folder) / database.name
        uri = f"sqlite:///{aside}"
        mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
        os.replace(aside, database)


def silence(text: str) -> str:
    """Why a server did not answer, from the text of an error of MLflow's requests; "" where it answered."""
    if not re.search(r"Max retries exceeded|Connection aborted|RemoteDisconnected|timed out", text):
        return ""
    found = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text)
    return found[1] if found else "timed out" if "timed out" in text else "the connection broke"


@contextlib.contextmanager
def _translated(what: str, uri: str) -> Iterator[None]:
    """What MLflow, its database or the network raise, as TrackingError."""
    try:
        yield
    except TrackingError as error:
        raise TrackingError(without_password(str(error))) from error.__cause__
    except Exception as error:
        foreign = (type(error).__module__ or "").split(".")[0]
        if isinstance(error, OSError) or foreign in (
            "mlflow",
            "sqlalchemy",
            "requests",
            "urllib3",
            "alembic",
            "sqlite3",
        ):
            if uri.startswith("http") and (reason := silence(str(error))):
                raise TrackingError(
                    without_password(
                        f"the tracking server at {uri} does not answer any more ({reason})"
                    )
                ) from error
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise TrackingError(without_password(f"could not {what}: {first}")) from error
        raise
