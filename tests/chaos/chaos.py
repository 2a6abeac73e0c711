"""Kill a sweep at random moments until it is done, and compare what is left with a run that nobody disturbed.

    python tests/chaos/chaos.py --kills 100 --seed 0 [--cluster ray|cluster] [--tracking sqlite|server] [--folder DIR]

Each round starts `harness run` and, after random times, sends SIGKILL to what the setting has of these:

    driver, worker      always
    machine             the driver and all of its workers at once; local and ray
    node, head          --cluster cluster: two worker nodes and a head, each a `ray start` of its own; the driver's node is spared
    mlflow, database    --tracking server: the MLflow server of docker/ and its PostgreSQL, which must be installed

What is not the driver comes back after seconds. Rounds follow one another until the sweep is done; then the next sweep starts from
an empty store, until so many kills have hit. Afterwards must hold, for every sweep:

    the table has the bytes of the undisturbed run
    no checkpoint and no score that was complete was written again
    no file that was read was damaged
    MLflow, where it is on, has one run per cell and one for the sweep, all of them finished, none without its parent

Exit code 0 when all of it held.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "topology"))

import services
from services import Here, MLflowServer, Postgres, RayNode, free_port

from harness.planning.resources import count_cores

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """\
# Chaos
# Small enough to be killed often.
model: demo
calibration: demo
calibration.samples: 4
calibration.length: 64
grids:
  - {method: [rtn, gptq], scheme: [w4, w3, w2]}
evaluations: [demo_perplexity]
tables:
  - name: chaos
    columns: [checkpoint/bits_per_weight, {metric: demo_perplexity/perplexity, digits: 6}]
