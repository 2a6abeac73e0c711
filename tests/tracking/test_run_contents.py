"""Contents of runs: names, params, texts within MLflow's limits."""

from __future__ import annotations

import dataclasses

from synthetic_sweep import LLAMA, cells

from harness.core.cell import Model
from harness.storage.record import Record
from harness.tracking.run_contents import cell_params, method_curves, run_names


def test_names_of_runs_and_curves() -> None:
    demo = Model("demo", "demo", digest="d")
    many = (*cells(LLAMA, ("rtn",), (4,)), *cells(demo, ("rtn",), (4, 1.7)))
    names = list(run_names(many).values())
    assert names[:3] == [
        "llama3_8b · full precision",
        "llama3_8b · rtn · w4g128",
        "demo · full precision",
    ]
    assert list(method_curves(many[2:]).values()) == [
        ("full_precision", 32),
        ("rtn", 4),
        ("rtn 1.7bit", 2),
    ]
    gptq = cells(LLAMA, ("gptq",), (4,))[1]
    variants = (gptq, dataclasses.replace(gptq, inputs="full_precision"))
    assert (
        len(set(run_names(variants).values())) == 2
        and len(set(method_curves(variants).values())) == 2
    )


def test_params_are_flat_and_short() -> None:
    baseline, gptq = cells(LLAMA, ("gptq",), (4,))
    params = cell_params(Record(gptq, "", ""))
    assert all(isinstance(value, str | int | float | bool) for value in params.values())
    assert params["weight.bits"] == 4 and params["rounding"] == "gptq" and params["seed"] == 0
    baseline = dataclasses.replace(
        baseline, model=dataclasses.replace(baseline.model, dtype="float32")
    )
    assert "bits" not in cell_params(Record(baseline, "", ""))
    # as tables say: what is stored
    assert cell_params(Record(baseline, "", "", {"bits_per_weight": 16.0}))["bits"] == "16"
