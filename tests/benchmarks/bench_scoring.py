"""Log-likelihood requests per second: common prefixes computed once, against lm-eval's own model at its best batch size.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_scoring.py [--shared ../shared] [--items 3] [--subjects 6]

Three shapes of request: MMLU with five worked examples (long prefix per subject; one-token choices, which lm-eval shares as well),
HellaSwag with none (a context, four endings), BoolQ (two answers to a passage; one token each). Random Llama of 6 layers and width
256 with a context of 4,096; every timing is processor time, the best of two after a warm-up. Both sides get the same tokens, and
their answers are compared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from harness.core.cell import Cell, Method, Model, Scheme
from harness.evaluation import prefix_scoring
from harness.evaluation.evaluators import lm_eval_tasks
from harness.evaluation.protocols import Subject

BATCHES = (1, 4, 16)


def subject(folder: Path, batch_size: int) -> Subject:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    cell = Cell(Model("random", "random"), Method("none"), Scheme("full"))
    return Subject(
        cell,
        LlamaForCausalLM(config).eval(),
        AutoTokenizer.from_pretrained(folder),
        "cpu",
        batch_size,
        {},
        folder,
    )


def requests_of(
    folder: Path, tasks: list[str], shots: int, data: Path, limit: int
) -> tuple[list[Any], list[lm_eval_tasks.Pair], int]:
    """Built requests and their tokens; the number of distinct tokens that lm-eval's model reads without sharing."""
    one = subject(folder, 1)
    instances, pairs = [], []
    for task in tasks:
        settings = lm_eval_tasks.Evaluator.Settings(
            task=task, num_fewshot=shots, data_root=str(data)
        )
        model = lm_eval_tasks._language_model(one, settings)
        built = lm_eval_tasks._built(settings, limit)
        instances += built.instances
        pairs += built.pairs(model, folder, None)
    return instances, pairs, sum(len(before) + len(after) for before, after in pairs)


def seconds(call: Any, repeats: int = 2) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        # not wall time: the machine may be shared; with one thread they are the same
        start = time.process_time()
        result = call()
        best = min(best, time.process_time() - start)
    return best, result


def theirs(
    folder: Path, instances: list[Any], pairs: list[lm_eval_tasks.Pair], batch_size: int
) -> Any:
    model = lm_eval_tasks._language_model(
        subject(folder, batch_size), lm_eval_tasks.Evaluator.Settings(task="x")
    )
    asked = [
        (i.args, before.tolist(), after.tolist())
        for i, (before, after) in zip(instances, pairs, strict=True)
    ]
    model._loglikelihood_tokens(asked[:4], disable_tqdm=True)
    return seconds(lambda: model._loglikelihood_tokens(asked, disable_tqdm=True))


def ours(folder: Path, pairs: list[lm_eval_tasks.Pair]) -> Any:
    one = subject(folder, 0)
    asked = [prefix_scoring.clip(before, after, 4096) for before, after in pairs]

    def call() -> list[prefix_scoring.Answer]:
        answers = {
            index: answer
            for batch in prefix_scoring.scores(one.model, asked, "cpu")
            for index, answer in batch.items()
        }
        return [answers[index] for index in range(len(asked))]

    list(prefix_scoring.scores(one.model, asked[:4], "cpu"))
    return seconds(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path(__file__).resolve().parents[3] / "shared"
    )
    parser.add_argument("--items", type=int, default=3)
    parser.add_argument("--subjects", type=int, default=6)
    arguments = parser.parse_args()
    folder, data = arguments.shared / "models" / "stories260K", arguments.shared / "data"
    subjects = [
        "anatomy",
        "astronomy",
        "nutrition",
        "philosophy",
        "virology",
        "marketing",
        "sociology",
        "prehistory",
    ]
    shapes = [
        (
            "mmlu, 5 shots",
            [f"mmlu_{name}" for name in subjects[: arguments.subjects]],
            5,
            arguments.items,
        ),
        ("hellaswag, 0 shots", ["hellaswag"], 0, 6 * arguments.items),
        ("boolq, 0 shots", ["boolq"], 0, 6 * arguments.items),
    ]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), float32, best of two")
    for title, tasks, shots, limit in shapes:
        instances, pairs, tokens = requests_of(folder, tasks, shots, data, limit)
        rows = prefix_scoring.plan_rows(
            [prefix_scoring.clip(before, after, 4096) for before, after in pairs], 256, 10**9
        )
        best = min(
            ((*theirs(folder, instances, pairs, batch), batch) for batch in BATCHES),
            key=lambda timing: timing[0],
        )
        time_ours, answers = ours(folder, pairs)
        difference = max(abs(a[0] - b[0]) for a, b in zip(best[1], answers, strict=True))
        greedy = np.mean([a[1] == b[1] for a, b in zip(best[1], answers, strict=True)])
        print(
            f"{title:20} {len(pairs):4} requests {tokens:7} tokens -> {sum(row.length for row in rows):6} in {len(rows)} rows | "
            f"lm_eval {best[0]:6.2f} s (batch {best[2]}) | shared_prefix {time_ours:6.2f} s | {best[0] / time_ours:5.1f} x | "
            f"largest difference {difference:.1e}, greedy equal {greedy:.3f}"
        )


if __name__ == "__main__":
    main()