"""
ROUNDS = 60  # of one sweep; more would mean that it makes no progress
# instead of 4: a head comes back after minutes, once its former nodes have noticed
WEIGHTS = {"head": 1, "mlflow": 2}
PATIENCE = 900  # seconds for one start to end; a loaded machine needs minutes


@dataclass
class Report:
    """What was done and what was wrong."""

    kills: dict[str, int] = field(default_factory=dict)
    sweeps: int = 0
    rounds: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        hits = ", ".join(f"{victim} {count}" for victim, count in sorted(self.kills.items()))
        return (
            f"{self.sweeps} sweeps, {self.rounds} starts, {sum(self.kills.values())} kills ({hits})"
        )


class Setting:
    """Where sweeps run and what there is to kill."""

    def __init__(self, folder: Path, cluster: str, tracking: str) -> None:
        self.cluster, self.tracking = cluster, tracking
        self.nodes: dict[str, RayNode] = {}
        self.mlflow: MLflowServer | None = None
        self.postgres: Postgres | None = None
        self.secrets = folder / "secrets"
        self.victims = ["driver", "worker"]
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # PostgreSQL's account goes through it
        here = Here(folder)
        if cluster == "cluster" or tracking == "server":
            subprocess.run(
                [sys.executable, str(ROOT / "docker" / "make_secrets.py"), str(self.secrets)],
                check=True,
                stdout=-3,
            )
        if cluster == "cluster":
            token, temp = self.secrets / "ray_token", folder / "ray"
            for name, (number, cpus) in {
                "head": (5, 0),
                "node2": (2, 1),
                "node3": (3, 1),
                "driver": (9, 0),
            }.items():
                place = Here(folder, name)
                # Ray would replace 127.0.0.1 by the machine's address
                place.address = f"127.0.0.{number}"
                head = self.nodes["head"].address if self.nodes else ""
                self.nodes[name] = RayNode(
                    place, token, temp, head=head, cpus=cpus, port=free_port(place.address)
                )
            for node in self.nodes.values():
                node.start()
            self.nodes["head"].wait(PATIENCE)
            self.victims += ["node", "head"]
        else:
            self.victims += ["machine"]
        if tracking == "server":
            password = (self.secrets / "postgres_password").read_text()
            self.postgres = Postgres(here, folder / "pg", password, port=free_port())
            self.postgres.start()
            place_ = f"mlflow@127.0.0.1:{self.postgres.port}/mlflow"
            self.mlflow = MLflowServer(
                here, folder / "mlflow", self.secrets, place_, port=free_port()
            )
            self.mlflow.start(PATIENCE)
            (here.home / ".mlflow").mkdir()
            shutil.copy(self.secrets / "mlflow_credentials", here.home / ".mlflow" / "credentials")
            self.victims += ["mlflow", "database"]
        self.home = here.home

    def close(self) -> None:
        for each in (*self.nodes.values(), self.mlflow, self.postgres):
            if each is not None:
                each.kill()

    def ready(self) -> None:
        """Before a driver starts: a head to start with."""
        if self.nodes:
            self.nodes["head"].wait(PATIENCE)

    def words(self, folder: Path, disturbed: bool) -> list[str]:
        """Of a driver's command; the undisturbed run is not tracked, and in one process."""
        where = (
            [f"cluster={self.cluster}", "cluster.workers=2"]
            if disturbed
            else ["cluster=local", "cluster.workers=1"]
        )
        if self.cluster == "cluster" and disturbed:
            where = ["cluster=address", f"cluster.address={self.nodes['head'].address}"]
            where += [f"+cluster.settings._node_ip_address={self.nodes['driver'].place.address}"]
        track = [f"tracking={self.tracking if disturbed else 'none'}"]
        track += (
            [f"tracking.uri={self.mlflow.uri}", f"tracking.experiment={folder.name}"]
            if self.mlflow and disturbed
            else []
        )
        run = [
            sys.executable,
            "-m",
            "harness",
            "run",
            str(folder / "chaos.yaml"),
            "evaluations.limit=4",
            "device=cpu",
        ]
        return [*run, f"runs={folder}/runs", *where, *track]

    def environment(self, folder: Path, disturbed: bool) -> dict[str, str]:
        own = self.nodes["head"].environment if self.nodes else {}
        home = {"HOME": str(self.home)} if self.mlflow else {}
        # those of one of two workers
        threads = 1 if disturbed or self.nodes else max(1, count_cores() // 2)
        shared = {
            "OMP_NUM_THREADS": str(threads),
            "HARNESS_CACHE": str(folder.parent / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        return {**os.environ, **own, **home, **shared}

    def start(self, folder: Path, disturbed: bool = True) -> subprocess.Popen[bytes]:
        """A driver."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chaos.yaml").write_text(SWEEP.replace("Chaos", folder.name), encoding="utf-8")
        log = (folder / "log.txt").open("ab")
        with log:
            words, environment = self.words(folder, disturbed), self.environment(folder, disturbed)
            return subprocess.Popen(
                words, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )

    def kill(self, victim: str, driver: subprocess.Popen[bytes], rng: random.Random) -> bool:
        """Send SIGKILL; False where there was nothing to hit. What is not the driver's is started again."""
        if driver.poll() is not None:
            return False
        if victim in ("node", "head"):
            node = self.nodes["head" if victim == "head" else rng.choice(["node2", "node3"])]
            node.kill()
            time.sleep(rng.uniform(0, 30 if victim == "head" else 5))
            node.start()
            return True
        if victim == "mlflow" and self.mlflow is not None:
            self.mlflow.kill()
            self.mlflow.begin()
            return True
        if victim == "database" and self.postgres is not None:
            self.postgres.kill()
            time.sleep(rng.uniform(0, 3))
            self.postgres.start(PATIENCE)
            return True
        everything = below(driver.pid)
        hit = (
            workers(driver.pid)
            if not self.nodes
            else [each for node in self.nodes.values() for each in node.tasks()]
        )
        if victim == "worker":
            if not hit:
                return False
            end([rng.choice(hit)])
            return True
        driver.kill()
        if victim == "machine":
            end(everything)
        driver.wait()
        deadline = time.monotonic() + 30  # workers notice within a second that their driver is gone
        while any(alive(process) for process in everything) and time.monotonic() < deadline:
            time.sleep(0.1)
        end([process for process in everything if alive(process)])
        return True

    def doubles(self, folder: Path) -> Iterator[str]:
        """What MLflow has twice, unfinished, or without a parent."""
        if self.tracking == "sqlite":
            yield from in_sqlite(folder)
        elif self.mlflow is not None:
            yield from in_server(
                self.mlflow.uri, (self.secrets / "mlflow_password").read_text(), folder.name
            )


def below(pid: int) -> list[psutil.Process]:
    """Processes that a driver started, directly or not."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(pid: int) -> list[psutil.Process]:
    """Those of them that carry out tasks."""
    found = []
    for process in below(pid):
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "harness.execution.executors.processes import serve" in words or "ray::" in words:
            found.append(process)
    return found


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def finished(runs: Path) -> dict[str, tuple[int, int]]:
    """Everything complete in a store: path -> (inode, time of change). A file that is written again has another."""
    patterns = ("checkpoints/*/manifest.json", "cells/*/scores/*.json")
    paths = [
        path for pattern in patterns for path in runs.glob(pattern) if not path.name.startswith(".")
    ]
    return {
        str(path.relative_to(runs)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths
    }


def table(runs: Path) -> bytes:
    (path,) = (runs / "tables").glob("*/chaos.md")
    return path.read_bytes()


def disturb(
    folder: Path, report: Report, rng: random.Random, kills: int, setting: Setting, longest: float
) -> None:
    """One sweep, from nothing until it is done, killed at every round that there are kills left for."""
    complete: dict[str, tuple[int, int]] = {}
    for _ in range(ROUNDS):
        setting.ready()
        driver = setting.start(folder)
        report.rounds += 1
        try:
            while driver.poll() is None and sum(report.kills.values()) < kills:
                try:
                    driver.wait(rng.uniform(0.2, longest))
                    break
                except subprocess.TimeoutExpired:
                    (victim,) = rng.choices(
                        setting.victims, [WEIGHTS.get(victim, 4) for victim in setting.victims]
                    )
                    report.kills[victim] = report.kills.get(victim, 0) + setting.kill(
                        victim, driver, rng
                    )
                    print(f"{folder.name}: {report.text}", flush=True)
            try:
                code = driver.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                report.problems.append(
                    f"{folder.name}: a driver hung for {PATIENCE} s; see {folder}/log.txt"
                )
                return
        finally:
            end([*below(driver.pid)])
            if driver.poll() is None:
                driver.kill()
        now = finished(folder / "runs")
        again = sorted(name for name, mark in complete.items() if now.get(name) != mark)
        report.problems += [
            f"{folder.name}: {name} was complete and was written again" for name in again
        ]
        complete = now
        if code == 0:
            report.sweeps += 1
            return
    report.problems.append(f"{folder.name}: not done after {ROUNDS} rounds; see {folder}/log.txt")


def in_sqlite(folder: Path) -> Iterator[str]:
    """What the database beside a store has twice, unfinished, or without a parent."""
    import sqlite3

    with sqlite3.connect(folder / "mlflow.db") as database:
        query = "SELECT value, COUNT(*) FROM tags WHERE key = ? GROUP BY value"
        for tag in ("harness.key", "harness.sweep"):
            rows = database.execute(query, (tag,)).fetchall()
            yield from (
                f"{folder.name}: {count} MLflow runs with {tag} {value[:12]}"
                for value, count in rows
                if count > 1
            )
            if not rows:
                yield f"{folder.name}: MLflow has no run with {tag}"
        parents = {
            value
            for (value,) in database.execute(
                "SELECT value FROM tags WHERE key = 'mlflow.parentRunId'"
            )
        }
        known = {value for (value,) in database.execute("SELECT run_uuid FROM runs")}
        yield from (
            f"{folder.name}: runs without their parent {parent}"
            for parent in sorted(parents - known)
        )
        states = database.execute(
            "SELECT status, COUNT(*) FROM runs WHERE status != 'FINISHED' GROUP BY status"
        ).fetchall()
        yield from (f"{folder.name}: {count} MLflow runs are {status}" for status, count in states)


def in_server(uri: str, password: str, name: str) -> Iterator[str]:
    """The same of a sweep's runs in a server."""

    def ask(
        path: str, body: dict[str, object] | None = None
    ) -> dict[str, list[dict[str, dict[str, object]]]]:
        data = None if body is None else json.dumps(body).encode()
        login = base64.b64encode(f"harness:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{uri}{path}", data, headers), timeout=60
        ) as answer:
            found: dict[str, list[dict[str, dict[str, object]]]] = json.load(answer)
            return found

    experiment = ask(f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")[
        "experiment"
    ]
    body = {"experiment_ids": [experiment["experiment_id"]], "max_results": 1000}  # type: ignore[call-overload]
    runs = ask("/api/2.0/mlflow/runs/search", body).get("runs", [])
    marks = [
        {str(tag["key"]): str(tag["value"]) for tag in run["data"].get("tags", [])} for run in runs
    ]  # type: ignore[attr-defined]
    keys = [mark["harness.key"] for mark in marks if "harness.key" in mark]
    parents = [
        str(run["info"]["run_id"])
        for run, mark in zip(runs, marks, strict=True)
        if "harness.key" not in mark
    ]
    if len(keys) != len(set(keys)) or len(parents) != 1 or not keys:
        yield f"{name}: MLflow has {len(keys)} runs of {len(set(keys))} cells and {len(parents)} of the sweep"
    if any(
        mark.get("mlflow.parentRunId") not in parents for mark in marks if "harness.key" in mark
    ):
        yield f"{name}: MLflow has runs without a parent"
    states = sorted({str(run["info"]["status"]) for run in runs} - {"FINISHED"})
    if states:
        yield f"{name}: MLflow has runs that are {', '.join(states)}"


def chaos(
    folder: Path,
    kills: int,
    seed: int = 0,
    cluster: str = "local",
    tracking: str = "none",
    longest: float = 0.0,
    seconds: float = float("inf"),
) -> Report:
    """Disturb sweeps until so many kills have hit, or the time is over. longest: seconds between two kills; 0: those of an
    undisturbed run."""
    report, rng, began = Report(), random.Random(seed), time.monotonic()
    setting = Setting(folder, cluster, tracking)
    try:
        calm = folder / "undisturbed"
        started = time.monotonic()
        code = setting.start(calm, disturbed=False).wait(PATIENCE)
        longest = longest or time.monotonic() - started
        if code:
            report.problems.append(f"the undisturbed run ended with {code}; see {calm}/log.txt")
            return report
        expected, number = table(calm / "runs"), 0
        while sum(report.kills.values()) < kills and time.monotonic() - began < seconds:
            place = folder / f"sweep-{number}"
            disturb(place, report, rng, kills, setting, longest)
            if not report.problems:
                # what it missed while it was down is sent by the next run
                if setting.mlflow is not None:
                    setting.mlflow.wait(PATIENCE)
                    setting.ready()
                    setting.start(place).wait(PATIENCE)
                if table(place / "runs") != expected:
                    report.problems.append(
                        f"{place.name}: its table is not that of the undisturbed run"
                    )
                if "damaged" in (place / "log.txt").read_text(errors="replace"):
                    report.problems.append(
                        f"{place.name}: a damaged file was read; see {place}/log.txt"
                    )
                report.problems += list(setting.doubles(place))
            print(f"{time.monotonic() - began:6.0f} s  {report.text}", flush=True)
            if report.problems:
                return report
            shutil.rmtree(place)
            number += 1
    finally:
        setting.close()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cluster", choices=("local", "ray", "cluster"), default="local")
    parser.add_argument("--tracking", choices=("none", "sqlite", "server"), default="sqlite")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no other sweep after so many"
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=0.0,
        help="seconds between two kills at most; 0: from an undisturbed run",
    )
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    lacking = services.server_lacking() if given.tracking == "server" else ""
    if lacking:
        print(f"not run: {lacking}; --tracking sqlite needs no server")
        return 2
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with this
    report = chaos(
        folder.absolute(),
        given.kills,
        given.seed,
        given.cluster,
        given.tracking,
        given.longest,
        given.seconds,
    )
    print(f"{report.text}, seed {given.seed}")
    print("\n".join(report.problems) or "tables equal to the byte, nothing done twice")
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
