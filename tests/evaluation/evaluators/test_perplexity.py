"""Perplexity against a literal loop, published figures and limits with a known answer."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from subjects import last, stories

from harness.core.cell import Evaluation, Model
from harness.core.errors import DataError, EvaluationError
from harness.data import texts as sources
from harness.evaluation import windows
from harness.evaluation.evaluators.perplexity import Evaluator

LENGTH = 64


def texts(shared: Path) -> str:
    return str(shared / "data" / "text" / "tinystories")


def evaluator(**settings: object) -> Evaluator:
    return Evaluator(Evaluator.Settings(**settings))


def test_equals_the_literal_loop(shared: Path) -> None:
    subject = stories(shared)
    score = last(
        evaluator(source=texts(shared), split="eval", length=LENGTH, max_windows=20).score(
            subject, Evaluation("s", "p")
        )
    )
    text = "\n\n".join(sources.read_corpus(texts(shared), "eval"))
    ids = subject.tokenizer(text, return_tensors="pt").input_ids
    total = 0.0
    for i in range(20):
        window = ids[:, i * LENGTH : (i + 1) * LENGTH]
        with torch.no_grad():
            logits = subject.model(window).logits
        loss = torch.nn.CrossEntropyLoss()(logits[0, :-1].float(), window[0, 1:])
        total += float(loss) * LENGTH
    assert score.metrics["s/perplexity"] == pytest.approx(math.exp(total / (20 * LENGTH)), rel=1e-6)
    assert score.details["windows"] == 20 and "smoke" not in score.details
    assert len(score.items["id"]) == len(score.items["loss"]) == 20


def test_whole_documents_give_the_published_figure(shared: Path) -> None:
    """The model's README: 4.342 over the stories, each cut to the context."""
    score = last(
        evaluator(source=texts(shared), split="eval", windows="documents", length=0).score(
            stories(shared), Evaluation("s", "p")
        )
    )
    assert score.metrics["s/perplexity"] == pytest.approx(4.342, abs=6e-4)


def test_batch_size_changes_nothing(shared: Path) -> None:
    for recipe in ("join", "documents"):
        settings = {
            "source": texts(shared),
            "split": "eval",
            "length": LENGTH,
            "documents": 12,
            "windows": recipe,
        }
        one = last(evaluator(**settings).score(stories(shared, batch_size=1), Evaluation("s", "p")))
        five = last(
            evaluator(**settings).score(stories(shared, batch_size=5), Evaluation("s", "p"))
        )
        assert one.metrics["s/perplexity"] == pytest.approx(five.metrics["s/perplexity"], rel=1e-6)


def test_limit_divides_by_what_was_read(shared: Path) -> None:
    settings = {"source": texts(shared), "split": "eval", "length": LENGTH, "documents": 12}
    whole = last(evaluator(**settings).score(stories(shared), Evaluation("s", "p")))
    smoke = last(evaluator(**settings).score(stories(shared), Evaluation("s", "p", limit=3)))
    assert smoke.details["smoke"] is True and smoke.details["windows"] == 3
    assert smoke.items["loss"] == pytest.approx(whole.items["loss"][:3], rel=1e-6)


def with_logits(shared: Path, logits: object) -> object:
    """A subject whose model answers with `logits(ids)`."""
    subject = stories(shared)

    class Answering(torch.nn.Module):
        config = subject.model.config

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=logits(input_ids))

    return dataclasses.replace(subject, model=Answering())


def test_uniform_logits_give_the_vocabulary(shared: Path) -> None:
    subject = with_logits(shared, lambda ids: torch.zeros(*ids.shape, 777))
    score = last(
        evaluator(source=texts(shared), split="eval", length=256, documents=10).score(
            subject, Evaluation("s", "p")
        )
    )
    assert score.metrics["s/perplexity"] == pytest.approx(777, rel=1e-6)


def test_a_model_sure_to_p_has_one_over_p(shared: Path) -> None:
    def sure(ids: torch.Tensor) -> torch.Tensor:
        probabilities = torch.full((*ids.shape, 512), 0.75 / 511)
        probabilities[:, :-1].scatter_(2, ids[:, 1:, None], 0.25)
        return probabilities.log()

    subject = with_logits(shared, sure)
    score = last(
        evaluator(source=texts(shared), split="eval", length=256, documents=10).score(
            subject, Evaluation("s", "p")
        )
    )
    assert score.metrics["s/perplexity"] == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_divergence_is_said_not_hidden(shared: Path, value: float) -> None:
    def wild(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, 512)
        logits[..., 0] = value
        return logits

    subject = with_logits(shared, wild)
    score = last(
        evaluator(source=texts(shared), split="eval", length=256, documents=10).score(
            subject, Evaluation("s", "p")
        )
    )
    assert not math.isfinite(score.metrics["s/perplexity"])
    assert score.details["diverged"] is True and score.stderr == {}
    json.dumps(score.details, allow_nan=False)


