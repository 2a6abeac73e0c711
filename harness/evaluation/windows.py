"""The token windows that perplexity and divergence read: cut from a text as the papers' loaders do, and kept for the next cell.

    join       the documents joined by `separator`, tokenized once, cut into N // length windows; the tail is dropped
               (GPTQ, AWQ, OmniQuant, SmoothQuant on WikiText2 and PTB; GPTQ's "c4-new" with documents=1100, max_windows=256)
    sample     `samples` windows at random places of documents that are longer than a window, drawn with Python's own generator
               in the order of GPTQ's loader for C4: document, redrawn until it is long enough; then the offset
    documents  every document by itself, cut to `length` tokens (short stories)

Tokens are kept by the SHA-256 of all that they depend on: the tokenizer's files, the text, the recipe, the policy on special
tokens. A cache keyed by less hands the windows of one tokenizer to another model.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.core.cell import Model, digest
from harness.core.errors import DataError, EvaluationError, unknown_name
from harness.data import digests, texts
from harness.evaluation.protocols import Subject, model_context_length
from harness.storage.atomic_write import share

RECIPES = ("join", "sample", "documents")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)
KEPT = 4  # texts whose windows stay in memory
_kept: OrderedDict[str, list[Tensor]] = OrderedDict()


@dataclass(frozen=True)
class WindowSettings:
    """Which windows of which text.

    source, split   of `harness.data.texts.read_corpus`
    separator       between joined documents
    windows         join, sample or documents
    length          tokens per window; 0: the model's own context, at most 2048
    max_windows     only the first so many; None: all
    documents       only the first so many documents of the text; None: all
    samples, seed   of windows=sample
    special_tokens  what the tokenizer adds by itself: for `join` at most one BOS, at the very start of the text
    """

    source: str = "demo"
    split: str = "test"
    separator: str = "\n\n"
    windows: str = "join"
    length: int = 2048
    max_windows: int | None = None
    documents: int | None = None
    samples: int = 256
    seed: int = 0
    special_tokens: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.windows not in RECIPES:
            problems.append(unknown_name("recipe of windows", self.windows, RECIPES))
        if self.length < 0 or self.length == 1:
            problems.append(
                f"length={self.length}: a window holds at least 2 tokens (0: the model's context)"
            )
        for name in ("max_windows", "documents", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: at least 1")
        if problems:
            raise ValueError("; ".join(problems))


def window_length(settings: WindowSettings, context: int | None) -> int:
    """Tokens per window for a model with that context."""
    return settings.length or min(context or 2048, 2048)


def check_windows(settings: WindowSettings, model: Model) -> list[str]:
    """Reasons why a model cannot read these windows: its context is too short, or the text is missing."""
    reasons = []
    context = model_context_length(model)
    if context is not None and settings.length > context:
        reasons.append(
            f"windows of {settings.length} tokens, but {model.name} was made for at most {context}; "
            f"use length={context}, or length=0 for each model's own context (other lengths give other numbers)"
        )
    return [*reasons, *texts.missing_text(settings.source, settings.split)]


def read_windows(settings: WindowSettings, subject: Subject) -> list[Tensor]:
    """The windows, each [tokens] int64: all of `length`, or of 2..length for whole documents.

    Raises DataError for a text too short for one window, EvaluationError for a window longer than the model's context.
    """
    context = subject.context_length()
    length = window_length(settings, context)
    if context is not None and length > context:
        raise EvaluationError(
            f"windows of {length} tokens: {subject.cell.model.name} was made for {context}; lower `length`"
        )
    documents = texts.read_corpus(settings.source, settings.split)[: settings.documents]
    key = windows_key(settings, length, documents, subject.model_folder)
    if key not in _kept:
        file = subject.cache / "tokens" / f"{key}.safetensors" if subject.cache else None
        windows = _read(file)
        if windows is None:
            windows = cut(documents, subject.tokenizer, settings, length)
            _write(file, windows)
        _kept[key] = windows
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key][: settings.max_windows]


def windows_key(
    settings: WindowSettings, length: int, documents: list[str], model_folder: Path
) -> str:
    """SHA-256 of all that the windows depend on, as 64 hexadecimal digits."""
    text = hashlib.sha256()
    for document in documents:
        data = document.encode()
        text.update(len(data).to_bytes(8, "little") + data)
    recipe = {**asdict(settings), "length": length}
    for place in ("source", "split", "max_windows", "documents"):
        del recipe[place]  # the text itself is in the key
    return digest([text.hexdigest(), tokenizer_digest(model_folder), recipe])


def tokenizer_digest(folder: Path) -> str:
    """Identity of a model folder's tokenizer. Raises EvaluationError where the folder has none."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise EvaluationError(f"{folder}: no tokenizer files ({', '.join(TOKENIZER_FILES[:3])}, …)")
    return digest([[file.name, digests.file_digest(file)] for file in files])


