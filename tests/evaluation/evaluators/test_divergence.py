"""Divergence: zero against itself, closed forms, bounds, and a reference that is stored once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from subjects import last, stories

from harness.core.cell import Evaluation, Method, Part
from harness.evaluation.evaluators import divergence
from harness.evaluation.evaluators.divergence import Evaluator
from harness.evaluation.protocols import Subject
from harness.evaluation.statistics import mean_error


def settings(shared: Path, **changes: object) -> Evaluator.Settings:
    return Evaluator.Settings(
        source=str(shared / "data" / "text" / "tinystories"),
        split="eval",
        **{"length": 64, "max_windows": 4, **changes},
    )


def damaged(subject: Subject, scale: float = 0.05) -> Subject:
    """A cell of a method whose weights are off by some noise."""
    generator = torch.Generator().manual_seed(0)
    for parameter in subject.model.parameters():
        parameter.data += (
            scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
        )
    cell = dataclasses.replace(subject.cell, method=Method("rtn", rounding=Part("rtn")))
    return dataclasses.replace(subject, cell=cell)


def test_a_model_does_not_diverge_from_itself(shared: Path, tmp_path: Path) -> None:
    subject = stories(shared, cache=tmp_path)
    for _ in range(2):  # computed, then read back
        score = last(Evaluator(settings(shared)).score(subject, Evaluation("d", "divergence")))
        assert (
            score.metrics["d/kl"] == score.metrics["d/kl_max"] == score.metrics["d/delta_nll"] == 0
        )
        assert score.metrics["d/top1_agreement"] == 1


def test_damage_shows_and_the_reference_is_stored_once(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slight, strong = (
        damaged(stories(shared, cache=tmp_path), 0.02),
        damaged(stories(shared, cache=tmp_path), 0.2),
    )
    evaluation = Evaluation("d", "divergence")
    first = last(Evaluator(settings(shared)).score(slight, evaluation))
    monkeypatch.setattr(divergence.Reference, "_full_precision", None)
    again = last(Evaluator(settings(shared)).score(slight, evaluation))
    assert again.metrics == first.metrics and again.items == first.items
    worse = last(Evaluator(settings(shared)).score(strong, evaluation))
    assert (
        0
        < first.metrics["d/kl"]
        < worse.metrics["d/kl"]
        <= worse.metrics["d/kl_p99"]
        <= worse.metrics["d/kl_max"]
    )
    assert worse.metrics["d/top1_agreement"] < first.metrics["d/top1_agreement"] < 1
    assert first.metrics["d/kl"] == pytest.approx(sum(first.items["kl"]) / 4)


def test_without_a_cache_the_numbers_are_the_same(shared: Path, tmp_path: Path) -> None:
    evaluation = Evaluation("d", "divergence", limit=2)
    kept = last(
        Evaluator(settings(shared)).score(damaged(stories(shared, cache=tmp_path)), evaluation)
    )
    fresh = last(Evaluator(settings(shared)).score(damaged(stories(shared)), evaluation))
    assert kept.metrics == fresh.metrics and fresh.details["smoke"] is True


def test_few_tokens_give_a_lower_bound(shared: Path) -> None:
    evaluation, subject = Evaluation("d", "divergence"), damaged(stories(shared))
    values = [
        last(Evaluator(settings(shared, top_k=top_k)).score(subject, evaluation)).metrics["d/kl"]
        for top_k in (1, 16, 128, 512, 0)
    ]
    assert all(low <= high + 1e-9 for low, high in itertools.pairwise(values))
    assert values[3] == pytest.approx(values[4], rel=1e-6)


def test_two_symbols_have_a_closed_form() -> None:
    a, b = torch.tensor(0.7), torch.tensor(-1.3)
    log_p, log_q = (torch.tensor([[0.0, float(value)]]).log_softmax(-1) for value in (a, b))
    p, q = torch.sigmoid(a), torch.sigmoid(b)
    expected = float(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    assert float(divergence.divergences({"log_p": log_p}, log_q)[0]) == pytest.approx(
        expected, rel=1e-5
    )
    shifted = torch.tensor([[5.0, 5.0 + float(b)]]).log_softmax(-1)
    assert float(divergence.divergences({"log_p": log_p}, shifted)[0]) == pytest.approx(
        expected, rel=1e-5
    )


def test_impossible_tokens_cost_nothing() -> None:
    log_p = torch.tensor([[0.0, -math.inf]])
    assert float(
        divergence.divergences({"log_p": log_p}, torch.tensor([[math.log(0.5)] * 2]))[0]
    ) == pytest.approx(math.log(2))


def test_documents_of_unequal_length_count_by_their_tokens_in_the_standard_errors(
    shared: Path,
) -> None:
    asked = settings(shared, windows="documents", length=400, max_windows=5)
    score = last(Evaluator(asked).score(damaged(stories(shared)), Evaluation("d", "divergence")))
    items = score.items
    assert (
        items is not None
        and len(set(items["tokens"])) > 1
        and items["targets"] == [count - 1 for count in items["tokens"]]
    )
    for name, weights in (("kl", "tokens"), ("top1_agreement", "tokens"), ("delta_nll", "targets")):
        mean, error = mean_error(items[name], items[weights])
        assert score.metrics[f"d/{name}"] == pytest.approx(mean, rel=1e-9)
        assert score.stderr[f"d/{name}"] == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("top_k", [0, 4])
def test_logits_that_are_no_numbers_diverge_and_agree_with_nothing(top_k: int) -> None:
    """where(NaN > 0) is 0 and the largest of NaN is the first token: neither may become a number, on either side."""
    log_p = torch.randn(6, 9).log_softmax(-1)
    lost = log_p.clone()
    lost[2] = math.nan

    def reference(values: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = values.topk(top_k or 9, dim=-1)
        some = {"log_p": kept.values, "tokens": kept.indices} if top_k else {"log_p": values}
        return {"top": values.argmax(-1), **some}

    for before, now in ((log_p, lost), (lost, log_p), (lost, lost)):
        kl = divergence.divergences(reference(before), now)
        same = divergence.agreement(reference(before), now)
        assert kl.isnan().tolist() == same.isnan().tolist() == [i == 2 for i in range(6)]
    evaluator = divergence.Evaluator(divergence.Evaluator.Settings())
    kl = divergence.divergences(reference(log_p), lost)
    same = divergence.agreement(reference(log_p), lost)
    score = evaluator._score(Evaluation("d", "divergence"), [kl], [same], [kl[1:]])
    assert all(math.isnan(value) for value in score.metrics.values()) and not score.stderr
    assert score.details["diverged"] is True
