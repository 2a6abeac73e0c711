"""Bit budgets on the demo model over seeds of calibration: how often mixed beats uniform, and what an allocation costs.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_budget.py [--seeds 20] [--bits 2.8 3.1 3.594]

For each seed GPTQ makes its candidates at 2, 3 and 4 bits (groups of 32, full-precision inputs) on windows of that seed, and one
budget per size chooses among them, as `sweeps/budget_demo.yaml` says. Printed for each seed and size: the verdict of the test
against the best uniform cell within the size, and the perplexities of both and of the straight line between the uniform cells.

Cost: processor seconds of the pass that makes the three candidates, and of the allocation of all sizes, and of each size alone.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import tempfile
import time
from pathlib import Path

from harness.config.grid import load_sweep
from harness.core.events import Failed
from harness.core.sweep import Sweep
from harness.execution import driver
from harness.execution.allocation import allocate
from harness.execution.tasks import AllocateTask, QuantizeTask
from harness.execution.worker import quantize
from harness.reporting.budgets import BETTER, UNIFORM, WORSE, budget_rows
from harness.storage.store import Store

SWEEP = Path(__file__).resolve().parents[2] / "sweeps" / "budget_demo.yaml"


def sweep_of(seed: int, bits: list[float], runs: Path) -> Sweep:
    from harness.cli.allocate import asked_sizes, with_budgets

    loaded = load_sweep(
        str(SWEEP),
        [
            f"seed={seed}",
            f"runs={runs}",
            "tracking=none",
            "evaluations=demo_perplexity",
            "device=cpu",
        ],
    )
    sizes = asked_sizes(",".join(map(str, bits)), "")
    return with_budgets(loaded, sizes, "gptq_mixed", "", None)


def seconds_of(sweep: Sweep, store: Store) -> tuple[float, float]:
    """Processor seconds of the pass over the candidates, and of the allocation."""
    budget = sweep.budgets[0]
    spent = []
    for task in (
        quantize(QuantizeTask(budget.candidates, str(store.place), "cpu"), store, "cpu"),
        allocate(AllocateTask(budget, sweep.name, str(store.place), device="cpu"), store, "cpu"),
    ):
        began = time.process_time()
        failed = [event.reason for event in task if isinstance(event, Failed)]
        assert not failed, failed
        spent.append(time.process_time() - began)
    return spent[0], spent[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.8, 3.1, 3.594])
    given = parser.parse_args()
    verdicts: dict[float, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    passes, allocations, singles = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        warm = sweep_of(10_000, given.bits[:1], Path(folder) / "warm")
        seconds_of(warm, Store(warm.runtime.runs))
        for seed in range(given.seeds):
            sweep = sweep_of(seed, given.bits, Path(folder) / str(seed))
            store = Store(sweep.runtime.runs)
            made, chosen = seconds_of(sweep, store)
            passes.append(made)
            allocations.append(chosen)
            driver.run(sweep)
            for row in budget_rows(sweep, store):
                verdicts[row.size.bits][row.verdict] += 1
                shown = [
                    "-" if value is None else f"{value:.4f}"
                    for value in (row.uniform_score, row.line, row.mixed_score)
                ]
                print(f"seed {seed}  {row.size.label} bits  got {row.bits:.3f}  {row.text}")
                print(
                    f"    perplexity: uniform {shown[0]}, line {shown[1]}, mixed {shown[2]}",
                    flush=True,
                )
        for bits in given.bits:
            alone = sweep_of(10_000, [bits], Path(folder) / f"alone {bits}")
            singles.append((bits, *seconds_of(alone, Store(alone.runtime.runs))))
    for bits, found in verdicts.items():
        better, worse = found[BETTER], found[WORSE]
        print(
            f"{bits:g} bits: better {better}, worse {worse}, uniform chosen {found[UNIFORM]} of {given.seeds}"
        )
    made, chosen = statistics.median(passes), statistics.median(allocations)
    print(
        f"pass of the candidates {made:.1f} s; allocation of {len(given.bits)} sizes {chosen:.1f} s"
    )
    for bits, own, single in singles:
        print(
            f"{bits:g} bits alone: pass {own:.1f} s, allocation {single:.1f} s, {1 + single / own:.1f} passes in all"
        )


if __name__ == "__main__":
    main()
