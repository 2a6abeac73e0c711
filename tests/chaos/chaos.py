"""Kill a sweep at random moments until it is done, and compare what is left with a run that nobody disturbed.

    python tests/chaos/chaos.py --kills 100 --seed 0 [--cluster ray] [--tracking sqlite] [--folder DIR]

Each round starts `harness run` and, after a random time, sends SIGKILL to the driver, to one of its worker processes, or to the
driver and all of them (as a machine does that goes down). Rounds follow one another until the sweep is done; then the next sweep
starts from an empty store, until so many kills have hit. Afterwards must hold, for every sweep:

    the table has the bytes of the undisturbed run
    no checkpoint and no score that was complete was written again
    no half-written file counts as anything
    MLflow, where it is on, has one run per cell and one for the sweep

Exit code 0 when all of it held.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

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
ROUNDS = 60                                     # of one sweep; more would mean that it makes no progress
VICTIMS = ("driver", "worker", "machine")


@dataclass
class Report:
    """What was done and what was wrong."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    sweeps: int = 0
    rounds: int = 0
    problems: list[str] = field(default_factory=list)


def command(folder: Path, cluster: str, tracking: str, action: str = "run") -> list[str]:
    words = [f"runs={folder}/runs", f"cluster={cluster}", "cluster.workers=2", f"tracking={tracking}"]
    return [sys.executable, "-m", "harness", action, str(folder / "chaos.yaml"), "evaluations.limit=4", "device=cpu", *words]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HARNESS_CACHE": str(folder.parent / "cache"), "PYTHONPATH": str(ROOT)}


def start(folder: Path, cluster: str, tracking: str) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chaos.yaml").write_text(SWEEP, encoding="utf-8")
    log = (folder / "log.txt").open("ab")
    with log:
        return subprocess.Popen(
            command(folder, cluster, tracking), env=environment(folder), stdout=log, stderr=log, cwd=folder, start_new_session=True
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
        if "harness.schedule import serve" in words or "ray::" in words:
            found.append(process)
    return found


def kill(victim: str, driver: subprocess.Popen[bytes], rng: random.Random) -> bool:
    """Send SIGKILL; False where there was nothing to hit."""
    if driver.poll() is not None:
        return False
    everything = below(driver.pid)
    hit = workers(driver.pid)
    if victim == "worker":
        if not hit:
            return False
        end([rng.choice(hit)])
        return True
    driver.kill()
    if victim == "machine":
        end(everything)
    driver.wait()
    deadline = time.monotonic() + 30            # workers notice within a second that their driver is gone
    while any(alive(process) for process in everything) and time.monotonic() < deadline:
        time.sleep(0.1)
    end([process for process in everything if alive(process)])
    return True


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
    paths = [path for pattern in patterns for path in runs.glob(pattern) if not path.name.startswith(".")]
    return {str(path.relative_to(runs)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def table(runs: Path) -> bytes:
    (path,) = (runs / "tables").glob("*/chaos.md")
    return path.read_bytes()


def disturb(folder: Path, report: Report, rng: random.Random, kills: int, cluster: str, tracking: str, longest: float) -> None:
    """One sweep, from nothing until it is done, killed at every round that there are kills left for."""
    complete: dict[str, tuple[int, int]] = {}
    for _ in range(ROUNDS):
        driver = start(folder, cluster, tracking)
        report.rounds += 1
        try:
            while driver.poll() is None and sum(report.kills.values()) < kills:
                try:
                    driver.wait(rng.uniform(0.2, longest))
                    break
                except subprocess.TimeoutExpired:
                    victim = rng.choice(VICTIMS)
                    report.kills[victim] += kill(victim, driver, rng)
            code = driver.wait(300)
        finally:
            end([*below(driver.pid)])
            if driver.poll() is None:
                driver.kill()
        now = finished(folder / "runs")
        again = sorted(name for name, mark in complete.items() if now.get(name) != mark)
        report.problems += [f"{folder.name}: {name} was complete and was written again" for name in again]
        complete = now
        if code == 0:
            report.sweeps += 1
            return
    report.problems.append(f"{folder.name}: not done after {ROUNDS} rounds; see {folder}/log.txt")


def doubles(folder: Path) -> Iterator[str]:
    """What MLflow has twice, or without a parent."""
    import sqlite3

    with sqlite3.connect(folder / "mlflow.db") as database:
        query = "SELECT value, COUNT(*) FROM tags WHERE key = ? GROUP BY value"
        for tag in ("harness.key", "harness.sweep"):
            rows = database.execute(query, (tag,)).fetchall()
            yield from (f"{folder.name}: {count} MLflow runs with {tag} {value[:12]}" for value, count in rows if count > 1)
            if not rows:
                yield f"{folder.name}: MLflow has no run with {tag}"
        parents = {value for (value,) in database.execute("SELECT value FROM tags WHERE key = 'mlflow.parentRunId'")}
        known = {value for (value,) in database.execute("SELECT run_uuid FROM runs")}
        yield from (f"{folder.name}: runs without their parent {parent}" for parent in sorted(parents - known))


def chaos(
    folder: Path, kills: int, seed: int = 0, cluster: str = "local", tracking: str = "none", longest: float = 0.0
) -> Report:
    """Disturb sweeps until so many kills have hit. longest: seconds between two kills; 0: two thirds of an undisturbed run."""
    report, rng = Report(), random.Random(seed)
    calm = folder / "undisturbed"
    began = time.monotonic()
    code = start(calm, cluster, "none").wait(300)
    longest = longest or (time.monotonic() - began) * 2 / 3
    if code:
        report.problems.append(f"the undisturbed run ended with {code}; see {calm}/log.txt")
        return report
    expected = table(calm / "runs")
    number = 0
    while sum(report.kills.values()) < kills:
        place = folder / f"sweep-{number}"
        disturb(place, report, rng, kills, cluster, tracking, longest)
        if not report.problems:
            if table(place / "runs") != expected:
                report.problems.append(f"{place.name}: its table is not that of the undisturbed run")
            report.problems += list(doubles(place)) if tracking == "sqlite" else []
        if report.problems:
            return report
        shutil.rmtree(place)
        number += 1
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cluster", choices=("local", "ray"), default="local")
    parser.add_argument("--tracking", choices=("none", "sqlite"), default="sqlite")
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    report = chaos(folder.absolute(), given.kills, given.seed, given.cluster, given.tracking)
    hits = ", ".join(f"{victim} {count}" for victim, count in report.kills.items())
    print(f"{report.sweeps} sweeps, {report.rounds} starts, {sum(report.kills.values())} kills ({hits}), seed {given.seed}")
    print("\n".join(report.problems) or "tables equal to the byte, nothing done twice")
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
