"""Efficiency: sizes that can be counted, speeds that are positive, and honesty about what was simulated."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import last, stories
from test_divergence import damaged

from harness.core.cell import Evaluation, Model
from harness.core.errors import EvaluationError
from harness.evaluation import meters
from harness.evaluation.evaluators.efficiency import Evaluator, generate, loaded_bytes
from harness.evaluation.meters import ProcessorTime

QUICK = Evaluator.Settings(prompt_tokens=8, new_tokens=4, batch=2)


def test_sizes_and_speeds(shared: Path) -> None:
    subject = dataclasses.replace(stories(shared), manifest={"stored_bytes": 1234})
    score = last(Evaluator(QUICK).score(subject, Evaluation("e", "efficiency")))
    assert score.metrics["e/stored_bytes"] == 1234
    assert (
        4 * 260_032 <= score.metrics["e/loaded_bytes"] <= 4 * 260_032 + 4096
    )  # tied ends once; rotary frequencies beside
    assert score.metrics["e/peak_memory_bytes"] > score.metrics["e/loaded_bytes"]
    low, high = score.details["range"]["decode_tokens_per_second"]
    assert 0 < low <= score.metrics["e/decode_tokens_per_second"] <= high
    assert score.details["execution"] == "real" and score.details["device"].startswith("cpu")


def test_quantized_weights_are_marked_as_simulated(shared: Path) -> None:
    score = last(Evaluator(QUICK).score(damaged(stories(shared)), Evaluation("e", "efficiency")))
    assert score.details["execution"] == "simulated" and "e/stored_bytes" not in score.metrics


def test_it_decodes_what_transformers_decodes(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stories(shared).model
    prompt = torch.tensor([[1, 400, 260]])
    seen: list[int] = []
    forward = model.forward

    def watch(**arguments: object) -> object:
        output = forward(**arguments)
        seen.append(int(output.logits[0, -1].argmax()))
        return output

    monkeypatch.setattr(model, "forward", watch)
    generate(model, prompt, 6)
    monkeypatch.undo()
    expected = model.generate(
        prompt,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=None,
    )
    assert seen == expected[0, 3:].tolist()


def test_lengths_beyond_the_context_are_refused(shared: Path) -> None:
    model = Model("m", str(shared / "models" / "stories260K"))
    (reason,) = Evaluator(Evaluator.Settings()).check(Evaluation("e", "efficiency"), model)
    assert "256 + 512" in reason and "512" in reason
    assert Evaluator(QUICK).check(Evaluation("e", "efficiency"), model) == []


def test_shared_storage_is_counted_once() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    both = torch.nn.ModuleList([layer, torch.nn.Linear(4, 4, bias=False)])
    both[1].weight = layer.weight
    assert loaded_bytes(both) == 64


@pytest.mark.parametrize("settings", [{"repeats": 2}, {"new_tokens": 1}, {"batch": 0}])
def test_impossible_settings(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Evaluator.Settings(**settings)


def test_energy_is_there_where_the_device_reports_it(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meters, "COUNTERS", tmp_path)
    without = last(Evaluator(QUICK).score(stories(shared), Evaluation("e", "efficiency")))
    assert "e/joules_per_token" not in without.metrics, "nothing is estimated"
    assert 0 <= without.details["others"] <= 1 and without.details["alone"] == (
        without.details["others"] <= 0.1
    )
    counts = itertools.count(0, 16_000_000)  # 16 joules between two readings, for 2 × 4 tokens
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("0")
    monkeypatch.setattr(
        Path, "read_text", lambda path, *rest: str(next(counts)) if path.name == "energy_uj" else ""
    )
    reported = last(Evaluator(QUICK).score(stories(shared), Evaluation("e", "efficiency")))
    assert reported.metrics["e/joules_per_token"] == 2.0
    assert reported.details["alone"] is None, "a machine that does not say who else runs"


def test_a_counter_that_begins_anew_says_nothing(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([*range(5), 0.0, *range(20)])
    monkeypatch.setattr(meters, "energy_joules", lambda device: float(next(readings)))
    assert (
        "e/joules_per_token"
        not in last(Evaluator(QUICK).score(stories(shared), Evaluation("e", "efficiency"))).metrics
    )


def test_company_on_a_card_fails_the_evaluation(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([0, 2])  # alone before the runs, not after them
    monkeypatch.setattr(meters, "other_processes", lambda device: next(counts))
    with pytest.raises(EvaluationError, match="2 other processes on cpu"):
        last(Evaluator(QUICK).score(stories(shared), Evaluation("e", "efficiency")))


def test_others_have_what_this_process_had_not() -> None:
    before, after = (
        ProcessorTime(0.0, 1.0, 10.0),
        ProcessorTime(2.0, 2.0, 11.0 + (os.cpu_count() or 1)),
    )
    assert after.others_share(before) == pytest.approx(0.5)
    assert ProcessorTime(2.0, 2.0, None).others_share(before) is None


def test_kernels_are_measured_beside_dense_matrices(demo_sweep: Any, tmp_path: Path) -> None:
    from harness.execution import driver

    short = ["prompt_tokens=8", "new_tokens=4"]
    sweep = demo_sweep(
        "model.dtype=bfloat16",
        "method=rtn",
        "scheme=w4g32,w3g32",
        "scheme.weight.scale_dtype=bfloat16",
        "baseline=false",
        "evaluations=demo_efficiency",
        "evaluations.demo_efficiency.kernel=any",
        *(f"evaluations.demo_efficiency.{each}" for each in short),
    )
    summary = driver.run(sweep)
    four, three = summary.records
    details = four.scores["demo_efficiency"]["details"]
    assert details["execution"] == "real:int4pack" and set(details["kernels"]) == {"int4pack"}
    assert details["ratio_to_dense"] > 0
    (failure,) = three.failures  # nothing falls back to dequantized matrices
    assert "codes have 3 bits" in failure["reason"] and "int4pack" in failure["reason"]


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="int4pack"):
        Evaluator.Settings(kernel="int4pak")
