"""How much a pass slows down beside other busy processes: `python tests/benchmarks/bench_busy.py [--others 8]`.

A random model of Llama's shape is quantized by RTN and GPTQ in a process of its own, alone and beside processes that spin, with the
package's policy for idle threads (they sleep) and with OpenMP's default (they spin). With as many threads as cores, a fair share of
c cores among t threads and s spinning processes is c / (t + s) of a core each, so a slow-down by (t + s) / c is fair.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHILD = """
import sys, time
import harness, os
if sys.argv[2] == "default":
    del os.environ["OMP_WAIT_POLICY"]
sys.path.insert(0, sys.argv[3])
import tempfile, torch
from pathlib import Path
from small import GPTQ, RTN, cell, failures, quantize
torch.set_num_threads(int(sys.argv[4]))
folder = Path(sys.argv[1])
cells = [cell(folder, method, 4, 64) for method in (RTN, GPTQ)]
for _ in range(2):  # the first warms up
    with tempfile.TemporaryDirectory() as store:
        began = time.monotonic()
        assert not failures(quantize(cells, folder, Path(store)))
print(time.monotonic() - began)
"""


def spin(seconds: float) -> None:
    """Keep one core busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def pass_seconds(folder: Path, policy: str, threads: int) -> float:
    """Wall time of the second of two passes in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_NUM"))}
    command = [sys.executable, "-c", CHILD, str(folder), policy, str(HERE.parent / "support")]
    done = subprocess.run(
        [*command, str(threads)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--others", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from bench_memory import write_model

    cores = len(os.sched_getaffinity(0))
    fair = (cores + given.others) / cores
    print(
        f"{cores} cores and threads, {given.others} spinning processes, load {os.getloadavg()[0]:.1f} before;"
    )
    print(f"a fair share slows a pass down {fair:.1f} times, the goal is at most twice that\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_model(folder, 4, given.hidden)
        alone = {policy: pass_seconds(folder, policy, cores) for policy in ("passive", "default")}
        beside: dict[str, float] = {}
        for policy in alone:
            others = [
                multiprocessing.Process(target=spin, args=(600,), daemon=True)
                for _ in range(given.others)
            ]
            for other in others:
                other.start()
            try:
                beside[policy] = pass_seconds(folder, policy, cores)
            finally:
                for other in others:
                    other.terminate()
                    other.join()
    print(
        f"{'idle threads':16}{'alone':>10}{'beside':>10}{'slow-down':>12}{'of its fair share':>20}"
    )
    for policy, title in (("passive", "sleep (ours)"), ("default", "spin (default)")):
        ratio = beside[policy] / alone[policy]
        print(
            f"{title:16}{alone[policy]:>8.2f} s{beside[policy]:>8.2f} s{ratio:>11.1f}×{ratio / fair:>19.1f}×"
        )


if __name__ == "__main__":
    main()
