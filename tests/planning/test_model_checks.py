"""Checks of a model before anything runs: its folder, its context, what a plan cannot know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from executions import plan_of

from harness.core.sweep import Sweep
from harness.planning.render import render

Make = Callable[..., Sweep]


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_faults_of_a_folder_are_reasons_all_at_once(
    demo_sweep: Make, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model("llama")
    (folder / "tokenizer.json").unlink()
    configure(folder, num_hidden_layers=4)
    plan = plan_of(demo_sweep(f"+model={folder}", "method=rtn", "scheme=w4"))
    assert len(plan.refused) == 2 and not plan.missing
    text = " ".join(plan.refused[0].reasons)
    assert all(fact in text for fact in ("no tokenizer", "model.layers.3", str(folder)))


def test_tensors_that_are_not_used_stand_in_the_notes(
    demo_sweep: Make, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model("llama")
    configure(folder, num_hidden_layers=2)
    for method in ("rtn", "none"):  # the baseline's numbers are as much another model's
        plan = plan_of(demo_sweep(f"+model={folder}", f"method={method}", "scheme=w4"))
        assert not plan.refused and "model.layers.2" in render(plan)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_calibration_windows_are_held_against_the_context(demo_sweep: Make, family: str) -> None:
    """Learned positions end there; rotary ones were never trained beyond."""
    common = (f"model=tiny:{family}", "method=gptq", "scheme=w4", "calibration.samples=2")
    (refused,) = plan_of(demo_sweep(*common, "calibration.length=257")).refused
    text = " ".join(refused.reasons)
    assert "257" in text and "256" in text and "calibration.length" in text
    assert not plan_of(demo_sweep(*common, "calibration.length=256")).refused


def test_a_plan_says_what_of_the_hub_it_has_not_checked(
    demo_sweep: Make, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that is not downloaded, config.json alone is here."""
    folder = tiny_model("llama")
    commit = "0" * 40
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_, **__: str(folder / "config.json")
    )
    sweep = demo_sweep("+model=owner/tiny", f"model.revision={commit}", "method=rtn", "scheme=w4")
    assert not any("not complete" in note for note in plan_of(sweep).notes)
    (folder / "model.safetensors").unlink()
    plan = plan_of(sweep)
    assert not plan.refused
    (note,) = (note for note in plan.notes if "not complete" in note)
    assert "owner/tiny" in note and "harness doctor owner/tiny" in note
