"""What a cluster consists of, as processes that can be killed: PostgreSQL, an object store, docker/'s MLflow server, Ray nodes.

They run on a `Place`: a host of `network`, or this machine itself.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil
from network import end, wait_for

ROOT = Path(__file__).resolve().parents[2]
RAY = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
}


class Place(Protocol):
    """Where programs are started. address: under which others reach them; own: a folder of its files."""

    name: str
    address: str
    own: Path
    home: Path

    def start(
        self,
        words: Sequence[str],
        log: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]: ...

    def run(
        self,
        words: Sequence[str],
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]: ...


class Here:
    """This machine, on its loopback interface."""

    def __init__(self, folder: Path, name: str = "here") -> None:
        self.name, self.address, self.own = name, "127.0.0.1", folder / name
        self.home = self.own / "home"
        self.home.mkdir(parents=True)

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MLFLOW_"))
        }
        return {**kept, "HOME": str(self.home), **(more or {})}

    def start(
        self,
        words: Sequence[str],
        log: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        with (self.own / (log or "log")).open("ab") as out:
            return subprocess.Popen(
                words,
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
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment(environment),
        )


def free_port(address: str = "127.0.0.1") -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a program and to everything that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        everything = [*parent.children(recursive=True), parent]
        for each in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        psutil.wait_procs(everything, timeout=10)
    process.wait()


# --- PostgreSQL ------------------------------------------------------------------------------------------------------------------


def postgres_folder() -> Path | None:
    """Where initdb and postgres lie, or None: Debian keeps them out of PATH."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3])
    )
    if found:
        return found[-1].parent
    program = shutil.which("postgres")
    return Path(program).parent if program else None


class Postgres:
    """A PostgreSQL of its own, in `folder`, which asks everybody for a password."""

    def __init__(
        self, place: Place, folder: Path, password: str, user: str = "mlflow", port: int = 5432
    ) -> None:
        self.place, self.folder, self.user, self.port = place, folder, user, port
        programs = postgres_folder()
        assert programs is not None
        self.programs = programs
        folder.mkdir(parents=True)
        secret = folder / "password"
        secret.write_text(password)
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            account = pwd.getpwnam("postgres")
            for path in (folder, secret):
                os.chown(path, account.pw_uid, account.pw_gid)
        self.process: subprocess.Popen[bytes] | None = None
        closed = (
            "--auth-host=scram-sha-256",
            "--auth-local=scram-sha-256",
            f"--pwfile={secret}",
            f"--username={user}",
        )
        # No folder of this process: the account of PostgreSQL may not see it.
        done = place.run(
            self._as_postgres(str(programs / "initdb"), "--pgdata", str(folder / "data"), *closed)
        )
        if done.returncode:
            raise RuntimeError(f"initdb: {done.stderr}")
        with (folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet scram-sha-256\n")

    def _as_postgres(self, *words: str) -> list[str]:
        inside = ["env", "--chdir=/", *words]
        return (
            inside
            if os.geteuid()
            else ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *inside]
        )

    def start(self, seconds: float = 60) -> None:
        """Start it, again and again: after a SIGKILL the memory of the former one may be held for a moment."""
        options = (
            "-D",
            str(self.folder / "data"),
            "-p",
            str(self.port),
            "-c",
            f"listen_addresses={self.place.address}",
        )
        words = self._as_postgres(str(self.programs / "postgres"), *options, "-k", str(self.folder))

        def ready() -> bool:
            if self.process is None or self.process.poll() is not None:
                self.process = self.place.start(words, "postgres.log")
            asked = ("pg_isready", "--quiet", f"--host={self.place.address}", f"--port={self.port}")
            return self.place.run([str(self.programs / asked[0]), *asked[1:]]).returncode == 0

        wait_for("PostgreSQL answers", ready, seconds, 0.3)

    def kill(self) -> None:
        if self.process is not None:
            kill(self.process)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # fast shutdown
            end(self.process)


