"""sweeps/demo_methods.yaml holds every method there is, and its plan refuses none of its cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import grid, locations
from harness.planning.planner import make
from harness.storage.store import Store

# Methods that need more than the demo can give, or repeat another, each with its reason.
OF_A_FINE_TUNE = "the demo model has no base; sweeps/deltas_demo.yaml has it on three fine-tunes"
LEFT_OUT: dict[str, str] = {
    "none": "the baseline, which every sweep adds by itself",
    "autoround_best": "autoround with 1000 steps per block, which take minutes here",
    **dict.fromkeys(
        (
            *("low_rank_delta", "delta_rtn", "delta_gptq", "delta_sparsegpt", "delta_come"),
            *("bitdelta", "bitdelta_untuned"),
        ),
        OF_A_FINE_TUNE,
    ),
    "l0_target_shape": "has no shape by default; sweeps/pruning_demo.yaml has it with one",
    "reap": "drops experts, which the demo model does not have",
    "reap_rtn": "drops experts, which the demo model does not have",
}


def test_every_method_is_in_the_sweep_or_left_out_with_a_reason() -> None:
    sweep = grid.load_sweep("demo_methods")
    used = {
        cell.method.name.partition("[")[0] for cell in sweep.cells if not cell.method.is_baseline
    }
    known = {entry.name for entry in locations.list_names("methods")}
    assert known - used - set(LEFT_OUT) == set(), "add these to sweeps/demo_methods.yaml"
    assert not used & set(LEFT_OUT) and set(LEFT_OUT) <= known


def test_methods_of_fine_tunes_are_in_their_sweep() -> None:
    used = {cell.method.name.partition("[")[0] for cell in grid.load_sweep("deltas_demo").cells}
    assert {name for name, reason in LEFT_OUT.items() if reason == OF_A_FINE_TUNE} <= used


@pytest.mark.parametrize("name", ["demo_methods", "deltas_demo"])
def test_the_plan_refuses_nothing(tmp_path: Path, name: str) -> None:
    sweep = grid.load_sweep(name, [f"runs={tmp_path}"])
    made = make(sweep, Store(tmp_path))
    assert not made.refused, [(each.cell.title, each.reasons) for each in made.refused]
