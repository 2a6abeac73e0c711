"""A made-up sweep with records in a store: what tables, figures and tracking are tested on. Its numbers mean nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from harness.core.cell import (
    ActivationScheme,
    Calibration,
    Cell,
    Evaluation,
    Method,
    Model,
    Part,
    Scheme,
    WeightScheme,
    cell_key,
    freeze,
    quantize_key,
    score_key,
)
from harness.core.sweep import Column, Runtime, Sweep, Table, Tracking
from harness.storage.json_files import write_json
from harness.storage.store import Store

LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
EVALUATIONS = (
    Evaluation(
        "wikitext2",
        "perplexity",
        freeze({"length": 2048, "source": "wikitext-2-raw"}),
        data_digest="w",
    ),
    Evaluation(
        "arc_easy", "lm_eval_tasks", freeze({"task": "arc_easy", "num_fewshot": 0}), data_digest="a"
    ),
)
CALIBRATION = Calibration("c4_128x2048", "c4", samples=128, length=2048, digest="c")
BADNESS = {"rtn": 1.0, "gptq": 0.45, "awq": 0.4}


def cells(
    model: Model,
    methods: tuple[str, ...] = ("rtn", "gptq", "awq"),
    bits: tuple[float, ...] = (8, 4, 3, 2),
) -> list[Cell]:
    made = [Cell(model, Method("none"), Scheme("full"), evaluations=EVALUATIONS)]
    for method in methods:
        needs = () if method == "rtn" else ("hessian",)
        rounding = Part(method, freeze({"damping_fraction": 0.01} if needs else {}), needs=needs)
        for width in bits:
            scheme = Scheme(f"w{width:g}g128", WeightScheme(bits=width, group_size=128))
            calibration = CALIBRATION if needs else None
            made.append(
                Cell(
                    model,
                    Method(method, rounding=rounding),
                    scheme,
                    calibration,
                    evaluations=EVALUATIONS,
                )
            )
    return made


def w4a8(model: Model) -> Cell:
    scheme = Scheme("w4a8", WeightScheme(bits=4, group_size=128), ActivationScheme(bits=8))
    return Cell(model, Method("rtn", rounding=Part("rtn")), scheme, evaluations=EVALUATIONS)


LLAMA = Model("llama3_8b", "meta-llama/Meta-Llama-3-8B", digest="l", dtype="bfloat16")
TABLE = Table(
    "table1",
    caption="Perplexity & accuracy of LLaMA3-8B",
    columns=(
        Column("checkpoint/bits_per_weight", "bits/weight"),
        Column("wikitext2/perplexity", "WikiText2", published="wikitext2"),
        Column("arc_easy/acc", "ARC-easy", digits=1, scale=100.0),
        Column("mean", "mean acc", digits=1, scale=100.0, of=("arc_easy/acc",)),
    ),
    published="llama3-empirical-study/table1",
    protocol=("perplexity over windows of 2,048 tokens, loss in float32",),
)


def make_sweep(root: Path, *, published: bool = True, tracking: Tracking | None = None) -> Sweep:
    own = Table(
        "table1",
        TABLE.caption,
        (TABLE.columns[0], Column("wikitext2/perplexity", "WikiText2"), TABLE.columns[2]),
    )
    table = TABLE if published else own
    return Sweep(
        name="llama3_8b_ptq",
        title="LLaMA3-8B after post-training quantization",
        description="How do RTN, GPTQ and AWQ at 8 to 2 bits compare on LLaMA3-8B?",
        cells=(*cells(LLAMA), w4a8(LLAMA)),
        skips=(),
        tables=(table,),
        runtime=Runtime(root / "runs", tracking=tracking or Tracking()),
        path=root / "sweeps" / "llama3_8b_ptq.yaml",
    )


def fill(sweep: Sweep, seed: int = 0, windows: int = 40, questions: int = 400) -> Store:
    """Records for every cell of the sweep: rtn at 2 bits diverges, awq at 2 bits failed, the last cell was not started."""
    store = Store(sweep.runtime.runs)
    rng = np.random.default_rng(seed)
    window_loss, difficulty = rng.normal(1.815, 0.2, windows), rng.normal(size=questions)
    for cell in sweep.cells[:-1]:
        key = store.open_cell(cell)
        bits = 16 if cell.method.is_baseline else cell.scheme.weight.bits
        if cell.method.name == "awq" and bits == 2:
            failure = {
                "stage": "quantize",
                "kind": "error",
                "reason": "Hessian of block 12 is singular",
                "detail": "Traceback …",
            }
            store.write_failure(key, {**failure, "time": 1.0})
            store.log_path(key).write_text("block 12\nHessian of block 12 is singular\n")
            continue
        excess = 0.0 if cell.method.is_baseline else BADNESS[cell.method.name] * 4.0 ** (3.1 - bits)
        _write_manifest(store, cell, bits, excess)
        loss = window_loss + (
            excess * rng.uniform(0.8, 1.2, windows)
            if bits < 8
            else rng.normal(0, 1e-3, windows) * (bits == 8)
        )
        if cell.method.name == "rtn" and bits == 2:
            loss = np.full(windows, math.inf)
        acc = (difficulty + rng.normal(0, 0.05, questions) + 0.9 - min(2.0, excess) > 0).astype(int)
        perplexity = {
            "wikitext2/perplexity": math.exp(min(loss.mean(), 700))
            if np.isfinite(loss).all()
            else math.inf
        }
        _write_score(
            store,
            cell,
            EVALUATIONS[0],
            perplexity,
            {"id": list(range(windows)), "loss": loss.tolist()},
        )
        accuracy = {"arc_easy/acc": float(acc.mean())}
        _write_score(
            store,
            cell,
            EVALUATIONS[1],
            accuracy,
            {"id": list(range(questions)), "acc": acc.tolist()},
        )
        store.write_provenance(key, {"device": "CPU", "torch": "2.13.0", "batch_size": 8})
        store.log_path(key).write_text(f"{cell.title}\nblock 1/4\nblock 4/4\ndone\n")
    return store


def _write_score(
    store: Store,
    cell: Cell,
    evaluation: Evaluation,
    metrics: dict[str, float],
    items: dict[str, list[float]],
) -> None:
    stderr = {
        name: math.sqrt(value * (1 - value) / len(items["id"]))
        for name, value in metrics.items()
        if name.endswith("/acc")
    }
    score = {"metrics": metrics, "stderr": stderr, "details": {"items": len(items["id"])}}
    store.write_score(cell_key(cell), score_key(cell, evaluation), score, items)


def _write_manifest(store: Store, cell: Cell, bits: float, excess: float) -> None:
    rng = np.random.default_rng(1)
    errors = [
        {
            "block": block,
            "linear": linear,
            "output_error": float(excess * (1 + block) * rng.uniform(0.01, 0.02)),
            "weight_error": excess / 50,
        }
        for block in range(4)
        for linear in LINEARS
        if excess
    ]
    stored = bits + (0.25 if bits < 16 else 0)
    manifest = {
        "bits_per_weight": stored,
        "bits_per_weight_total": stored * 0.9 + 1.6,
        "stored_bytes": int(8e9 * (stored * 0.9 + 1.6) / 8),
        "seconds": 0.0 if bits == 16 else 60.0,
        "layer_errors": errors,
    }
    write_json(store.checkpoint_folder(quantize_key(cell)) / "manifest.json", manifest)
