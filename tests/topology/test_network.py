"""Hosts in network namespaces are hosts: own disks, names and processes; a link that can be pulled, power that can be cut."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import network

REACH = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()"
LISTEN = "import socket, sys, time; s = socket.create_server((sys.argv[1], 7777)); open('up', 'w').close(); time.sleep(600)"


def test_hosts_are_apart(tmp_path: Path) -> None:
    reason = network.lacking()
    if reason:
        pytest.skip(reason)
    with network.Network(tmp_path / "n") as wire:
        one, two = wire.host("one"), wire.host("two")
        assert one.run(["hostname"]).stdout == "one\n"
        server = two.start([sys.executable, "-c", LISTEN, two.address])
        ends = time.monotonic() + 60
        while not (two.own / "up").exists() and time.monotonic() < ends:
            time.sleep(0.05)
        assert (two.own / "up").exists() and not (wire.disk / "up").exists()
        assert one.run(["ls", str(wire.disk)]).stdout == "home\n"  # the same path, another disk
        assert ("7777" in str(two.listening())) and not one.listening()
        assert one.run([sys.executable, "-c", REACH, "two", "7777"]).returncode == 0
        two.unplug()
        assert (
            one.run([sys.executable, "-c", REACH, "two", "7777"]).returncode != 0
            and server.poll() is None
        )
        two.plug_in()
        assert len(two.processes()) == 1
        two.switch_off()
        assert server.wait(60) != 0
        two.switch_on()
        assert (
            two.run(["ls", str(wire.disk)]).stdout.split() == ["home", "up"] and not two.listening()
        )
