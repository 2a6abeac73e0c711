"""Token windows from a corpus, by the recipes of the methods' papers (GPTQ, its C4 variant, AWQ).

    window     join all documents with the separator, tokenize once, cut windows at random places           GPTQ on WikiText-2
    document   draw documents until one has more tokens than a window, cut a random window from it          GPTQ on C4
    join       shuffle, drop documents longer than a window, tokenize each, concatenate, cut one after another          AWQ

Tokenizers add their special tokens as they do by default: with `window` a BOS stands only at the very start of the text, with
`document` where a window begins a document, with `join` before every document. Statistics of maxima depend on it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.core.cell import Calibration
from harness.core.errors import ConfigError, DataError, unknown_name
from harness.data.texts import RANDOM_TOKENS, RESPONSE, read_corpus
from harness.quantization.numerics.training import Document

PACKINGS = ("window", "document", "join")


def draw_windows(
    calibration: Calibration, tokenizer: Any, documents: Sequence[str] | None = None
) -> Tensor:
    """[samples, length] int64 tokens. documents: the corpus, read from the calibration's source when None.

    Raises DataError when the corpus is too short, saying how much it has.
    """
    if calibration.packing not in PACKINGS:
        raise ConfigError(
            unknown_name(
                "packing", calibration.packing, PACKINGS, f"calibration {calibration.name}"
            )
        )
    if calibration.source == RANDOM_TOKENS and documents is None:
        return _random_tokens(calibration, tokenizer)
    texts = read_corpus(calibration.source, calibration.split) if documents is None else documents
    draw = {"window": _windows, "document": _documents, "join": _joined}[calibration.packing]
    return torch.tensor(draw(calibration, tokenizer, texts), dtype=torch.int64)


def _random_tokens(calibration: Calibration, tokenizer: Any) -> Tensor:
    """Uniform and independent tokens of the vocabulary, none of them special: not even characters make sense (arXiv 2405.20835)."""
    known = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    draws = random.Random(f"{RANDOM_TOKENS} {calibration.split} {calibration.seed}")
    drawn = draws.choices(known, k=calibration.samples * calibration.length)
    return torch.tensor(drawn, dtype=torch.int64).reshape(calibration.samples, calibration.length)


def draw_documents(
    calibration: Calibration, tokenizer: Any, documents: Sequence[str] | None = None
) -> list[Document]:
    """Every text of the corpus, tokenized, for tunings that learn from answers; packing, samples and length apply to windows only.

    The prompt is the text before an answer (`texts.RESPONSE`). A prompt and its answer are tokenized separately, with a BOS before
    the prompt and an EOS after the answer where the tokenizer has them; a text without a prompt is tokenized as in a window.
    """
    texts = read_corpus(calibration.source, calibration.split) if documents is None else documents
    first, last = (
        [token] if token is not None else []
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    found = []
    for text in texts:
        before, response, answer = text.partition(RESPONSE)
        if not response:
            found.append(Document(torch.tensor(_tokens(tokenizer, text), dtype=torch.int64)))
            continue
        answered = answer.removeprefix("\n")
        prompt = before + response + answer[: len(answer) - len(answered)]
        asked, answers = (
            _tokens(tokenizer, part, add_special_tokens=False) for part in (prompt, answered)
        )
        found.append(
            Document(
                torch.tensor([*first, *asked, *answers, *last], dtype=torch.int64),
                len(first) + len(asked),
            )
        )
    return found


def documents_digest(documents: Sequence[Document]) -> str:
    """SHA-256 of the tokens and of where prompts end."""
    found = hashlib.sha256()
    for document in documents:
        found.update(f"{document.prompt} {document.tokens.numel()}\n".encode())
        found.update(document.tokens.numpy().astype("<i8").tobytes())
    return found.hexdigest()


def windows_digest(windows: Tensor) -> str:
    """SHA-256 of the tokens, as 64 hexadecimal digits: the same draw on every machine."""
    return hashlib.sha256(
        str(tuple(windows.shape)).encode() + windows.to(torch.int64).numpy().astype("<i8").tobytes()
    ).hexdigest()


def _windows(calibration: Calibration, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    tokens = _tokens(tokenizer, calibration.separator.join(texts))
    length = calibration.length
    if len(tokens) <= length:
        raise DataError(
            f"calibration {calibration.name}: {calibration.source} ({calibration.split}) has {len(tokens)} tokens, "
            f"too few for a window of {length}; shorten calibration.length or use more text"
        )
    rng = random.Random(calibration.seed)
    starts = [rng.randint(0, len(tokens) - length - 1) for _ in range(calibration.samples)]
    return [tokens[start : start + length] for start in starts]


def _documents(calibration: Calibration, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    rng, length = random.Random(calibration.seed), calibration.length
    tokens: dict[int, list[int]] = {}
    too_short: set[int] = set()
    found: list[list[int]] = []
    while len(found) < calibration.samples:
        if len(too_short) == len(texts):
            raise DataError(
                f"calibration {calibration.name}: no document of {calibration.source} ({calibration.split}) has more than "
                f"{length} tokens ({len(texts)} documents); shorten calibration.length or use packing: window"
            )
        index = rng.randint(0, len(texts) - 1)
        if index in too_short:
            continue
        if index not in tokens:
            tokens[index] = _tokens(tokenizer, texts[index])
        if len(tokens[index]) <= length:
            too_short.add(index)
            del tokens[index]
            continue
        start = rng.randint(0, len(tokens[index]) - length - 1)
        found.append(tokens[index][start : start + length])
    return found


def _joined(calibration: Calibration, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    order = list(range(len(texts)))
    random.Random(calibration.seed).shuffle(order)
    length, needed = calibration.length, calibration.samples * calibration.length
    stream: list[int] = []
    for index in order:
        tokens = _tokens(tokenizer, texts[index].strip())
        if 0 < len(tokens) <= length:
            stream += tokens
        if len(stream) >= needed:
            return [stream[start : start + length] for start in range(0, needed, length)]
    raise DataError(
        f"calibration {calibration.name}: the documents of at most {length} tokens in {calibration.source} ({calibration.split}) "
        f"hold {len(stream)} tokens; {calibration.samples} windows need {needed}; lower calibration.samples"
    )


def _tokens(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, verbose=False, **options)["input_ids"])
