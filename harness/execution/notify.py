"""`notify=`: a message at the end of a run, to a web address or through a command of the user's own.

    notify=https://host/hook      POST of a JSON object: {"text", "sweep", "state", "cells", "done", "failed", "seconds", "resume"}
    notify='mail -s sweep me'     a shell command: the text is its input, the fields are HARNESS_SWEEP, HARNESS_STATE, …
    notify='$NAME'                either of them, read from the environment variable NAME, so that a secret stands in no file

What cannot be sent is a warning; it changes nothing about the results.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from harness.core.errors import HarnessError
from harness.core.text import first_line

WEB_SECONDS = 10.0
COMMAND_SECONDS = 60.0


class NotifyError(HarnessError):
    """A message about a run could not be sent."""


def send(target: str, facts: Mapping[str, Any]) -> None:
    """Send the facts of a run. target: the value of `notify`. Raises NotifyError, without the address, which may be a secret."""
    if re.fullmatch(r"\$\{?\w+\}?", target):
        name = target.strip("${}")
        target = os.environ.get(name, "")
        if not target:
            raise NotifyError(f"notify=${name}: the environment variable {name} is not set")
    if target.startswith(("http://", "https://")):
        _post(target, facts)
    else:
        _run(target, facts)


def _post(address: str, facts: Mapping[str, Any]) -> None:
    request = urllib.request.Request(
        address,
        data=json.dumps(facts).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=WEB_SECONDS):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise NotifyError(f"notify: the web address did not take the message ({reason})") from error


def _run(command: str, facts: Mapping[str, Any]) -> None:
    named = {f"HARNESS_{name.upper()}": str(value) for name, value in facts.items()}
    try:
        done = subprocess.run(
            command,
            shell=True,
            input=str(facts["text"]),
            env={**os.environ, **named},
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotifyError(
            f"notify: the command did not end well ({type(error).__name__})"
        ) from error
    if done.returncode:
        said = first_line(ValueError(done.stderr)) if done.stderr.strip() else "no message"
        raise NotifyError(f"notify: the command ended with {done.returncode} ({said})")