# --- an object store -------------------------------------------------------------------------------------------------------------


def objects_lacking() -> str:
    """Why no S3 server can run here, or nothing can speak to one; empty where it can."""
    import importlib.util

    absent = [name for name in ("swift", "s3fs", "boto3") if importlib.util.find_spec(name) is None]
    return (
        f"not installed: {', '.join(absent)} (pip install --requirement tests/topology/requirements.txt)"
        if absent
        else ""
    )


class ObjectStore:
    """The S3 server of object_store.py, which lets in whoever has the keys of docker/make_secrets.py."""

    def __init__(self, place: Place, folder: Path, secrets: Path, port: int = 8333) -> None:
        self.place, self.folder, self.secrets, self.port = place, folder, secrets, port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://{self.place.address}:{self.port}"

    def start(self, seconds: float = 120) -> float:
        """Start it and wait until it answers; returns after how many seconds."""
        script = [
            sys.executable,
            str(Path(__file__).with_name("object_store.py")),
            str(self.folder),
        ]
        search = {"PYTHONPATH": str(Path(__file__).parent)}
        words = [*script, self.place.address, str(self.port), str(self.secrets / "objects.json")]
        self.process = self.place.start(words, "objects.log", {**QUIET, **search})
        asked = "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=10)"
        ask = [sys.executable, "-c", asked, f"{self.uri}/healthcheck"]
        return wait_for(
            f"S3 answers (see {self.place.own}/objects.log)",
            lambda: self.place.run(ask).returncode == 0,
            seconds,
        )

    def kill(self) -> None:
        if self.process is not None:
            kill(self.process)


# --- MLflow ----------------------------------------------------------------------------------------------------------------------


