"""Checks of cells: all reasons, said once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from executions import plan_of

from harness.core.cell import Override, RoundingOverride
from harness.core.errors import PlanError
from harness.core.sweep import Cluster, Sweep
from harness.planning import resources
from harness.planning.checks import Checker
from harness.planning.render import require

Make = Callable[..., Sweep]


def test_all_reasons_are_given_at_once(demo_sweep: Make) -> None:
    plan = plan_of(
        demo_sweep("method=rtn,gptq", "scheme=w4g96,w3g40,w4", "evaluations=demo_perplexity")
    )
    assert {refusal.cell.scheme.name for refusal in plan.refused} == {"w4g96", "w3g40"}
    assert len(plan.refused) == 4
    with pytest.raises(PlanError) as caught:
        require(plan)
    text = str(caught.value)
    for words in (
        "4 of 7 cells cannot run",
        "Nothing was started",
        "group size 96",
        "group size 40",
        "q_proj",
        "16 and 32 divide all widths",
        "all 2 cells of scheme w4g96:",
        "rounding rtn, gptq: group size 96",
        "Change the overrides",
    ):
        assert words in text
    assert caught.value.exit_code == 3


def test_a_wrong_group_is_said_once(demo_sweep: Make) -> None:
    (refusal,) = plan_of(demo_sweep("method=rtn", "scheme=w4g96")).refused
    assert sum("group size" in reason for reason in refusal.reasons) == 1


def test_blocks_that_cross_rows_need_not_divide_them(demo_sweep: Make) -> None:
    """down_proj of the demo has rows of 160 weights; NF4's blocks of 64 run over the flattened matrix, as in bitsandbytes."""
    plan = plan_of(
        demo_sweep("method=nf4,ir_qlora_untuned", "scheme=nf4g64", "evaluations=demo_perplexity")
    )
    assert not plan.refused and len(plan.missing) == 3
    assert plan_of(demo_sweep("method=rtn", "scheme=nf4g64", "evaluations=demo_perplexity")).refused


def test_an_unreadable_model_is_a_reason(demo_sweep: Make, tmp_path: Path) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"architectures": ["LlamaForCausalLN"]}')
    (broken / "x.safetensors").write_bytes(b"")
    cells = tuple(
        dataclasses.replace(c, model=dataclasses.replace(c.model, source=str(broken), digest="0"))
        for c in sweep.cells
    )
    plan = plan_of(dataclasses.replace(sweep, cells=cells))
    assert len(plan.refused) == len(cells)
    assert all("LlamaForCausal" in " ".join(refusal.reasons) for refusal in plan.refused)


def test_missing_calibration_data_is_a_reason(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=gptq", "scheme=w4")
    cells = []
    for cell in sweep.cells:
        if cell.calibration is not None:
            cell = dataclasses.replace(
                cell, calibration=dataclasses.replace(cell.calibration, source="/nowhere/at/all")
            )
        cells.append(cell)
    (refusal,) = plan_of(dataclasses.replace(sweep, cells=tuple(cells))).refused
    assert "/nowhere/at/all" in refusal.reasons[0]


def test_a_model_too_large_for_this_machine_is_a_reason(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 1000)
    plan = plan_of(demo_sweep("method=rtn", "scheme=w4"))
    assert all("to evaluate" in refusal.reasons[0] for refusal in plan.refused) and plan.refused


def test_a_model_too_large_for_one_gpu_takes_several(
    demo_sweep: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_perplexity", "device=auto")
    need, cards = plan_of(sweep).scorings[0].peak_memory_bytes, [4]
    monkeypatch.setattr(resources, "count_gpus", lambda: cards[0])
    monkeypatch.setattr(
        resources,
        "free_memory",
        lambda runtime: (int(need * free / resources.MEMORY_SHARE) + 1, "the GPU"),
    )
    # a quarter of the blocks beside each share
    for free, devices in ((1.0, 1), (0.9, 2), (0.55, 3)):
        assert [each.devices for each in plan_of(sweep).scorings] == [devices], free
    cards[0] = 2
    (reason,) = {refusal.reasons[0] for refusal in plan_of(sweep).refused}
    assert "as float32 to evaluate: 3 GPUs; this machine has 2 GPUs" in reason
    measured = demo_sweep("method=rtn", "scheme=w4", "evaluations=demo_efficiency", "device=auto")
    cards[0] = 4
    assert (
        all("measures one GPU" in refusal.reasons[0] for refusal in plan_of(measured).refused)
        and plan_of(measured).refused
    )
    elsewhere = Cluster(
        "ray",
        address="10.0.0.1:6379",
        gpu_memory=f"{need * 0.9 / resources.MEMORY_SHARE / 1e6:.3f}MB",
    )
    plan = plan_of(
        dataclasses.replace(sweep, runtime=dataclasses.replace(sweep.runtime, cluster=elsewhere))
    )
    assert [each.devices for each in plan.scorings] == [2]


def test_gradients_are_of_the_weights_that_are_rounded(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=awq", "scheme=w4", "rounding=squeezellm")
    (refusal,) = plan_of(sweep).refused
    assert (
        "squared gradients belong to the original weights of the model, which transform awq changes"
        in " ".join(refusal.reasons)
    )


def test_what_a_rounding_is_asked_is_what_the_others_leave_to_it(demo_sweep: Make) -> None:
    """Two mixtures with the same exceptions: in one of them round-to-nearest rounds the rest, whose groups divide nothing."""
    (gptq, rtn) = (
        cell
        for cell in demo_sweep("method=gptq,rtn", "scheme=w4g96").cells
        if not cell.method.is_baseline
    )
    assert gptq.method.rounding is not None and rtn.method.rounding is not None
    fits = Override(("q_proj", "k_proj"), weight=(("group_size", 32),))
    mixed = (
        RoundingOverride(rtn.method.rounding, ("q_proj",), (0, 1, 2, 3)),
        RoundingOverride(gptq.method.rounding, ("k_proj",), (0, 1, 2, 3)),
    )
    scheme = dataclasses.replace(gptq.scheme, overrides=(fits,))
    cells = [
        dataclasses.replace(
            cell, scheme=scheme, method=dataclasses.replace(cell.method, overrides=mixed)
        )
        for cell in (gptq, rtn)
    ]
    checker = Checker(demo_sweep("method=rtn", "scheme=w4").runtime)
    refused = [
        sorted({reason.split(":")[0] for reason in checker.reasons(cell) if "96" in reason})
        for cell in cells
    ]
    assert refused == [["rounding gptq"], ["rounding rtn"]]


def test_a_scheme_without_calibration_is_refused_by_its_own_name(demo_sweep: Make) -> None:
    sweep = demo_sweep("method=rtn", "scheme=w8a8,w4a8", "calibration=demo")
    cells = [cell for cell in sweep.cells if not cell.method.is_baseline]
    static = [
        dataclasses.replace(
            cell,
            calibration=None,
            scheme=dataclasses.replace(
                cell.scheme, activation=dataclasses.replace(cell.scheme.activation, dynamic=False)
            ),
        )
        for cell in cells
        if cell.scheme.activation is not None
    ]
    checker = Checker(sweep.runtime)
    for cell in static:
        assert any(
            f'scheme "{cell.scheme.name}" needs calibration' in r for r in checker.reasons(cell)
        )
    assert len({cell.scheme.name for cell in static}) == 2
