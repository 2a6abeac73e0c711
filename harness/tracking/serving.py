"""`harness ui`: the server of MLflow's pages, and links to the sweeps on them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from harness.core.errors import TrackingError
from harness.core.sweep import Runtime, Sweep
from harness.tracking.connection import Connection
from harness.tracking.ui import PORT, pages, tracking_uri, ui_command
from harness.tracking.views import run_page

END_SECONDS = 5.0  # for the server to end
LINKS = 10  # sweeps that are listed


def serve(runtime: Runtime, port: int = PORT) -> int:
    """Serve MLflow's pages until Ctrl-C; returns the exit status. With a tracking server, say where it is.

    Prints a link to the run of every sweep, the latest first.
    """
    if runtime.tracking.kind == "server":
        server = tracking_uri(runtime.tracking, runtime.runs)
        _print_links(runtime, server)
        return 0
    command = ui_command(runtime.tracking, runtime.runs, port)
    _print_links(runtime, command.url.partition("/#")[0])
    print("Ctrl-C ends the server.", flush=True)
    # in a session of its own, so that Ctrl-C reaches this process alone and the server prints no traceback
    process = subprocess.Popen(
        command.words, env={**os.environ, **command.environment}, start_new_session=True
    )
    # a terminated command takes its server with it
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return process.wait()
    except KeyboardInterrupt:
        _end(process)
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started, which are of its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            return


def _print_links(runtime: Runtime, server: str) -> None:
    print(f"MLflow  {pages(server)}")
    try:
        for title, page in sweep_pages(runtime):
            print(f"sweep   {title}\n        {pages(server, page)}")
    except TrackingError as error:
        print(f"warning {error}")


def sweep_pages(runtime: Runtime) -> list[tuple[str, str]]:
    """(title, page) of the sweeps that MLflow has, the latest first. Raises TrackingError."""
    connection = Connection(Sweep("", "", "", (), (), (), runtime))
    with connection.writing(f"read {connection.uri}"):
        experiments = connection.client.search_experiments()
        runs = [
            (experiment.experiment_id, run)
            for experiment in experiments
            for run in connection.search(experiment.experiment_id, "tags.`harness.sweep` LIKE '%'")
            if "mlflow.parentRunId" not in run.data.tags
        ]
    runs.sort(key=lambda found: -found[1].info.start_time)
    return [
        (run.info.run_name, run_page(experiment, run.info.run_id))
        for experiment, run in runs[:LINKS]
    ]
