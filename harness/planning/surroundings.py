"""What a run needs besides its cells: the device, the tracking server, the cluster, free memory.

A plan asks here before anything starts. Addresses are tried with a socket for five seconds; nothing is sent.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import urllib.parse
from collections.abc import Iterator, Sequence

from harness.core.sweep import Runtime
from harness.core.text import without_password
from harness.core.units import size
from harness.planning import resources
from harness.planning.plan import Pass

PATIENCE_SECONDS = 5.0  # for an address to answer
RAY_PORT = 6379  # of a head at an address without a port


def problems(runtime: Runtime) -> Iterator[str]:
    """Why a run with these settings would end before its first cell."""
    yield from _device_problems(runtime)
    if runtime.tracking.kind == "server" and not re.match(r"https?://", runtime.tracking.uri):
        shown = without_password(runtime.tracking.uri)
        yield f'tracking=server needs tracking.uri=http://HOST:PORT, not "{shown}"'
    address = runtime.cluster.address
    if address and address not in ("auto", "local"):
        host, port = _host_and_port(address, RAY_PORT)
        reason = unreachable(host, port)
        if reason:
            yield (
                f"cluster.address={address}: no Ray cluster answers there ({reason}); start its head with "
                f"`ray start --head --port={port}`, or run on this machine with cluster=local"
            )


def notes(runtime: Runtime, passes: Sequence[Pass]) -> Iterator[str]:
    """What a person should know before a run, although it would start."""
    uri = runtime.tracking.uri
    if runtime.tracking.kind == "server" and re.match(r"https?://", uri):
        host, port = _host_and_port(uri, 443 if uri.startswith("https") else 80)
        reason = unreachable(host, port)
        if reason:
            yield (
                f"no tracking server answers at {without_password(uri)} ({reason}): results stay in {runtime.runs}, and "
                "`harness publish` sends them later; start it, or set tracking=sqlite"
            )
    named = os.environ.get("RAY_ADDRESS")
    if named and not runtime.cluster.address:
        yield f"RAY_ADDRESS={named} is set and not used; cluster.address={named} runs the sweep there"
    yield from _memory_notes(runtime, passes)


def _device_problems(runtime: Runtime) -> Iterator[str]:
    device = runtime.device
    if runtime.cluster.address or not device.startswith("cuda"):
        return
    count, number = resources.count_gpus(), int(device.partition(":")[2] or 0)
    if not count:
        yield f"device={device}: torch sees no CUDA device on this machine; set device=cpu, or see `harness doctor`"
    elif number >= count:
        yield f"device={device}: this machine has {count}, from cuda:0 to cuda:{count - 1}"


def _memory_notes(runtime: Runtime, passes: Sequence[Pass]) -> Iterator[str]:
    """A pass that takes more than what is free now."""
    if runtime.cluster.address or not passes or resources.uses_gpu(runtime):
        return
    free = resources.available_memory()
    largest = max(passes, key=lambda each: each.peak_memory_bytes)
    if largest.peak_memory_bytes > free:
        yield (
            f"a pass of {largest.cells[0].model.name} takes about {size(largest.peak_memory_bytes)}, and {size(free)} of memory "
            "are free here; end other programs, or lower calibration.samples="
        )


@functools.cache
def unreachable(host: str, port: int) -> str:
    """Why nothing answers at an address, "" where something does. Each address is tried once per process."""
    try:
        socket.create_connection((host, port), timeout=PATIENCE_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""


def _host_and_port(address: str, default: int) -> tuple[str, int]:
    """The parts of HOST:PORT, with or without a scheme before it and a path behind it."""
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    try:
        return parts.hostname or "127.0.0.1", parts.port or default
    except ValueError:
        return parts.hostname or "127.0.0.1", default
