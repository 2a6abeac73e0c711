"""The cluster of docs/cluster.md without containers, as root: `python tests/topology/topology.py [--folder DIR] [--only NAME,…]`.

Five hosts on one wire (`network.py`), with addresses, processes and disks of their own: a Ray head without tasks, two workers,
the driver, and one with PostgreSQL, an S3 server and the MLflow server of docker/, which keeps artifacts there. Ray asks for a
token, MLflow and PostgreSQL for passwords, S3 for signatures, all from the files of docker/make_secrets.py. Then, in order, each
a check that ends the program with 1 when it fails:

    doors       who listens where; without the token, the password or the right host name nobody gets in
    not_shared  a store on the driver's own disk is refused in seconds, naming both workers, before any work
    sweep       a sweep over both workers: the table of an undisturbed run, every run and artifact in MLflow
    objects     a sweep with its store in S3 and nothing shared, a node lost on the way: the same table, every file whole; MLflow's
                artifacts lie in S3 too; wrong keys are refused. Named as not run where tests/topology/requirements.txt is missing
    unplugged   a worker's link is down while it works: its task goes elsewhere; the seconds until then
    head        the head loses power while tasks run and comes back: the driver goes on; the seconds until then
    tracking    the MLflow server and PostgreSQL die while a sweep runs: the sweep does not; MLflow has everything later, once
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex, token_urlsafe
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))

import network
import services
from network import Host, Network, end, wait_for
from services import ROOT, MLflowServer, ObjectStore, Postgres, RayNode

SWEEP = """\
# Topology
# Two methods, so that both workers have something to do.
model: demo
calibration: demo
calibration.samples: 4
calibration.length: 64
grids:
  - {method: [rtn, gptq], scheme: [w4, w3]}
evaluations: [demo_perplexity]
tables:
  - name: topology
    columns: [checkpoint/bits_per_weight, {metric: demo_perplexity/perplexity, digits: 6}]
