"""The demo model's recipe: `python -m harness.data.demo.train` writes harness/data/demo/model/.

It takes three to four minutes on one CPU core.

A byte-level BPE tokenizer of 512 entries (every digit its own token) and a Llama of width 64 with 4 blocks, trained by steps on the
world of `corpus`. Two choices make it behave like the large models of the papers when its bits are taken away:

    small batches, no weight decay      it knows its facts nearly perfectly, with weights that are spread rather than shrunk
    planted activation outliers         of the channels that enter q, k, v, gate and up, the first quarter are 4 times larger, and
                                        5 % anywhere 4 or 8 times (`plant`; the function is unchanged to the bit), as in the
                                        normalised residual streams of large models

The plain model loses nothing at 4 bits; with the outliers every step from 8 to 2 bits shows, and calibration and groups have
something to win.
The recipe is seeded and single-threaded; another processor or torch version rounds differently and gives other weights of the same
quality. docs/demo-model.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.data.demo import corpus
from harness.data.demo.plant import plant

FOLDER = Path(__file__).parent / "model"
END = "<|end|>"  # also padding, and lm-eval's prefix of an empty context
SEPARATOR = "\n\n"  # between documents, as perplexity evaluations join them
SEED = 0
TOKENIZER_DOCUMENTS = 1000  # more change no merge that matters
STEPS, WARMUP_STEPS = 3600, 50
# (batch, length) in turn; the long teach positions to 256
WINDOWS = ((8, 128), (8, 128), (8, 128), (4, 256))
LEARNING_RATE, BETAS, GRADIENT_NORM = 5e-3, (0.9, 0.95), 1.0
RUN_CHANNELS, RUN_SCALE = 16, 4  # neighbours, at the start of every norm
OUTLIER_SHARE, OUTLIER_SCALES = 0.05, (4, 8)  # anywhere, on top

CONFIG = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 512 entries: the end token, 256 bytes, 255 merges; digits never merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONFIG["max_position_embeddings"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def train(tokens: Tensor, steps: int, log: Callable[[str], None]) -> tuple[LlamaForCausalLM, float]:
    """Train on random windows of tokens [total]; return the model in float32 and the mean loss of the last 100 steps."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS)),
    )
    draw = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        batch, length = WINDOWS[step % len(WINDOWS)]
        starts = torch.randint(len(tokens) - length, (batch,), generator=draw)
        # [batch, length]
        windows = torch.stack([tokens[start : start + length] for start in starts.tolist()])
        logits = model(input_ids=windows, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            recent = losses[-100:]
            log(
                f"step {step + 1}/{steps}  loss {sum(recent) / len(recent):.4f}  {time.monotonic() - started:.0f} s"
            )
    return model.eval(), sum(losses[-100:]) / len(losses[-100:])


def plant_outliers(model: LlamaForCausalLM) -> None:
    """Make activations after every norm of the blocks larger, in place: on a run of neighbouring channels, and on a few others.

    The run makes one scale per output channel worse than one per group; the others make groups worse than without outliers.
    """
    plant(
        model, "activation", RUN_SCALE, range(RUN_CHANNELS), range(model.config.num_hidden_layers)
    )
    draw = torch.Generator().manual_seed(SEED)
    count = round(OUTLIER_SHARE * model.config.hidden_size)
    for block in range(model.config.num_hidden_layers):
        channels = torch.randperm(model.config.hidden_size, generator=draw)[:count].tolist()
        for i, scale in enumerate(OUTLIER_SCALES):
            plant(model, "activation", scale, channels[i :: len(OUTLIER_SCALES)], [block])


def accuracy(model: nn.Module, tokenizer: Any, kind: str, count: int = 400) -> float:
    """Share of the first `count` questions of a kind whose right choice has the highest log-probability, in [0, 1]."""
    return accuracy_on(model, tokenizer, corpus.questions(kind, count))


@torch.no_grad()
def accuracy_on(model: nn.Module, tokenizer: Any, questions: Sequence[corpus.Question]) -> float:
    """Share of questions whose right choice has the highest log-probability, in [0, 1]."""
    rows = [
        (tokenizer(q.prompt)["input_ids"], tokenizer(f"{q.prompt} {c}")["input_ids"])
        for q in questions
        for c in q.choices
    ]
    scores: list[float] = []
    for first in range(0, len(rows), 100):
        batch = rows[first : first + 100]
        width = max(len(ids) for _, ids in batch)
        # causal: padding is seen by nobody
        ids = torch.tensor([whole + [0] * (width - len(whole)) for _, whole in batch])
        logp = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[:, :-1]
        of_next = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)  # [rows, width - 1]
        scores += [
            row[len(prompt) - 1 : len(ids) - 1].sum().item()
            for row, (prompt, ids) in zip(of_next, batch, strict=True)
        ]
    chosen = torch.tensor(scores).view(len(questions), 4).argmax(1).tolist()
    return sum(
        choice == question.answer for choice, question in zip(chosen, questions, strict=True)
    ) / len(questions)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, length: int = 256, windows: int = 64) -> float:
    """exp of the mean negative log-likelihood per token over the first windows of tokens [total]."""
    ids = tokens[: windows * length].view(-1, length)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return math.exp(
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    )


def encode(tokenizer: Any, documents: Sequence[str]) -> Tensor:
    """Documents joined by SEPARATOR as one row of token ids [total], int64."""
    pieces = tokenizer([document + SEPARATOR for document in documents], verbose=False)["input_ids"]
    return torch.tensor([token for piece in pieces for token in piece])


def measure(model: nn.Module, tokenizer: Any) -> dict[str, float]:
    """Perplexity on the test documents and accuracy of the four kinds, with their mean."""
    accuracies = {kind: accuracy(model, tokenizer, kind) for kind in corpus.KINDS}
    test = encode(tokenizer, corpus.documents("test"))
    return {
        "perplexity": perplexity(model, test),
        **accuracies,
        "mean": sum(accuracies.values()) / len(accuracies),
    }


def main() -> None:
    """Train by the recipe from the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model and write its folder.")
    parser.add_argument(
        "--output", type=Path, default=FOLDER, help="folder to write; default: the shipped model"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="training steps; fewer for a trial"
    )
    parser.add_argument("--plain", action="store_true", help="without planted outliers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, and twice as fast at this size

    documents = corpus.documents("train")
    tokenizer = train_tokenizer(documents[:TOKENIZER_DOCUMENTS])
    tokens = encode(tokenizer, documents)
    print(f"{len(tokens):,} tokens in {len(documents):,} documents")
    model, loss = train(tokens, arguments.steps, print)
    if not arguments.plain:
        plant_outliers(model)
    model = model.to(torch.bfloat16)
    figures = measure(model.float(), tokenizer)  # of the rounded weights that are written
    print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    recipe = {
        "command": "python -m harness.data.demo.train",
        "seed": SEED,
        "steps": arguments.steps,
        "windows": [f"{batch} × {length}" for batch, length in WINDOWS],
        "learning_rate": LEARNING_RATE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": {split: corpus.corpus_digest(split) for split in corpus.DOCUMENTS},
        "final_loss": round(loss, 6),
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "cpu_seconds": round(time.process_time()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (arguments.output / "recipe.json").write_text(
        json.dumps(recipe, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
