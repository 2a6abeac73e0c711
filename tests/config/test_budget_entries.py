"""`budgets:` of a sweep file: candidates, sizes, defaults, and every error with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.cli.allocate import asked_sizes, with_budgets
from harness.config.grid import load_sweep
from harness.core.budget import Size
from harness.core.errors import ConfigError
from harness.core.sweep import command_line
from tests.support.budgets import budget_sweep


def test_an_entry_becomes_a_budget_and_its_candidates_are_cells(tmp_path: Path) -> None:
    sweep = budget_sweep(tmp_path)
    (budget,) = sweep.budgets
    assert [cell.title for cell in sweep.cells] == [
        "demo · none · full",
        *(f"demo · gptq · w{bits}g32" for bits in (2, 3, 4)),
    ]
    assert budget.candidates == sweep.cells[1:]
    assert budget.sizes == (Size(bits=2.9), Size(bits=3.594))
    assert budget.propose == ("output_error", "fisher", "kl") and budget.together == "serving"
    assert budget.name_of(budget.sizes[0]) == "mixed@2.9"


def test_methods_without_hessians_propose_what_they_can(tmp_path: Path) -> None:
    (budget,) = budget_sweep(tmp_path, of={"method": "rtn"}).budgets
    assert budget.propose == ("fisher", "kl")
    assert budget.candidates[0].calibration is None
    assert budget.calibration is not None and budget.calibration.name == "demo"


def test_sizes_in_bytes(tmp_path: Path) -> None:
    (budget,) = budget_sweep(tmp_path, bits=[], bytes=["70kB", 80000]).budgets
    assert [size.label for size in budget.sizes] == ["70kB", "80kB"]
    assert budget.sizes[0].limit(10**9) == 8 * 70_000


def test_several_draws_are_a_budget_each(tmp_path: Path) -> None:
    sweep = budget_sweep(tmp_path, of={"seed": [0, 1]})
    assert len({budget.name for budget in sweep.budgets}) == 2
    assert [len(budget.candidates) for budget in sweep.budgets] == [3, 3]
    assert {budget.candidates[0].seed for budget in sweep.budgets} == {0, 1}


def test_overrides_of_methods_or_schemes_leave_budgets_out(tmp_path: Path) -> None:
    sweep = budget_sweep(tmp_path, "method=rtn", "scheme=w4")
    assert not sweep.budgets and sweep.cells[-1].title == "demo · rtn · w4"
    assert budget_sweep(tmp_path, "seed=3").budgets[0].candidates[0].seed == 3


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"bits": []}, "either bits .* or bytes"),
        ({"bytes": ["1GB"]}, "either bits .* or bytes"),
        ({"bits": [0]}, "a size above 0"),
        ({"bits": [], "bytes": ["many"]}, '"many" is no size'),
        ({"together": "layer"}, "together"),
        ({"propose": ["luck"]}, "propose"),
        ({"trials": -1}, "trials: -1 is below 0"),
        ({"name": "a/b"}, "becomes a file name"),
        ({"accept": {"evaluation": "demo_perplexit"}}, "demo_perplexity"),
        ({"accept": {"level": 2.0}}, "above 1"),
        ({"surprise": 1}, "surprise"),
        ({"of": {"scheme": ["w3g32"]}}, "1 candidates .*2 to 8"),
        ({"of": {"scheme": ["w3g32", "w4g32a8"]}}, "differ in their activation scheme"),
        (
            {"of": {"method": ["awq", "rtn"], "scheme": ["w3g32", "w4g32"]}},
            "differ in their transform",
        ),
        ({"of": {"method": "peqa", "scheme": ["w3g32", "w4g32"]}}, "tuned"),
    ],
)
def test_errors_name_their_place(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)small\.yaml: budgets\[0\].*{reason}"):
        budget_sweep(tmp_path, **changes)


def test_allocate_replaces_the_sizes_of_a_sweep(tmp_path: Path) -> None:
    sweep = budget_sweep(tmp_path)
    narrowed = with_budgets(sweep, asked_sizes("3.2,3.3", ""), "", "block", 5)
    (budget,) = narrowed.budgets
    assert budget.sizes == (Size(bits=3.2), Size(bits=3.3))
    assert budget.together == "block" and budget.trials == 5
    assert "allocate" in command_line(narrowed) and "--bits 3.2,3.3" in command_line(narrowed)
    assert with_budgets(sweep, (), "mixed", "", None).budgets == sweep.budgets
    with pytest.raises(ConfigError, match="mixed"):
        with_budgets(sweep, (), "mixe", "", None)


def test_allocate_takes_the_cells_of_a_sweep_without_budgets() -> None:
    sweep = load_sweep(
        None, ["model=demo", "method=rtn,gptq", "scheme=w3g32,w4g32", "calibration=demo"]
    )
    budgets = with_budgets(sweep, asked_sizes("", "70kB"), "", "", None).budgets
    assert [budget.name for budget in budgets] == ["rtn", "gptq"]
    assert all(budget.calibration is not None for budget in budgets)
    with pytest.raises(ConfigError, match=r"--bits 3\.2"):
        with_budgets(sweep, (), "", "", None)
    with pytest.raises(ConfigError, match="no budget can be made"):
        alone = load_sweep(None, ["model=demo", "method=rtn", "scheme=w4"])
        with_budgets(alone, asked_sizes("3", ""), "", "", None)
    with pytest.raises(ConfigError, match="numbers are expected"):
        asked_sizes("three", "")