def cut(
    documents: list[str], tokenizer: Any, settings: WindowSettings, length: int
) -> list[Tensor]:
    """The windows of a text, before `max_windows` is applied."""

    def encode(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=settings.special_tokens, verbose=False)[
            "input_ids"
        ]
        return torch.tensor(ids, dtype=torch.int64)

    if settings.windows == "join":
        tokens = encode(settings.separator.join(documents))
        windows = list(tokens[: len(tokens) // length * length].view(-1, length))
        found = f"{len(tokens)} tokens"
    elif settings.windows == "sample":
        windows = _sample(documents, encode, settings, length)
        found = "no document that long"
    else:
        windows = [
            tokens
            for tokens in (encode(document)[:length] for document in documents)
            if len(tokens) > 1
        ]
        found = "no document of two tokens"
    if not windows:
        raise DataError(
            f"text {settings.source}, split {settings.split}: {found}, but one window has {length}; lower `length`"
        )
    return windows


def window_batches(windows: list[Tensor], subject: Subject) -> Iterator[tuple[list[int], Tensor]]:
    """Positions of windows, and their ids [batch, longest] on the subject's device, padded on the right; longest windows first.

    Padding needs no mask: a causal model's prediction never depends on what follows.
    """
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index]))
    start = 0
    while start < len(order):
        indices = order[start : start + subject.batch_for(len(windows[order[start]]))]
        ids = torch.nn.utils.rnn.pad_sequence(
            [windows[index] for index in indices], batch_first=True
        )
        yield indices, ids.to(subject.device)
        start += len(indices)


def _sample(
    documents: list[str], encode: Any, settings: WindowSettings, length: int
) -> list[Tensor]:
    rng = random.Random(settings.seed)
    # Tokenizing every document is wasteful where most are drawn never; a document is never shorter in bytes than in tokens,
    # up to its special tokens, so this only skips those that cannot be long enough.
    if not any(len(document.encode()) + 8 > length for document in documents):
        return []
    encoded: dict[int, Tensor] = {}
    windows: list[Tensor] = []
    while len(windows) < settings.samples:
        index = rng.randint(0, len(documents) - 1)
        if index not in encoded:
            encoded[index] = encode(documents[index])
            if len(encoded) == len(documents) and all(
                len(tokens) <= length for tokens in encoded.values()
            ):
                return []
        tokens = encoded[index]
        if len(tokens) > length:
            start = rng.randint(0, len(tokens) - length - 1)
            windows.append(tokens[start : start + length])
    return windows


def _read(file: Path | None) -> list[Tensor] | None:
    if file is None or not file.is_file():
        return None
    stored = load_file(file)
    return list(stored["tokens"].long().split(stored["lengths"].tolist()))


def _write(file: Path | None, windows: list[Tensor]) -> None:
    if file is None:
        return
    lengths = torch.tensor([len(window) for window in windows], dtype=torch.int64)
    write_tensors(file, {"tokens": torch.cat(windows).int(), "lengths": lengths})


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file written aside and renamed, so that another process never reads half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=file.parent, suffix=".aside")
    os.close(handle)
    try:
        save_file(tensors, aside)
        share(Path(aside))
        os.replace(aside, file)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
