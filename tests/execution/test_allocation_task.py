"""What an allocation chooses on the demo model: within its size, no worse than uniform, the same bytes every time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.core.budget import Budget, Size, budget_key
from harness.core.cell import quantize_key
from harness.core.events import Allocated, Failed
from harness.core.sweep import Sweep
from harness.execution import allocation
from harness.execution.tasks import AllocateTask, decode, encode
from harness.planning.allocation import bits_of
from harness.planning.allocation import choose as best_choice
from harness.quantization.pipeline.assembly import Assembly
from harness.storage.budgets import outcome
from harness.storage.store import Store
from tests.support.budgets import SIZES, budget_sweep, choose, make_candidates


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Store]:
    """A sweep whose candidates are made and scored."""
    sweep = budget_sweep(tmp_path_factory.mktemp("budget"))
    return sweep, make_candidates(sweep)


@pytest.fixture(scope="module")
def records(made: tuple[Sweep, Store]) -> list[dict[str, Any]]:
    """What the budget of the sweep chose, once."""
    return chosen(choose(*made))


def files(store: Store) -> dict[str, bytes]:
    """Every stored choice by name."""
    return {
        name: store.files.read(store.root / "budgets" / sweep / f"{name}.json")
        for sweep, name in store.budget_names()
    }


def forget(store: Store) -> None:
    """Delete every choice, and what was measured."""
    store.files.remove(store.root / "budgets")


def chosen(events: Sequence[Any]) -> list[dict[str, Any]]:
    assert [each.detail for each in events if isinstance(each, Failed)] == []
    return [event.record for event in events if isinstance(event, Allocated)]


def test_the_choice_is_within_its_size_and_no_worse_than_uniform(
    made: tuple[Sweep, Store], records: list[dict[str, Any]]
) -> None:
    _, store = made
    assert len(records) == len(SIZES)
    for bits, record in zip(SIZES, records, strict=True):
        assert record["bits"] <= record["limit_bits"] == int(bits * record["weights"])
        uniform = record["candidates"][record["uniform"]]
        assert record["divergence"] <= uniform["divergence"]
        proposals = [each["divergence"] for each in record["proposals"].values()]
        assert record["divergence"] <= min(proposals) and list(record["proposals"]) == [
            "output_error",
            "fisher",
            "kl",
        ]
        manifest = store.manifest(record["quantize_key"])
        assert manifest is not None, "an exact assembly is stored"
        assert 8 * sum(each["bytes"] for each in manifest["linears"]) == record["bits"]
        assert bits_of(record["costs"], record["choice"]) == record["bits"]
    assert records[0]["divergence"] > records[1]["divergence"]


def test_output_errors_and_bits_are_those_of_the_manifests(
    made: tuple[Sweep, Store], records: list[dict[str, Any]]
) -> None:
    (sweep, store), record = made, records[0]
    for k, cell in enumerate(sweep.budgets[0].candidates):
        manifest = store.manifest(quantize_key(cell))
        assert manifest is not None
        errors = sum(each["output_error"] for each in manifest["layer_errors"])
        assert sum(row[k] for row in record["tables"]["output_error"]) == pytest.approx(errors)
        bits = 8 * sum(each["bytes"] for each in manifest["linears"])
        assert sum(row[k] for row in record["costs"]) == bits == record["candidates"][k]["bits"]


def test_weight_errors_times_size_propose_uniform(
    made: tuple[Sweep, Store], records: list[dict[str, Any]]
) -> None:
    """On the demo, whose matrices are alike, the plain squared error has its best mixture at the uniform cell of the same bits."""
    (sweep, store), record = made, records[1]
    table = []
    for group in record["groups"]:
        row = []
        for cell in sweep.budgets[0].candidates:
            errors = {
                (each["block"], each["linear"]): each["weight_error"]
                for each in (store.manifest(quantize_key(cell)) or {})["layer_errors"]
            }
            shapes = {
                (each["block"], each["linear"]): each["shape"]
                for each in (store.manifest(quantize_key(cell)) or {})["linears"]
            }
            names = [tuple(matrix) for matrix in group["matrices"]]
            row.append(sum(errors[n] * shapes[n][0] * shapes[n][1] for n in names))
        table.append(row)
    found = best_choice(record["costs"], table, record["candidates"][1]["bits"])
    assert set(found.choice) == {1}


def test_twice_the_same_bytes_and_after_a_kill_too(
    made: tuple[Sweep, Store], records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is measured anew, with a kill on the way."""
    (sweep, store), first = made, files(made[1])
    assert len(first) == len(records)
    assert not chosen(choose(sweep, store)) and files(store) == first, "it is not chosen again"
    forget(store)
    measure, measured = Assembly.divergence, []
    monkeypatch.setattr(allocation, "SAVE_SECONDS", -1.0)

    def killed(self: Assembly, parts: Any) -> float:
        measured.append(parts)
        if len(measured) == 12:  # after the uniform cells, within the proposal kl
            raise KeyboardInterrupt
        return measure(self, parts)

    monkeypatch.setattr(Assembly, "divergence", killed)
    with pytest.raises(KeyboardInterrupt):
        choose(sweep, store)
    assert not files(store)
    before = len(measured)
    chosen(choose(sweep, store))
    assert files(store) == first
    repeated = [parts for parts in measured[before:] if parts in measured[: before - 1]]
    assert not repeated, "what was measured before the kill is read back"


