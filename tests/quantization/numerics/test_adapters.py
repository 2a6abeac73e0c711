"""Adapters: the stored layout, the trained form, and the loop that learns from documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from evidence import correlated_inputs, generator, random_weight
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.core.errors import MethodError
from harness.quantization.numerics.adapters import (
    AdaptedWeight,
    AdapterTuning,
    FrozenLinear,
    LowRankLinear,
    LowRankSettings,
    low_rank,
)
from harness.quantization.numerics.grids import as_stored
from harness.quantization.numerics.training import STRETCHES, Document, fine_tune, shorten
from harness.quantization.numerics.weights import QuantizedWeight


def rtn(rows: int = 24, columns: int = 64, bits: int = 4) -> QuantizedWeight:
    scheme = WeightScheme("int", bits, 16)
    return plugins.build("rounding", "rtn", {}).round_layer(
        "q", random_weight(rows, columns), None, scheme, generator()
    )


def adapted(rank: int = 4, dtype: str = "bfloat16") -> AdaptedWeight:
    down, up = random_weight(rank, 64, seed=1), random_weight(24, rank, seed=2)
    return AdaptedWeight(rtn(), as_stored(down, dtype), as_stored(up, dtype), 0.25, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_adapted_matrix_is_its_base_and_a_product(dtype: str) -> None:
    weight, x = adapted(dtype=dtype), correlated_inputs(64)[0]
    again = QuantizedWeight.kinds["adapted"].unpack(*weight.pack())
    assert (
        torch.equal(again.dequantize(), weight.dequantize())
        and again.contained[0].kind == "uniform"
    )
    bytes_ = weight.base.stored_bytes + 4 * (24 + 64) * (4 if dtype == "float32" else 2)
    assert weight.stored_bytes == bytes_ and weight.bits_per_weight == pytest.approx(
        8 * bytes_ / (24 * 64)
    )
    dense = nn.functional.linear(x, weight.dequantize())
    beside = nn.functional.linear(x, weight.base.dequantize()) + low_rank(
        x, weight.down, weight.up, weight.scaling
    )
    assert torch.allclose(dense, beside, atol=1e-5 * float(dense.abs().max()))


def test_training_starts_at_the_base() -> None:
    base, x, bias = rtn(), correlated_inputs(64)[0], torch.arange(24.0)
    linear = LowRankLinear(base, bias, LowRankSettings(rank=4), 64)
    linear.start(generator())
    assert torch.equal(linear(x), nn.functional.linear(x, base.dequantize(), bias))
    assert torch.equal(linear.stored().dequantize(), base.dequantize())
    assert float(linear.down.detach().abs().max()) <= 64**-0.5 and not torch.equal(
        linear.down, torch.zeros_like(linear.down)
    )
    assert [name for name, _ in linear.named_parameters()] == ["down", "up"]
    frozen = FrozenLinear(base, bias)
    assert (
        not list(frozen.parameters())
        and frozen.stored() is base
        and torch.equal(frozen(x), linear(x))
    )


def test_dropout_is_of_training_alone_and_from_its_generator() -> None:
    linear = LowRankLinear(rtn(), None, LowRankSettings(rank=4, dropout=0.5), 64)
    x = torch.ones(1000, 64)
    linear.start(generator())
    with torch.enable_grad():
        first = linear.drop(x)
    linear.start(generator())
    torch.manual_seed(3)
    with torch.enable_grad():
        assert torch.equal(linear.drop(x), first)
    assert set(first.unique().tolist()) == {0.0, 2.0} and float(first.mean()) == pytest.approx(
        1, abs=0.05
    )
    with torch.no_grad():
        assert torch.equal(linear.drop(x), x)


def documents(lengths: Sequence[tuple[int, int]]) -> list[Document]:
    return [Document(torch.arange(prompt + answer) % 7, prompt) for prompt, answer in lengths]


def test_prompts_and_answers_are_shortened_apart() -> None:
    asked, plain = documents([(10, 6)])[0], documents([(0, 25)])[0]
    (kept,) = shorten([asked], 4, 3)
    assert kept.prompt == 4 and kept.tokens.tolist() == [
        *asked.tokens[:4].tolist(),
        *asked.tokens[10:13].tolist(),
    ]
    pieces = shorten([plain], 8, 4)
    assert [piece.tokens.numel() for piece in pieces] == [12, 12], (
        "a last piece of one token has nothing to predict"
    )
    assert torch.equal(torch.cat([piece.tokens for piece in pieces]), plain.tokens[:24])
    assert shorten(documents([(3, 0)]), 8, 4) == [], (
        "a prompt without an answer has nothing to learn"
    )


class Bigram(nn.Module):
    """Logits of the next token from this one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(7, 7))
        self.seen: list[Tensor] = []

    def logits(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        return self.table[tokens]


def tuned(model: Bigram, texts: Sequence[Document], **settings: Any) -> tuple[list[float], int]:
    given = {
        "rate": 0.05,
        "steps": 40,
        "batch": 4,
        "micro_batch": 4,
        "clip": 0.0,
        "rng": generator(),
        **settings,
    }
    walk, steps = fine_tune(model.logits, [model.table], texts, **given), 0
    while True:
        try:
            steps, of = next(walk)
            assert of == given["steps"]
        except StopIteration as end:
            return end.value, steps


def test_learning_lowers_the_loss_of_what_is_learned_alone() -> None:
    model, texts = (
        Bigram(),
        [Document(torch.tensor([1, 2, 3, 4]), 2), Document(torch.tensor([5, 6, 3, 4, 3]), 2)],
    )
    losses, steps = tuned(model, texts)
    assert steps == 40 and len(losses) == STRETCHES and losses[-1] < losses[0] / 2
    moved = (model.table.detach() != 0).any(1)
    assert moved.tolist() == [False, False, True, True, True, False, True], (
        "rows before answers' tokens, not of prompts or padding"
    )


def test_micro_batches_add_up_to_the_batch() -> None:
    texts = documents([(2, 3), (1, 9), (4, 2), (0, 5), (3, 7)])
    whole, parts = Bigram(), Bigram()
    tuned(whole, texts, steps=3)
    tuned(parts, texts, steps=3, micro_batch=1)
    assert torch.allclose(whole.table, parts.table, atol=1e-5) and len(parts.seen) == 4 * len(
        whole.seen
    )


def test_every_document_is_seen_before_one_is_seen_twice() -> None:
    model = Bigram()
    tuned(model, [Document(torch.full((n + 2,), 3), 1) for n in range(8)], steps=2)
    assert sorted(
        int(tokens.count_nonzero(1)[row]) for tokens in model.seen for row in range(4)
    ) == list(range(2, 10))


def test_a_step_is_no_longer_than_its_clip() -> None:
    model = Bigram()
    settings = {"rate": 0.1, "steps": 1, "batch": 2, "micro_batch": 2, "clip": 1e-3}
    next(fine_tune(model.logits, [model.table], documents([(0, 9)]), **settings, rng=generator()))  # type: ignore[arg-type]
    assert model.table.grad is not None and float(model.table.grad.norm()) == pytest.approx(
        1e-3, rel=1e-3
    )


class Plain(AdapterTuning):
    def adapted(self, weight: QuantizedWeight, bias: Tensor | None) -> LowRankLinear:
        return LowRankLinear(weight, bias, self.settings, weight.shape[1])


def test_what_cannot_be_learned_is_said() -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.fill_(float("nan"))
    with pytest.raises(MethodError, match=r"loss before step .* is nan; lower the learning rate"):
        tuned(model, documents([(0, 9)]))
    with pytest.raises(MethodError, match="no document has a token to learn"):
        list(Plain(LowRankSettings()).tune(model, None, [], documents([(5, 0)]), generator()))
