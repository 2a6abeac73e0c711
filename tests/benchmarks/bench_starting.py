"""CPU time of commands on the demo sweep with all cells done or none, each in a new process, the second time it is asked.

    python tests/benchmarks/bench_starting.py [CELLS]

Goals on a machine with two cores: help, list, status, table and show under 0.7 s, a repeated plan and a finished run under 2 s,
a plan of CELLS (10,000) cells under 10 s. The last column is the time of the same command with an empty cache.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def seconds(*words: str, cache: str) -> float:
    """CPU seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "harness", *words],
        env={**os.environ, "HARNESS_CACHE": cache},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print one line per command: its words, the goal, seconds, seconds with an empty cache."""
    cells = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        runs, cache = Path(folder) / "runs", str(Path(folder) / "cache")
        small = ["method=rtn", "scheme=w4,w3", "evaluations.limit=4", "cluster=local"]
        sweep = ["demo", *small, f"runs={runs}"]
        seconds("run", *sweep, cache=cache)
        key = next((runs / "cells").iterdir()).name
        big = ["model=demo", "method=rtn,gptq", "scheme=w8,w4,w3,w2,w4g32", "calibration=demo"]
        big += [f"seed=range(0,{cells // 5})", "tracking=none", f"runs={runs}"]
        for goal, words in (
            (0.7, ["--help"]),
            (0.7, ["list", "methods"]),
            (0.7, ["status", *sweep]),
            (0.7, ["table", *sweep]),
            (0.7, ["show", key, "--runs", str(runs)]),
            (2.0, ["plan", *sweep]),
            (2.0, ["run", *sweep]),
            (10.0, ["plan", *big]),
        ):
            first = seconds(*words, cache=str(Path(folder) / f"empty-{words[0]}"))
            seconds(*words, cache=cache)
            again = seconds(*words, cache=cache)
            shown = " ".join(words[:2] if words is not big else ["plan", f"of {cells} cells"])
            print(f"{shown:<40} {again:6.2f} s   goal {goal:4.1f} s   first {first:6.2f} s")


if __name__ == "__main__":
    main()
