"""What the harness costs beside the work itself: `python tests/benchmarks/bench_overhead.py [local|ray]`.

    fixed       plan, cluster, imports, processes: a sweep of one cell, less the seconds of its work
    per cell    locks, records, logs, events, state: what each further cell adds, less the seconds of its work

The work is what checkpoints and scores report of themselves. Cells are RTN on the embedded model with a few windows of perplexity,
so that overheads show. Limits: 15 s fixed, 0.2 s per cell; the exit code says whether they hold.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CELLS = (1, 25)  # two points of a line: its height is the fixed part, its slope the part per cell
LIMITS = {"fixed": 15.0, "per cell": 0.2}


def measure(cells: int, cluster: str, folder: Path) -> tuple[float, float]:
    """(wall seconds, seconds of work) of a sweep of `cells` cells from an empty store, in a process of its own start-up."""
    script = """
import sys, time, json
began = time.monotonic()
from harness.config.grid import load_sweep
from harness.execution import driver
cells, cluster, runs = int(sys.argv[1]), sys.argv[2], sys.argv[3]
# Distinct cells of equal cost: one group size more or less changes the key, not the work.
import dataclasses
base = load_sweep(None, [
    "model=demo", "method=rtn", "scheme=w4g32", "baseline=false", "evaluations=demo_perplexity", "evaluations.limit=4",
    f"cluster={cluster}", "cluster.workers=1", f"runs={runs}", "tracking=none", "device=cpu",
])
(cell,) = base.cells
many = []
for number in range(cells):
    weight = dataclasses.replace(cell.scheme.weight, bits=2 + number % 7, group_size=(32, 16, 8, 4)[number // 7])
    many.append(dataclasses.replace(cell, scheme=dataclasses.replace(cell.scheme, name=f"w{number}", weight=weight)))
summary = driver.run(dataclasses.replace(base, cells=tuple(many)))
assert summary.exit_code == 0 and len(summary.records) == cells, summary.text
work = sum(r.manifest["seconds"] + sum(s["seconds"] for s in r.scores.values()) for r in summary.records)
print(json.dumps([time.monotonic() - began, work]))
"""
    runs = folder / f"{cluster}-{cells}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(cells), cluster, str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    wall, work = json.loads(done.stdout.splitlines()[-1])
    return wall, work


def main() -> int:
    clusters = sys.argv[1:] or ["local", "ray"]
    machine, load = platform.processor() or platform.machine(), os.getloadavg()[0]
    print(f"{machine}, {os.cpu_count()} cores, load {load:.1f} before, {time.strftime('%Y-%m-%d')}")
    print(f"{'cluster':<8} {'cells':>5} {'wall s':>8} {'work s':>8} {'overhead s':>11}")
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        for cluster in clusters:
            overheads = []
            for cells in CELLS:
                wall, work = measure(cells, cluster, Path(folder))
                overheads.append(wall - work)
                print(f"{cluster:<8} {cells:>5} {wall:>8.2f} {work:>8.2f} {wall - work:>11.2f}")
            slope = (overheads[1] - overheads[0]) / (CELLS[1] - CELLS[0])
            for name, value in (("fixed", overheads[0] - slope * CELLS[0]), ("per cell", slope)):
                fine &= value <= LIMITS[name]
                print(f"{cluster:<8} {name:<9} {value:.2f} s (at most {LIMITS[name]:g})")
    return int(not fine)


if __name__ == "__main__":
    raise SystemExit(main())
