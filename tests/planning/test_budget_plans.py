"""Bit budgets in the plan: what is left to do, and every reason why one cannot be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.planning.planner import make
from harness.planning.render import render, render_refusals
from harness.storage.store import Store
from tests.support.budgets import budget_sweep


def test_the_plan_says_what_a_budget_will_do(tmp_path: Path) -> None:
    plan = make(budget_sweep(tmp_path), Store(tmp_path / "runs"))
    assert not plan.problems
    (allocation,) = plan.allocations
    assert allocation.groups == 16 and allocation.unmade == 3 and len(allocation.open) == 2
    (line,) = [line for line in render(plan).splitlines() if line.startswith("budget")]
    for words in (
        "mixed   3 candidates (0 done, 3 to make)",
        "16 groups",
        "≤ 6 assemblies of 1 window",
        "2 of 2 cells known after the measurement",
    ):
        assert words in line


@pytest.mark.parametrize(
    "changes,reasons",
    [
        ({"of": {"calibration": None, "method": "rtn"}}, ["add calibration to `of`"]),
        ({"windows": 9}, ["windows 9", "has 4"]),
        ({"bits": [1.0, 3.0]}, ["1 is below the cheapest", "2.562 to 4.625 bits per weight"]),
        ({"bits": [9.0]}, ["9 is above the dearest"]),
        (
            {"of": {"method": "rtn"}, "propose": ["output_error"]},
            ["propose output_error: rtn reads no Hessian"],
        ),
        (
            {"of": {"method": "awq"}, "propose": ["fisher"]},
            ["use together: block", "squared gradients belong to the original weights"],
        ),
        ({"of": {"method": "omniquant"}}, ["rounds the matrices of a block for each other"]),
        (
            {"of": {"method": "any_precision_nested", "scheme": ["w3", "w4"]}, "propose": ["kl"]},
            ["any_precision_nested stores all widths in one checkpoint"],
        ),
        (
            {
                "of": {
                    "method": ["gptq", "rtn"],
                    "scheme": ["w3g32", "w4g32"],
                    "inputs": "quantized",
                }
            },
            ["differ in their rounding (gptq, rtn)", "inputs: full_precision"],
        ),
        (
            {"of": {"method": "spinquant", "scheme": ["w3g32", "w4g32"]}, "together": "block"},
            ["rewrites embeddings and head differently"],
        ),
    ],
    ids=lambda value: "",
)
def test_reasons_that_a_plan_knows(
    changes: dict[str, Any], reasons: list[str], tmp_path: Path
) -> None:
    plan = make(budget_sweep(tmp_path, **changes), Store(tmp_path / "runs"))
    text = render_refusals(plan)
    assert plan.problems and "Nothing was started" in text
    for reason in reasons:
        assert reason in text, text


@pytest.mark.parametrize(
    "changes",
    [
        {"of": {"method": ["gptq", "rtn"], "scheme": ["w3g32", "w4g32"]}},
        {"of": {"method": "awq"}, "together": "block"},
        {"of": {"inputs": "quantized"}},
        {"of": {"method": "quarot_gptq"}},
        {"of": {"calibration": None, "method": "rtn"}, "trials": 0, "propose": ["kl"], "bits": 3},
    ],
    ids=lambda value: "",
)
def test_what_can_be_kept_is_not_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    if changes.get("trials") == 0:  # but a proposal by divergence is a measurement
        changes = {**changes, "of": {"method": "rtn"}}
    assert not make(budget_sweep(tmp_path, **changes), Store(tmp_path / "runs")).problems