def server_lacking() -> str:
    """Why the MLflow server of docker/ cannot run here; empty where it can."""
    import importlib.util

    absent = [name for name in ("flask_wtf", "psycopg2") if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (pip install --requirement docker/constraints-mlflow.txt)"
    return "" if postgres_folder() else "PostgreSQL is not installed (Debian's package postgresql)"


class MLflowServer:
    """docker/mlflow_server.py as it is shipped: login, PostgreSQL, artifact proxy to a folder or to an object store."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        secrets: Path,
        postgres: str,
        port: int = 5000,
        objects: ObjectStore | None = None,
    ) -> None:
        self.place, self.folder, self.secrets, self.port = place, folder, secrets, port
        folder.mkdir(parents=True)
        self.postgres, self.objects = postgres, objects
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://{self.place.address}:{self.port}"

    def begin(self) -> None:
        """Start it."""
        artifacts = {"MLFLOW_ARTIFACTS": str(self.folder / "artifacts")}
        if self.objects is not None:  # as in docker/compose.yaml
            artifacts = {
                "MLFLOW_ARTIFACTS": "s3://mlflow/artifacts",
                "MLFLOW_S3_ENDPOINT_URL": self.objects.uri,
                "AWS_SHARED_CREDENTIALS_FILE": str(self.secrets / "aws_credentials"),
            }
        environment = {
            **QUIET,
            **artifacts,
            "MLFLOW_SECRETS": str(self.secrets),
            "MLFLOW_POSTGRES": self.postgres,
            "MLFLOW_ALLOWED_HOSTS": f"{self.place.address}:{self.port},{self.place.name}:{self.port}",
        }
        script = [
            sys.executable,
            str(ROOT / "docker" / "mlflow_server.py"),
            "--host",
            self.place.address,
        ]
        words = [
            "env",
            f"--chdir={self.folder}",
            *script,
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        self.process = self.place.start(words, "mlflow.log", environment)

    def start(self, seconds: float = 400) -> float:
        """Start it and wait until it answers; returns after how many seconds."""
        self.begin()
        return self.wait(seconds)

    def wait(self, seconds: float = 400) -> float:
        """Until it answers; one that ended because its database was down is started again, as its container is."""

        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                self.begin()
            return self.ask("/health") == 200

        return wait_for(f"MLflow answers (see {self.place.own}/mlflow.log)", ready, seconds)

    def ask(self, path: str, password: str = "", host: str = "") -> int:
        """The status that a request from its own host gets; 0 where nobody answers."""
        script = (
            "import sys, urllib.request as u, urllib.error as e\n"
            "r = u.Request(sys.argv[1])\n"
            "for n, v in (('Authorization', sys.argv[2]), ('Host', sys.argv[3])):\n"
            "    if v: r.add_header(n, v)\n"
            "try: print(u.urlopen(r, timeout=10).status)\n"
            "except e.HTTPError as x: print(x.code)\n"
            "except OSError: print(0)\n"
        )
        login = (
            "Basic " + base64.b64encode(f"harness:{password}".encode()).decode() if password else ""
        )
        if isinstance(self.place, Here):
            return _status(f"{self.uri}{path}", login, host)
        return int(
            self.place.run([sys.executable, "-c", script, f"{self.uri}{path}", login, host]).stdout
            or 0
        )

    def kill(self) -> None:
        if self.process is not None:
            kill(self.process)


def _status(url: str, login: str, host: str) -> int:
    request = urllib.request.Request(url)
    for name, value in (("Authorization", login), ("Host", host)):
        if value:
            request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


# --- Ray -------------------------------------------------------------------------------------------------------------------------


class RayNode:
    """`ray start --block` as docs/cluster.md has it, started again whenever it ends, as containers are. head "": it is the head."""

    def __init__(
        self,
        place: Place,
        token: Path,
        temp: Path,
        head: str = "",
        port: int = 6379,
        cpus: int = 1,
        gpus: int = 0,
    ) -> None:
        self.place, self.token, self.temp, self.head, self.port, self.cpus, self.gpus = (
            place,
            token,
            temp,
            head,
            port,
            cpus,
            gpus,
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.more: dict[str, str] = {}  # variables of its environment, before it starts

    @property
    def environment(self) -> dict[str, str]:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        return {**QUIET, **self.more, **token, "HARNESS_CACHE": str(self.temp.parent / "cache")}

    @property
    def address(self) -> str:
        return self.head or f"{self.place.address}:{self.port}"

    def start(self) -> None:
        where = (
            [f"--address={self.head}"]
            if self.head
            else [
                "--head",
                f"--port={self.port}",
                f"--temp-dir={self.temp}",
                "--include-dashboard=false",
            ]
        )
        size = [
            f"--num-cpus={self.cpus}",
            f"--num-gpus={self.gpus}",
            "--object-store-memory=100000000",
        ]
        words = [
            RAY,
            "start",
            *where,
            f"--node-ip-address={self.place.address}",
            *size,
            "--disable-usage-stats",
            "--block",
        ]
        forever = ["sh", "-c", 'while :; do "$@"; sleep 1; done', "sh", *words]
        self.process = self.place.start(
            forever, f"ray-{'worker' if self.head else 'head'}.log", self.environment
        )

    def wait(self, seconds: float = 120) -> float:
        """Until the head answers; returns after how many seconds."""
        words = [RAY, "health-check", "--address", self.address]
        return wait_for(
            "Ray's head answers",
            lambda: self.place.run(words, environment=self.environment).returncode == 0,
            seconds,
        )

    def kill(self) -> None:
        if self.process is not None:
            kill(self.process)

    def tasks(self) -> list[psutil.Process]:
        """Its worker processes that carry out a task now; Ray names them by what they do."""
        found = []
        with contextlib.suppress(psutil.Error):
            for process in (
                psutil.Process(self.process.pid).children(recursive=True) if self.process else []
            ):
                with contextlib.suppress(psutil.Error):
                    if "ray::_stream" in " ".join(process.cmdline()):
                        found.append(process)
        return found
