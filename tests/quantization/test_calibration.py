"""Windows of calibration text: the recipes, their seeds, and what is said when text is missing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.core.cell import Calibration
from harness.core.errors import ConfigError, DataError
from harness.quantization.calibration import draw_windows, windows_digest

TEXTS = ["".join(chr(97 + (i * 7 + j) % 26) for j in range(20 + 13 * i % 90)) for i in range(160)]
BASE = Calibration("tiny", "unused", samples=5, length=32)


class Letters:
    """One token per character, and a token 0 before every text."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0, *(ord(c) for c in text)]}


def draw(**fields: object) -> torch.Tensor:
    return draw_windows(dataclasses.replace(BASE, **fields), Letters(), TEXTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", ["window", "document", "join"])
def test_shape_and_seed(packing: str) -> None:
    windows = draw(packing=packing)
    assert windows.shape == (5, 32) and windows.dtype == torch.int64
    assert torch.equal(windows, draw(packing=packing))
    assert not torch.equal(windows, draw(packing=packing, seed=1))
    assert (
        windows_digest(windows)
        == windows_digest(windows.clone())
        != windows_digest(draw(packing=packing, seed=1))
    )


def test_where_windows_come_from() -> None:
    joined = "\n\n".join(TEXTS)
    as_text = lambda row: "".join(chr(token) for token in row.tolist() if token)  # noqa: E731
    assert all(as_text(row) in joined for row in draw(packing="window"))
    assert all(any(as_text(row) in text for text in TEXTS) for row in draw(packing="document"))
    stream = "".join(as_text(row) for row in draw(packing="join", samples=8))
    whole = [text for text in TEXTS if len(text) < 32]
    assert (
        sum(text in stream for text in whole) >= 5 and int((draw(packing="join") == 0).sum()) >= 3
    )


def test_windows_follow_pythons_random() -> None:
    import random

    tokens = Letters()("\n\n".join(TEXTS))["input_ids"]
    rng = random.Random(3)
    starts = [rng.randint(0, len(tokens) - 32 - 1) for _ in range(5)]
    assert draw(seed=3).tolist() == [tokens[s : s + 32] for s in starts]


class Vocabulary:
    """Fifty tokens, the first three special."""

    all_special_ids = (0, 1, 2)

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + token): token for token in range(50)}


def test_random_tokens_are_seeded_and_never_special() -> None:
    tokenizer, calibration = (
        Vocabulary(),
        Calibration("random_tokens", "random_tokens", samples=3, length=400),
    )
    drawn = draw_windows(calibration, tokenizer)
    assert drawn.shape == (3, 400) and torch.equal(drawn, draw_windows(calibration, tokenizer))
    assert not torch.equal(drawn, draw_windows(dataclasses.replace(calibration, seed=1), tokenizer))
    assert set(drawn.flatten().tolist()) == set(range(3, 50))


def test_too_little_text() -> None:
    with pytest.raises(DataError, match="too few for a window of 99999"):
        draw(length=99999)
    with pytest.raises(DataError, match=r"no document .* more than 500 tokens"):
        draw(packing="document", length=500)
    with pytest.raises(DataError, match="900 windows need"):
        draw(packing="join", samples=900)
    with pytest.raises(ConfigError, match='did you mean "window"'):
        draw(packing="windows")


def test_documents_have_prompts_where_answers_follow() -> None:
    from harness.data.texts import RESPONSE
    from harness.quantization.calibration import documents_digest, draw_documents

    class Letters:
        bos_token_id, eos_token_id = 1, 2

        def __call__(
            self, text: str, add_special_tokens: bool = True, verbose: bool = True
        ) -> dict[str, list[int]]:
            return {"input_ids": [*([1] if add_special_tokens else []), *map(ord, text)]}

    calibration = Calibration("texts", "nowhere")
    asked, plain = draw_documents(calibration, Letters(), [f"Why? {RESPONSE}\nSo.", "Words."])
    prompt = [1, *map(ord, f"Why? {RESPONSE}\n")]
    assert asked.prompt == len(prompt) and asked.tokens.tolist() == [*prompt, *map(ord, "So."), 2]
    assert plain.prompt == 0 and plain.tokens.tolist() == [1, *map(ord, "Words.")]
    assert (
        documents_digest([asked, plain])
        != documents_digest([plain, asked])
        != documents_digest([plain])
    )
