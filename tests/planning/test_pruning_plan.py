"""What the plan says of pruning and of reductions: refusals with their reasons, and the smaller model that comes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.grid import load_sweep
from harness.planning.planner import make
from harness.planning.render import render
from harness.storage.store import Store

WINDOWS = ("calibration=demo", "calibration.samples=2", "calibration.length=24")
QUIET = ("evaluations=[]", "tracking=none", *WINDOWS)

REFUSED = {
    "no sparsity": (("method=wanda", "scheme=w4"), "no sparsity is stated"),
    "not pruning": (("method=rtn", "scheme=w4s50"), "rtn does not prune; use magnitude, sparsegpt"),
    "a tuning that fills zeros": (
        ("rounding=magnitude", "tuning=peqa", "scheme=w4s50"),
        "would fill the zeros",
    ),
    "an export of codes": (
        ("method=magnitude", "scheme=w4s50", "export=compressed_tensors"),
        "no engine takes pruned matrices",
    ),
    "an export of dense zeros as codes": (
        ("method=magnitude", "scheme=w16s50", "export=gptq"),
        'not "dense"',
    ),
    "no experts": (("method=reap", "scheme=full"), "has no experts"),
    "too many blocks": (
        ("method=shortgpt", "reduction.share=0.0", "reduction.blocks=4", "scheme=full"),
        "4 of 4 blocks would be removed",
    ),
    "nothing said": (("reduction=prune_to_shape",), "nothing would be removed"),
    "no shape": (("method=l0_target_shape",), "nothing would be removed"),
    "a model too large to train": (
        ("method=l0_target_shape", "reduction.hidden=48", "reduction.most_parameters=1000"),
        "trains every weight",
    ),
    "no whole heads per channel": (
        ("method=l0_target_shape", "reduction.hidden=56", "reduction.kv_heads=3"),
        "The hidden size (56) is not a multiple of the number of attention heads (3)",
    ),
    "groups of the smaller model": (
        ("reduction=prune_to_shape", "reduction.intermediate=120", "rounding=rtn", "scheme=w4g32"),
        "group size 32 does not divide in_features of mlp.down_proj (120)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_plan_refuses_with_the_reason(case: str, tmp_path: Path) -> None:
    overrides, reason = REFUSED[case]
    sweep = load_sweep(None, ["model=demo", *QUIET, f"runs={tmp_path}", *overrides])
    refused = make(sweep, Store(tmp_path)).refused
    assert any(reason in each for cell in refused for each in cell.reasons), refused


ACCEPTED = {
    "adapters beside zeros": (
        *("rounding=magnitude", "tuning=qlora", "scheme=w4s50"),
        *("tuning.prompt_length=16", "tuning.answer_length=8"),
    ),
    "a transform before": ("transform=smoothquant", "rounding=wanda", "scheme=w8syms2of4"),
    "a plain folder": ("method=sparsegpt", "scheme=w16s50", "export=transformers"),
    "a reduced plain folder": ("method=shortgpt", "scheme=full", "export=transformers"),
    "a trained smaller model": ("method=l0_target_shape", "reduction.intermediate=128"),
    "a reduced model": ("reduction=prune_to_shape", "reduction.hidden=48"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_the_plan_accepts(case: str, tmp_path: Path) -> None:
    sweep = load_sweep(None, ["model=demo", *QUIET, f"runs={tmp_path}", *ACCEPTED[case]])
    assert not make(sweep, Store(tmp_path)).refused


def test_cells_of_one_reduction_are_one_pass_that_says_so(tmp_path: Path) -> None:
    overrides = ["method=shortgpt,shortgpt_gptq,gptq", "scheme=w4g32,w3g32", "cluster.workers=1"]
    sweep = load_sweep(None, ["model=demo", *QUIET, f"runs={tmp_path}", *overrides])
    plan = make(sweep, Store(tmp_path))
    names = [sorted({cell.method.name for cell in each.cells}) for each in plan.passes]
    assert ["shortgpt_gptq"] in names and ["shortgpt"] in names and ["gptq"] in names
    assert "reduced by shortgpt first, shared by 2, then 3 blocks read once" in render(plan)
    reduced = [c for each in plan.passes for c in each.cells if c.method.name == "shortgpt"]
    assert len(reduced) == 1 and reduced[0].scheme.name == "full"  # whatever schemes are named
