"""Hosts on one machine: each with an address, a name, processes and disks of its own, on one wire. Needs root, ip and unshare.

A host is a network namespace with a veth link into a bridge, which lies in a namespace of its own, and an init process that holds
mount, process and name namespaces: `disk` is a folder under the same path on every host and on none the same, /dev/shm and HOME are
private. What a host runs sees no process of another; ending its init ends it as a power cut does. Nothing of this machine's own
network changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

SUBNET = "10.231.77"
NEEDED = ("ip", "unshare", "nsenter", "mount", "hostname")


def lacking() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    absent = [program for program in NEEDED if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (packages iproute2, util-linux, mount)"
    name = f"hq{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    try:
        steps = (
            ["ip", "-n", name, "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"],
            ["ip", "-n", name, "link", "add", "probe2", "type", "bridge"],
            [
                "unshare",
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "mount",
                "-t",
                "tmpfs",
                "tmpfs",
                "/dev/shm",
            ],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                return f"{' '.join(step[:4])}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return ""


class Network:
    """A wire and its hosts. root: a short path (sockets below it have 107 characters), whose `shared` all hosts see."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mark = f"hq{uuid.uuid4().hex[:6]}"
        self.hosts: dict[str, Host] = {}
        self.shared, self.disk = root / "shared", root / "disk"
        for folder in (self.shared, self.disk):
            folder.mkdir(parents=True)
        self.wire = f"{self.mark}-wire"
        _ip("netns", "add", self.wire)
        _ip("-n", self.wire, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.wire, "link", "set", "bridge", "up")

    def host(self, name: str) -> Host:
        """A new host, switched on."""
        self.hosts[name] = Host(self, name, len(self.hosts) + 1)
        self.names().write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{h.address} {h.name}\n" for h in self.hosts.values())
        )
        self.hosts[name].switch_on()
        return self.hosts[name]

    def names(self) -> Path:
        return self.root / "hosts"

    def close(self) -> None:
        """Switch everything off and take the wire down."""
        for host in self.hosts.values():
            host.switch_off()
            subprocess.run(["ip", "netns", "delete", host.space], capture_output=True)
        subprocess.run(["ip", "netns", "delete", self.wire], capture_output=True)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


class Host:
    """One host of a network."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.network, self.name, self.address = network, name, f"{SUBNET}.{number}"
        self.space = f"{network.mark}-{name}"
        self.link = f"v{number}"  # its end in the wire
        self.own = network.root / "disks" / name
        self.home = self.own / "home"
        self.home.mkdir(parents=True)
        self.init: subprocess.Popen[bytes] | None = None
        _ip("netns", "add", self.space)
        _ip(
            "-n",
            network.wire,
            "link",
            "add",
            self.link,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.space,
        )
        _ip("-n", network.wire, "link", "set", self.link, "master", "bridge", "up")
        _ip("-n", self.space, "address", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", self.space, "link", "set", link, "up")
        # Programs find their own address by asking for the way to some other; the wire leads nowhere further.
        _ip("-n", self.space, "route", "add", "default", "via", f"{SUBNET}.254")

    def switch_on(self) -> None:
        """Start its init. What was on its disk is there again."""
        steps = (
            f"mount --bind {self.own} {self.network.disk}",
            "mount -t tmpfs tmpfs /dev/shm",
            f"mount --bind {self.network.names()} /etc/hosts",
            f"hostname {self.name}",
        )
        inside = " && ".join((*steps, "echo ready", "exec sleep infinity"))
        own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.init = subprocess.Popen(
            ["ip", "netns", "exec", self.space, *own, "sh", "-c", inside],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.init.stdout is not None
        if self.init.stdout.readline() != b"ready\n":
            raise RuntimeError(f"host {self.name} does not start")

    @property
    def is_on(self) -> bool:
        return self.init is not None and self.init.poll() is None

    def switch_off(self) -> None:
        """A power cut: every process of the host is gone at once."""
        if self.init is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(self.init.pid).children():
                    process.kill()  # the first of the process namespace takes all others with it
            self.init.kill()
            self.init.wait()
            self.init = None

    def unplug(self) -> None:
        """Take the link down; the processes go on."""
        _ip("-n", self.network.wire, "link", "set", self.link, "down")

    def plug_in(self) -> None:
        """Put the link up again."""
        _ip("-n", self.network.wire, "link", "set", self.link, "up")

    def command(self, words: Sequence[str]) -> list[str]:
        """The words of a program on this host, for a program of this machine."""
        assert self.init is not None, f"host {self.name} is off"
        (first, *_) = psutil.Process(self.init.pid).children()
        return [
            "nsenter",
            "--target",
            str(first.pid),
            "--all",
            f"--wdns={self.network.disk}",
            *words,
        ]

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MLFLOW_"))
        }
        return {
            **kept,
            "HOME": str(self.network.disk / "home"),
            "HOSTNAME": self.name,
            **(more or {}),
        }

    def start(
        self,
        words: Sequence[str],
        log: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """A program in the background; what it prints goes to a file of that name on the host's disk."""
        with contextlib.ExitStack() as files:
            out: IO[Any] | int = (
                files.enter_context((self.own / log).open("ab")) if log else subprocess.DEVNULL
            )
            return subprocess.Popen(
                self.command(words),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env=self.environment(environment),
                start_new_session=True,
            )

    def run(
        self,
        words: Sequence[str],
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A program until it ends."""
        command, variables = self.command(words), self.environment(environment)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=variables
        )

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on it, but its init."""
        if self.init is None:
            return []
        (first, *_) = psutil.Process(self.init.pid).children()
        space = os.readlink(f"/proc/{first.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if process.pid != first.pid and os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    found.append(process)
        return found

    def listening(self) -> list[tuple[str, str, int]]:
        """(program, address, port) of every open TCP door of the host."""
        script = (
            "import psutil, json; print(json.dumps([(psutil.Process(c.pid).name() if c.pid else '?', c.laddr.ip, c.laddr.port)"
            " for c in psutil.net_connections('tcp') if c.status == 'LISTEN']))"
        )
        done = self.run([sys.executable, "-c", script])
        return [(name, address, port) for name, address, port in json.loads(done.stdout)]


def end(process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    """End a started program gently, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def wait_for(what: str, test: Any, seconds: float, pause: float = 0.5) -> float:
    """Seconds until `test()` was true. Raises TimeoutError saying what was waited for."""
    began = time.monotonic()
    while not test():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)
    return time.monotonic() - began


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
