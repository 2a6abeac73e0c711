"""Messages at the end of a run: to a web address on the loopback interface, and through a command."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.core.sweep import Sweep
from harness.execution import driver
from harness.execution.notify import NotifyError, send

FACTS = {"text": "sweep demo done", "sweep": "demo", "state": "done", "cells": 2}


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any], list[int]]]:
    """(address, received JSON, status codes to answer with: the last one stays)"""
    received: list[Any] = []
    answers = [204]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            received.append(json.loads(self.rfile.read(length)))
            self.send_response(answers[-1])
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass

    stub = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{stub.server_port}/secret", received, answers
    stub.shutdown()
    stub.server_close()


def test_a_web_address_gets_the_facts_and_is_never_named(
    server: tuple[str, list[Any], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, received, answers = server
    send(address, FACTS)
    monkeypatch.setenv("HOOK", address)
    send("$HOOK", FACTS)
    assert received == [FACTS, FACTS]
    answers.append(500)
    for target in (address, "http://127.0.0.1:9/secret", "$NO_SUCH_VARIABLE"):
        with pytest.raises(NotifyError) as caught:
            send(target, FACTS)
        assert "secret" not in str(caught.value)


def test_a_command_gets_the_text_and_the_fields(tmp_path: Path) -> None:
    file = tmp_path / "said"
    send(f'cat > {file}; echo " $HARNESS_SWEEP $HARNESS_STATE" >> {file}', FACTS)
    assert file.read_text() == "sweep demo done demo done\n"
    with pytest.raises(NotifyError, match=r"ended with 3 \(no room\)"):
        send("echo no room >&2; exit 3", FACTS)


def test_a_run_says_how_it_ended_and_what_cannot_be_said_is_a_warning(
    demo_sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    small = ("method=none", "evaluations=demo_perplexity", "evaluations.limit=2")
    file = tmp_path / "said"
    summary = driver.run(demo_sweep(*small, f"notify='cat > {file}'"))
    assert summary.exit_code == 0 and not summary.warnings
    assert file.read_text().endswith("done: 1 of 1 cells done, 0 failed")
    refused = driver.run(
        demo_sweep(*small, "notify='exit 1'"), confirm=lambda plan: not plan.missing
    )
    assert refused.exit_code == 0  # all is done: nothing was started, and nobody was told
