"""The recipe of the demo's fine-tunes: `python -m harness.data.demo.fine_tune` writes their weights beside this file.

Each continues the shipped demo model on the text of one skill (`skills`), all parameters trained: 800 steps of 8 × 128 tokens.
The weights are shipped as tuned_<skill>.safetensors (bfloat16, 0.5 MB each) and the recipe with its figures as tuned.json, because
training is seeded and single-threaded but rounds differently on another processor or version of torch. It takes a minute per skill
on one core. `variants` makes model folders of them: "demo:moved", "demo:subtract", "demo:reverse", each with `base: demo`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from harness.data import model_folders
from harness.data.demo import skills
from harness.data.demo.train import FOLDER, accuracy_on, encode, measure

HERE = Path(__file__).parent
SEED = 1
STEPS, WARMUP_STEPS, BATCH, LENGTH = 800, 20, 8, 128
LEARNING_RATE, BETAS, GRADIENT_NORM = 2e-3, (0.9, 0.95), 1.0


def fine_tune(model: LlamaForCausalLM, tokens: Tensor, log: Callable[[str], None]) -> float:
    """Train all parameters on random windows of tokens [total], in place; return the mean loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, (STEPS - step) / (STEPS - WARMUP_STEPS)),
    )
    draw = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=draw)
        windows = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        logits = model(input_ids=windows, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log(f"step {step + 1}/{STEPS}  loss {sum(losses[-50:]) / 50:.4f}")
    return sum(losses[-50:]) / 50


def make(skill: str, folder: Path, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train one fine-tune, write its weights into folder, and return what its recipe records."""
    began = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32)
    questions = skills.skill_questions(skill)
    before = accuracy_on(model, tokenizer, questions)
    loss = fine_tune(model.train(), encode(tokenizer, skills.text(skill)), log)
    model = model.eval().to(torch.bfloat16)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / f"tuned_{skill}.safetensors", metadata={"format": "pt"})
    model = model.float()  # of the rounded weights that are written
    after = accuracy_on(model, tokenizer, questions)
    old = {name: round(value, 4) for name, value in measure(model, tokenizer).items()}
    log(f"{skill}: {before:.3f} -> {after:.3f}  {old}")
    return {
        "text": skills.text_digest(skill),
        "final_loss": round(loss, 6),
        "figures": {"before": round(before, 4), "after": round(after, 4), **old},
        "cpu_seconds": round(time.process_time() - began),
    }


def main() -> None:
    """Train by the recipe from the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's fine-tunes.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the weight files")
    parser.add_argument("--skills", default=",".join(skills.SKILLS), help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "tuned.json"
    known = json.loads(path.read_text(encoding="utf-8"))["fine_tunes"] if path.is_file() else {}
    made = {skill: make(skill, arguments.output) for skill in arguments.skills.split(",")}
    recipe = {
        "command": "python -m harness.data.demo.fine_tune",
        "base": model_folders.model_digest("demo"),
        "seed": SEED,
        "steps": STEPS,
        "windows": f"{BATCH} × {LENGTH}",
        "learning_rate": LEARNING_RATE,
        "fine_tunes": {**known, **made},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    path.write_text(json.dumps(recipe, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