def test_the_tail_does_not_matter(shared: Path, tmp_path: Path) -> None:
    subject = stories(shared)
    losses = []
    for name, tail in (("a", " the"), ("b", " a dog")):
        (tmp_path / f"{name}.txt").write_text("Once upon a time there was a cat. " * 30 + tail)
        settings = {"source": str(tmp_path / f"{name}.txt"), "length": 100}
        losses.append(
            last(evaluator(**settings).score(subject, Evaluation("s", "p"))).items["loss"]
        )
    assert losses[0] == losses[1]


def test_sampled_windows_follow_the_published_draw(shared: Path) -> None:
    import random

    subject = stories(shared)
    documents = sources.read_corpus(texts(shared), "eval")
    settings = Evaluator.Settings(
        source=texts(shared), split="eval", windows="sample", length=200, samples=7
    )
    drawn = windows.read_windows(settings, subject)
    rng = random.Random(0)
    for window in drawn:
        while True:
            tokens = subject.tokenizer(documents[rng.randint(0, len(documents) - 1)]).input_ids
            if len(tokens) > 200:
                break
        start = rng.randint(0, len(tokens) - 200 - 1)
        assert window.tolist() == tokens[start : start + 200]


def test_kept_tokens_are_the_same_and_know_their_tokenizer(shared: Path, tmp_path: Path) -> None:
    settings = Evaluator.Settings(source=texts(shared), split="eval", length=50, documents=9)
    subject = stories(shared, cache=tmp_path)
    windows._kept.clear()
    fresh = windows.read_windows(settings, subject)
    windows._kept.clear()
    kept = windows.read_windows(settings, dataclasses.replace(subject, tokenizer=None))
    assert [window.tolist() for window in fresh] == [window.tolist() for window in kept]
    other = stories(shared, name="babyllama-105", cache=tmp_path)
    documents = sources.read_corpus(texts(shared), "eval")[:9]
    keys = {
        windows.windows_key(settings, 50, documents, one.model_folder) for one in (subject, other)
    }
    keys.add(windows.windows_key(settings, 51, documents, subject.model_folder))
    keys.add(windows.windows_key(settings, 50, documents[:8], subject.model_folder))
    assert len(keys) == 4


def test_too_long_windows_are_refused_in_the_plan(shared: Path) -> None:
    model = Model("stories", str(shared / "models" / "stories260K"))
    reasons = evaluator(source=texts(shared), split="eval", length=2048).check(
        Evaluation("s", "p"), model
    )
    assert len(reasons) == 1 and "2048" in reasons[0] and "512" in reasons[0]
    assert (
        evaluator(source=texts(shared), split="eval", length=0).check(Evaluation("s", "p"), model)
        == []
    )
    with pytest.raises(EvaluationError, match="2048"):
        last(
            evaluator(source=texts(shared), split="eval").score(
                stories(shared), Evaluation("s", "p")
            )
        )


def test_missing_text_is_refused_in_the_plan(shared: Path) -> None:
    model = Model("stories", str(shared / "models" / "stories260K"))
    reasons = evaluator(source=texts(shared), split="evil", length=0).check(
        Evaluation("s", "p"), model
    )
    assert len(reasons) == 1 and "eval" in reasons[0]


def test_a_text_shorter_than_a_window(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One day.")
    for recipe in windows.RECIPES[:2]:
        with pytest.raises(DataError, match="lower `length`"):
            settings = {"source": str(tmp_path / "short.txt"), "length": 100, "windows": recipe}
            last(evaluator(**settings).score(stories(shared), Evaluation("s", "p")))


@pytest.mark.parametrize("settings", [{"windows": "joined"}, {"length": 1}, {"max_windows": 0}])
def test_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="join" if "windows" in settings else "at least"):
        evaluator(**settings)


def test_documents_of_unequal_length_have_the_error_of_a_ratio() -> None:
    losses = torch.tensor([1.0, 3.0, 2.0, 2.5], dtype=torch.float64)
    targets = torch.tensor([10.0, 400.0, 20.0, 100.0], dtype=torch.float64)
    windows = [torch.zeros(int(count) + 1, dtype=torch.int64) for count in targets]
    score = evaluator(windows="documents")._score(Evaluation("s", "p"), windows, losses, targets)
    mean = float((losses * targets).sum() / targets.sum())
    error = math.sqrt(4 / 3 * float(((targets * (losses - mean)) ** 2).sum())) / float(
        targets.sum()
    )
    assert score.metrics["s/perplexity"] == pytest.approx(math.exp(mean))
    assert score.stderr["s/perplexity"] == pytest.approx(math.exp(mean) * error)
    equal = evaluator()._score(
        Evaluation("s", "p"), windows, losses, torch.full((4,), 7.0, dtype=torch.float64)
    )
    assert equal.stderr["s/perplexity"] == pytest.approx(
        equal.metrics["s/perplexity"] * float(losses.std()) / 2
    )