def test_other_sizes_of_the_same_candidates_measure_only_what_is_new(
    made: tuple[Sweep, Store], records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, store = made
    other = dataclasses.replace(sweep.budgets[0], sizes=(Size(bits=3.2),), name="other")
    calls = []
    measure = Assembly.divergence
    monkeypatch.setattr(
        Assembly, "divergence", lambda self, parts: (calls.append(1), measure(self, parts))[1]
    )
    chosen(choose(dataclasses.replace(sweep, budgets=(other,)), store))
    assert len(calls) <= 3 + 6, "one assembly for each proposal, and the swaps"


def test_without_trials_the_first_proposal_stands_and_nothing_is_measured(
    made: tuple[Sweep, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, store = made
    monkeypatch.setattr(
        Assembly, "divergence", lambda self, parts: pytest.fail("nothing is measured")
    )
    budget = dataclasses.replace(
        sweep.budgets[0], name="free", trials=0, propose=("output_error",), calibration=None
    )
    records = chosen(choose(dataclasses.replace(sweep, budgets=(budget,)), store))
    for record in records:
        assert record["divergence"] is None and record["trials"] == []
        assert record["choice"] == record["proposals"]["output_error"]["choice"]
        best = best_choice(record["costs"], record["tables"]["output_error"], record["limit_bits"])
        assert record["choice"] == list(best.choice)
    assert records[1]["uniform"] == 1, "the dearest uniform cell within the size is compared with"


@pytest.mark.parametrize("size", [Size(bits=2.0), Size(bytes=1000), Size(bits=5)])
def test_a_size_that_no_assembly_has_is_named_with_the_interval(
    size: Size, made: tuple[Sweep, Store]
) -> None:
    sweep, store = made
    budget = dataclasses.replace(sweep.budgets[0], sizes=(size,), name="small")
    (failed,) = [
        event
        for event in choose(dataclasses.replace(sweep, budgets=(budget,)), store)
        if isinstance(event, Failed)
    ]
    assert "2.562 to 4.625 bits per weight" in failed.reason and size.label in failed.reason


def test_a_candidate_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    sweep = budget_sweep(tmp_path)
    store = Store(sweep.runtime.runs)
    (failed,) = [event for event in choose(sweep, store) if isinstance(event, Failed)]
    assert "demo · gptq · w2g32" in failed.reason and "run the sweep again" in failed.reason


def test_a_task_travels_as_json(made: tuple[Sweep, Store]) -> None:
    sweep, store = made
    task = AllocateTask(sweep.budgets[0], sweep.name, str(store.place), "harness run small")
    again = decode(json.loads(json.dumps(encode(task))))
    assert again == task
    assert isinstance(again, AllocateTask)
    assert budget_key(again.budget, task.budget.sizes[0]) == budget_key(
        task.budget, task.budget.sizes[0]
    )


def test_the_key_hangs_on_what_changes_the_choice(
    made: tuple[Sweep, Store], records: list[dict[str, Any]]
) -> None:
    sweep, store = made
    budget, size = sweep.budgets[0], Size(bits=SIZES[0])
    changes: list[dict[str, Any]] = [
        {"trials": 7},
        {"windows": 3},
        {"together": "block"},
        {"propose": ("kl",)},
        {"candidates": budget.candidates[:2]},
    ]
    keys = [budget_key(dataclasses.replace(budget, **change), size) for change in changes]
    same: list[dict[str, Any]] = [{"name": "x"}, {"floor": False}, {"sizes": ()}]
    assert {budget_key(dataclasses.replace(budget, **change), size) for change in same} == {
        budget_key(budget, size)
    }
    assert len({budget_key(budget, size), budget_key(budget, Size(bits=3.0)), *keys}) == 7
    changed: Budget = dataclasses.replace(budget, trials=7)
    assert outcome(store, sweep.name, budget, size) is not None
    assert outcome(store, sweep.name, changed, size) is None