"""
CELLS = 5  # with the baseline
UNPLUGGED_SECONDS = 180.0  # at most, until a worker that cannot be reached is noticed
HEAD_SECONDS = 120.0  # at most, from a head's return until the driver is with it again

ASK = """
import json, sys, urllib.request
def ask(path, body=None):
    request = urllib.request.Request(sys.argv[1] + path, data=None if body is None else json.dumps(body).encode())
    request.add_header("Authorization", sys.argv[2])
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()
experiment = json.loads(ask("/api/2.0/mlflow/experiments/get-by-name?experiment_name=" + sys.argv[3]))["experiment"]
found = json.loads(ask("/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment["experiment_id"]], "max_results": 1000}))
runs = []
for run in found.get("runs", []):
    tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}
    run_id = run["info"]["run_id"]
    files = json.loads(ask("/api/2.0/mlflow/artifacts/list?run_id=" + run_id)).get("files", [])
    cell = next((f["path"] for f in files if f["path"] == "cell.json"), None)
    place = run["info"]["artifact_uri"].removeprefix("mlflow-artifacts:")
    text = ask("/api/2.0/mlflow-artifacts/artifacts" + place + "/cell.json").decode() if cell else ""
    runs.append({"id": run_id, "status": run["info"]["status"], "tags": tags, "files": [f["path"] for f in files], "cell": text})
print(json.dumps(runs))
"""

LOOK = """
import hashlib, json, sys, s3fs
files = s3fs.S3FileSystem()
names = files.find(sys.argv[1])
damaged, complete = [], 0
for name in names:
    if "/checkpoints/" in name and name.endswith("/manifest.json"):
        complete += 1
        for file, known in json.loads(files.cat(name)).get("files", {}).items():
            if hashlib.sha256(files.cat(name.rpartition("/")[0] + "/" + file)).hexdigest() != known["sha256"]:
                damaged.append(file)
(table,) = [name for name in names if name.endswith("/topology.md")]
print(json.dumps({"names": names, "checkpoints": complete, "damaged": damaged, "table": files.cat(table).decode()}))
"""
BUCKET = "runs"


class Topology:
    """The hosts, what runs on them, and the checks."""

    def __init__(self, root: Path) -> None:
        self.root, self.began = root, time.monotonic()
        os.chmod(root, 0o755)  # PostgreSQL's account goes through it
        self.network = Network(root)
        self.secrets = root / "secrets"
        _secrets(self.secrets)
        names = ("head", "worker1", "worker2", "driver", "services")
        self.head, self.worker1, self.worker2, self.driver, self.services = map(
            self.network.host, names
        )
        token, temp = self.secrets / "ray_token", self.network.disk / "ray"
        first = RayNode(self.head, token, temp, cpus=0)
        others = ((self.worker1, 1), (self.worker2, 1), (self.driver, 0))
        self.nodes = {"head": first} | {
            host.name: RayNode(host, token, temp, head=first.address, cpus=cpus)
            for host, cpus in others
        }
        self.postgres = Postgres(
            self.services,
            self.services.own / "pg",
            (self.secrets / "postgres_password").read_text(),
        )
        place = f"mlflow@{self.services.address}:5432/mlflow"
        self.no_objects = services.objects_lacking()
        self.objects = (
            None
            if self.no_objects
            else ObjectStore(self.services, self.services.own / "swift", self.secrets)
        )
        if self.objects is not None:
            keys = {
                "AWS_ENDPOINT_URL": self.objects.uri,
                "AWS_SHARED_CREDENTIALS_FILE": str(_runs_key(self.secrets)),
            }
            for node in self.nodes.values():
                node.more = keys  # of the store of sweeps; MLflow's own are on its host alone
        self.mlflow = MLflowServer(
            self.services, self.services.own / "mlflow", self.secrets, place, objects=self.objects
        )
        (self.driver.home / ".mlflow").mkdir()
        shutil.copy(
            self.secrets / "mlflow_credentials", self.driver.home / ".mlflow" / "credentials"
        )
        self.expected = b""

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def check(self, holds: bool, text: str) -> None:
        self.say(text.splitlines()[0] if holds else f"FAILED: {text}")
        if not holds:
            raise SystemExit(1)

    def start(self) -> None:
        """Everything, as the compose file does."""
        self.postgres.start()
        self.say(f"PostgreSQL on {self.services.address}:5432")
        if self.objects is not None:
            self.say(f"S3 on {self.objects.uri} after {self.objects.start():.0f} s")
        self.nodes["head"].start()
        self.say(
            f"Ray's head on {self.nodes['head'].address} after {self.nodes['head'].wait():.0f} s"
        )
        for name in ("worker1", "worker2", "driver"):
            self.nodes[name].start()
        self.say(f"MLflow on {self.mlflow.uri} after {self.mlflow.start():.0f} s")

    def close(self) -> None:
        self.network.close()

    # -- the driver ----------------------------------------------------------------------------------------------------

    def command(
        self, runs: Path | str, name: str, *words: str, cluster: bool = True, tracking: bool = True
    ) -> list[str]:
        file = self.network.shared / f"{name}.yaml"
        file.write_text(SWEEP.replace("Topology", name), encoding="utf-8")
        where = (
            ["cluster=address", f"cluster.address={self.nodes['head'].address}"]
            if cluster
            else ["cluster=local"]
        )
        track = (
            ["tracking=server", f"tracking.uri={self.mlflow.uri}"]
            if tracking
            else ["tracking=none"]
        )
        python = ["env", f"--chdir={self.network.disk}", sys.executable, "-m", "harness"]
        return [
            *python,
            "run",
            str(file),
            "evaluations.limit=4",
            "device=cpu",
            f"runs={runs}",
            *where,
            *track,
            *words,
        ]

    @property
    def variables(self) -> dict[str, str]:
        return {
            **self.nodes["driver"].environment,
            "HARNESS_CACHE": str(self.network.disk / "cache"),
        }

    def run(
        self, runs: Path, name: str, *words: str, timeout: float = 400, **where: bool
    ) -> subprocess.CompletedProcess[str]:
        return self.driver.run(
            self.command(runs, name, *words, **where), timeout=timeout, environment=self.variables
        )

    def begin(self, runs: Path | str, name: str, *words: str) -> subprocess.Popen[bytes]:
        """A sweep in the background, once a task of it runs on a worker."""
        process = self.driver.start(self.command(runs, name, *words), f"{name}.log", self.variables)
        working = [host for host in (self.worker1, self.worker2) if host.is_on]
        wait_for(
            "a task runs",
            lambda: any(self.busy(host) for host in working) or process.poll() is not None,
            200,
        )
        return process

    @staticmethod
    def busy(host: Host) -> bool:
        """Whether a task runs on a host now; Ray names a worker process by what it does."""
        for process in host.processes():
            try:
                if "ray::_stream" in " ".join(process.cmdline()):
                    return True
            except Exception:  # it ended meanwhile
                continue
        return False

    def printed(self, name: str) -> str:
        return (self.driver.own / f"{name}.log").read_text(errors="replace")

    def finished(self, process: subprocess.Popen[bytes], name: str, seconds: float) -> None:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = -1
            end(process)
        self.check(
            code == 0,
            f"{name}: the driver ends well ({code})\n{self.printed(name)[-1500:] if code else ''}".rstrip(),
        )

    def same_table(self, runs: Path) -> bool:
        (path,) = (runs / "tables").glob("*/topology.md")
        return path.read_bytes() == self.expected

    def tracked(self, name: str) -> list[dict[str, Any]]:
        """The MLflow runs of a sweep, asked for over the wire from the driver's host."""
        password = (self.secrets / "mlflow_password").read_text()
        login = "Basic " + base64.b64encode(f"harness:{password}".encode()).decode()
        done = self.driver.run([sys.executable, "-c", ASK, self.mlflow.uri, login, name])
        if done.returncode:
            raise RuntimeError(done.stderr)
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def check_tracked(self, name: str) -> None:
        runs = self.tracked(name)
        cells = [run for run in runs if "harness.key" in run["tags"]]
        parents = [run for run in runs if "harness.key" not in run["tags"]]
        keys = {run["tags"]["harness.key"] for run in cells}
        self.check(
            len(parents) == 1 and len(cells) == len(keys) == CELLS,
            f"{name}: MLflow has one run per cell and one parent",
        )
        orphans = [
            run for run in cells if run["tags"].get("mlflow.parentRunId") != parents[0]["id"]
        ]
        unfinished = [run["status"] for run in runs if run["status"] != "FINISHED"]
        self.check(
            not orphans and not unfinished,
            f"{name}: no orphan, all finished {unfinished or ''}".rstrip(),
        )
        whole = all(
            json.loads(run["cell"])["cell_key"] == run["tags"]["harness.key"] for run in cells
        )
        self.check(
            whole and "tables" in parents[0]["files"],
            f"{name}: artifacts come back through the server",
        )

    # -- the checks, in order ------------------------------------------------------------------------------------------

    def doors(self) -> None:
        for host in self.network.hosts.values():
            doors = sorted({(name, address) for name, address, _ in host.listening()})
            self.say(
                f"{host.name} listens: "
                + ", ".join(f"{name} on {address}" for name, address in doors)
            )
        open_ = [
            each
            for each in self.services.listening()
            if each[1] not in (self.services.address, "127.0.0.1")
        ]
        self.check(not open_, f"services listen on the given address alone {open_ or ''}".rstrip())
        self.check(self.mlflow.ask("/") == 401, "MLflow without a password: 401")
        self.check(
            self.mlflow.ask("/api/2.0/mlflow/experiments/search?max_results=1", "wrong") == 401,
            "with a wrong one: 401",
        )
        password = (self.secrets / "mlflow_password").read_text()
        self.check(
            self.mlflow.ask("/api/2.0/mlflow/experiments/search?max_results=1", password) == 200,
            "with the right one: 200",
        )
        self.check(
            self.mlflow.ask("/", password, host="elsewhere.example") == 403,
            "under a foreign host name: 403",
        )
        script = f"import psycopg2; psycopg2.connect('postgresql://mlflow@{self.services.address}:5432/mlflow', connect_timeout=5)"
        refused = self.worker1.run([sys.executable, "-c", script])
        self.check(
            refused.returncode != 0,
            f"PostgreSQL without a password: {refused.stderr.strip().splitlines()[-1][-90:]}",
        )
        script = "import ray, sys; ray.init(address=sys.argv[1], logging_level=50)"
        wrong = self.driver.own / "wrong_token"
        wrong.write_text("y" * 43)
        for mode, more in (
            ("no token", {"RAY_AUTH_MODE": "disabled"}),
            ("a wrong token", {"RAY_AUTH_TOKEN_PATH": str(wrong)}),
        ):
            refused = self.driver.run(
                [sys.executable, "-c", script, self.nodes["head"].address],
                environment={**self.variables, **more},
            )
            self.check(
                refused.returncode != 0,
                f"Ray with {mode}: {refused.stderr.strip().splitlines()[-1][:90]}",
            )
        names = ("ray_token", "mlflow_password", "mlflow_key", "postgres_password")
        secrets = [(self.secrets / name).read_text().strip() for name in names]
        words = []
        for host in self.network.hosts.values():
            for process in host.processes():
                with contextlib.suppress(psutil.Error):  # one that ended meanwhile
                    words.append(" ".join(process.cmdline()))
        self.check(
            not [word for word in words if any(secret in word for secret in secrets)],
            "no command line shows a secret",
        )

    def not_shared(self) -> None:
        began = time.monotonic()
        done = self.run(self.network.disk / "runs", "not_shared", tracking=False)
        said = done.stdout + done.stderr
        named = all(f"node {host} does not see" in said for host in ("worker1", "worker2"))
        self.check(
            done.returncode == 1
            and named
            and not list(self.root.glob("disks/*/runs/checkpoints/*/*")),
            f"a store on the driver's disk is refused before any work, after {time.monotonic() - began:.0f} s in all",
        )

    def sweep(self) -> None:
        runs = self.network.shared / "runs"
        done = self.run(runs, "sweep")
        self.check(
            done.returncode == 0,
            f"a sweep over both workers\n{(done.stdout + done.stderr)[-2000:]}",
        )
        hosts = self.workers_of(runs)
        self.check(hosts == {"worker1", "worker2"}, f"tasks ran on {', '.join(sorted(hosts))}")
        calm = self.run(self.network.disk / "calm", "sweep", cluster=False, tracking=False)
        self.check(calm.returncode == 0, "the same sweep on the driver's host alone, without Ray")
        (path,) = (self.driver.own / "calm" / "tables").glob("*/topology.md")
        self.expected = path.read_bytes()
        self.check(self.same_table(runs), "both tables are equal to the byte")
        self.check_tracked("sweep")
        kept = [
            path
            for folder in (runs, self.driver.own)
            for path in folder.rglob("*")
            if path.is_file()
        ]
        secrets = [
            (self.secrets / name).read_bytes().strip()
            for name in ("ray_token", "mlflow_password", "postgres_password")
        ]
        leaks = [
            path
            for path in kept
            if path.name != "credentials" and any(secret in path.read_bytes() for secret in secrets)
        ]
        self.check(
            not leaks, f"no file of the store or the driver holds a secret {leaks or ''}".rstrip()
        )

    def in_objects(self) -> None:
        if self.objects is None:
            self.say(f"not run: {self.no_objects}")
            return
        url = f"s3://{BUCKET}/topology"
        script = "import s3fs, sys; s3fs.S3FileSystem().mkdir(sys.argv[1])"
        made = self.driver.run([sys.executable, "-c", script, BUCKET], environment=self.variables)
        self.check(made.returncode == 0, f"a bucket{made.stderr[-500:]}")
        wrong = self.driver.own / "wrong_keys"
        wrong.write_text(
            "[default]\naws_access_key_id = harness\naws_secret_access_key = wrong\nregion = us-east-1\n"
        )
        began = time.monotonic()
        denied = {
            **self.variables,
            "AWS_SHARED_CREDENTIALS_FILE": str(self.network.disk / wrong.name),
        }
        done = self.driver.run(
            self.command(url, "objects", tracking=False), timeout=200, environment=denied
        )
        said = (done.stdout + done.stderr).strip()
        self.check(
            done.returncode == 1 and "Traceback" not in said and url in said,
            f"wrong keys are refused after {time.monotonic() - began:.0f} s: {said.splitlines()[-1][:160]}",
        )
        before = {path for path in self.network.shared.rglob("*") if path.is_file()}
        process = self.begin(url, "objects")
        victim = next(host for host in (self.worker1, self.worker2) if self.busy(host))
        self.nodes[victim.name].kill()
        self.say(f"{victim.name} dies while it works")
        self.nodes[victim.name].start()
        self.finished(process, "objects", 500)
        done = self.driver.run([sys.executable, "-c", LOOK, url], environment=self.variables)
        self.check(done.returncode == 0, f"the bucket is read{done.stderr[-800:]}")
        found = json.loads(done.stdout)
        self.check(found["table"].encode() == self.expected, "the table is the same to the byte")
        number, damaged = len(found["names"]), found["damaged"]
        self.check(
            found["checkpoints"] == CELLS and not damaged,
            f"{number} objects; the files of {CELLS} checkpoints are as their manifests say {damaged or ''}".rstrip(),
        )
        new = {path for path in self.network.shared.rglob("*") if path.is_file()} - before
        self.check(
            new <= {self.network.shared / "objects.yaml"}, "nothing went through the shared folder"
        )
        self.check_tracked("objects")
        script = "import s3fs, sys; print(*s3fs.S3FileSystem().find(sys.argv[1]), sep='\\n')"
        listed = self.driver.run(
            [sys.executable, "-c", script, "s3://mlflow/artifacts"], environment=self.variables
        ).stdout.split()
        cells = [name for name in listed if name.endswith("/cell.json")]
        self.check(
            len(cells) >= CELLS,
            f"MLflow's {len(listed)} artifacts lie in S3, {len(cells)} cells among them",
        )
        file = str(self.network.shared / "objects.yaml")
        for command, wanted in (("status", f"{CELLS} of {CELLS} cells"), ("table", "| gptq")):
            words = [
                sys.executable,
                "-m",
                "harness",
                command,
                file,
                "evaluations.limit=4",
                f"runs={url}",
            ]
            done = self.driver.run(words, environment=self.variables)
            said = f"harness {command} reads the bucket"
            self.check(
                done.returncode == 0 and wanted in done.stdout,
                f"{said}\n{(done.stdout + done.stderr)[-500:]}",
            )

    def workers_of(self, runs: Path) -> set[str]:
        """Hosts that the records name."""
        found = set()
        for path in runs.glob("cells/*/record.json"):
            text = path.read_text()
            found |= {
                name for name in self.network.hosts if f'"{name}"' in text or f'"{name}:' in text
            }
        return found

    def unplugged(self) -> None:
        runs = self.network.shared / "runs-unplugged"
        process = self.begin(runs, "unplugged")
        victim = next(host for host in (self.worker1, self.worker2) if self.busy(host))
        victim.unplug()
        began = time.monotonic()
        self.say(f"{victim.name} is unplugged while it works")
        wait_for(
            "the loss is noticed",
            lambda: "no longer answers" in self.printed("unplugged") or process.poll() is not None,
            600,
        )
        took = time.monotonic() - began
        self.check(
            took < UNPLUGGED_SECONDS,
            f"the driver goes on after {took:.0f} s (at most {UNPLUGGED_SECONDS:g})",
        )
        self.finished(process, "unplugged", 400)
        self.check(self.same_table(runs), "the table is the same to the byte")
        self.check_tracked("unplugged")
        victim.plug_in()

    def head_lost(self) -> None:
        runs = self.network.shared / "runs-head"
        process = self.begin(runs, "head")
        self.head.switch_off()
        self.say("the head has lost its power while tasks run")
        time.sleep(45)  # longer than the driver waits before it counts the head as lost
        self.check(process.poll() is None, "the driver waits")
        self.head.switch_on()
        self.nodes["head"].start()
        self.nodes["head"].wait()
        began = time.monotonic()
        self.say("the head is back")
        self.finished(process, "head", 600)
        self.say(f"the sweep is done {time.monotonic() - began:.0f} s after the head's return")
        self.check(self.same_table(runs), "the table is the same to the byte")
        self.check_tracked("head")

    def tracking(self) -> None:
        runs = self.network.shared / "runs-tracking"
        process = self.begin(runs, "tracking")
        self.mlflow.kill()
        self.postgres.kill()
        self.say("the MLflow server and PostgreSQL are killed while a sweep runs")
        code = process.wait(600)
        self.check(
            code == 0 and self.same_table(runs),
            "the sweep ends well, its table is the same to the byte",
        )
        self.postgres.start()
        self.say(f"both are back after {self.mlflow.start():.0f} s")
        done = self.run(runs, "tracking")
        self.check(done.returncode == 0, f"the same command once more\n{done.stdout[-600:]}")
        self.check_tracked("tracking")


def _secrets(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "make_secrets", ROOT / "docker" / "make_secrets.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make(folder)


def _runs_key(secrets: Path) -> Path:
    """A second key, for the store of sweeps, beside the one that only MLflow's server has; returns its credentials file."""
    path, file = secrets / "objects.json", secrets / "runs_credentials"
    made = json.loads(path.read_text())
    pair = {"accessKey": token_hex(10), "secretKey": token_urlsafe(32)}
    made["identities"].append({**made["identities"][0], "name": BUCKET, "credentials": [pair]})
    path.chmod(0o600)
    path.write_text(json.dumps(made))
    file.write_text(
        f"[default]\naws_access_key_id = {pair['accessKey']}\naws_secret_access_key = {pair['secretKey']}\nregion = us-east-1\n"
    )
    return file


def lacking() -> str:
    """Why this cannot run here; empty where it can."""
    return network.lacking() or services.server_lacking()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=None, help="a short path for disks and logs, kept afterwards"
    )
    parser.add_argument(
        "--only", default="", help="names of checks, comma-separated; sweep is always run"
    )
    given = parser.parse_args()
    missing = lacking()
    if missing:
        print(f"not run: {missing}")
        return 2
    root = given.folder or Path(tempfile.mkdtemp(prefix="hq"))
    root.mkdir(exist_ok=True)
    topology = Topology(root.absolute())
    checks: dict[str, Callable[[], None]] = {
        "doors": topology.doors,
        "not_shared": topology.not_shared,
        "sweep": topology.sweep,
        "objects": topology.in_objects,
        "unplugged": topology.unplugged,
        "head": topology.head_lost,
        "tracking": topology.tracking,
    }
    chosen = [
        name
        for name in checks
        if not given.only or name == "sweep" or name in given.only.split(",")
    ]
    try:
        topology.start()
        for name in chosen:
            topology.say(f"--- {name}")
            checks[name]()
        left = topology.no_objects if "objects" in chosen else ""
        topology.say("everything holds" + (f", but objects were not tried: {left}" if left else ""))
    finally:
        topology.close()
        if given.folder is None:
            shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
