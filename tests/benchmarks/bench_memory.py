"""Peak memory of a pass must not grow with the depth of the model: 4, 16 and 32 blocks, measured in processes of their own.

    python tests/benchmarks/bench_memory.py [--methods gptq,quip] [--hidden 256] [--depths 4,32]

For each method and depth a random model of LLaMA's shape is written to disk and quantized on the CPU; what is printed is the growth
of the process's resident memory during the pass (peak minus the value after imports), beside the size of the weights. A pass holds
one block, a few copies of it, and the calibration activations, so the growth stays while the weights grow eightfold; squared
gradients wait on disk. The scheme is the first of a few that the method accepts, in two widths where it takes two; trained methods
train one epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DEPTHS = (4, 16, 32)
METHODS = (
    "gptq",
    "quip",
    "spqr",
    "omniquant",
    "vptq",
    "squeezellm",
    "any_precision",
    "db_llm_blockwise",
    "awq",
)

CHILD = """
import json, resource, sys, threading, time
from pathlib import Path
import psutil, torch, transformers
from harness.core.cell import Cell, Method, Model, Part, Scheme, WeightScheme, freeze, quantize_key, to_json
from harness.core import plugins
from harness.core.events import Failed
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.models import shapes
from harness.quantization.pipeline.passes import run_pass
from transformers import AutoModelForCausalLM
folder, store, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
small = {"epochs": 1, "vector_length": 4, "index_bits": 8}
def part(slot, name):
    rounding = plugins.build(slot, name, {})
    settings = {key: value for key, value in small.items() if hasattr(rounding.settings, key)}
    return Part(name, freeze(settings), needs=tuple(plugins.facts(slot, name).get("needs", ())))
parts = {slot: part(slot, method) for slot in ("transform", "rounding") if method in plugins.find(slot)}
model = Model("random", str(folder), digest="random")
checks = [plugins.build(slot, each.name, to_json(each)["settings"]) for slot, each in parts.items()]
known = shapes(folder)
schemes = [Scheme("w", WeightScheme(bits=bits, group_size=size)) for size in (128, 64, 16, -1) for bits in (4, 3, 2, 1.1)]
schemes = [scheme for scheme in schemes if not any(check.check(scheme, known) for check in checks)]
schemes = [scheme for scheme in schemes if scheme.weight.group_size == schemes[0].weight.group_size][:2]
cells = [Cell(model, Method(method, **parts), scheme) for scheme in schemes]
writers = {quantize_key(c): CheckpointWriter(store / quantize_key(c), {}) for c in cells}
windows = torch.randint(0, 250, (8, 64), generator=torch.Generator().manual_seed(0))
process = psutil.Process()
torch.linalg.cholesky(torch.eye(64)); torch.eye(64) @ torch.eye(64)
before, peak, done = process.memory_info().rss, 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
began = time.monotonic()
failed = [event.reason for event in run_pass(cells, folder, windows, writers) if isinstance(event, Failed)]
seconds = time.monotonic() - began
done = True; thread.join()
assert not failed, failed
print(json.dumps({"growth": peak - before, "seconds": seconds, "cells": len(cells)}))
"""


def write_model(
    folder: Path,
    blocks: int,
    hidden: int,
    *,
    inner: int = 0,
    head_dim: int = 64,
    kv_heads: int = 0,
    dtype: str = "float32",
    positions: int = 256,
    device: str = "cpu",
) -> int:
    """A random model, its blocks written as one shard each so that writing needs no memory either; returns its bytes.

    inner 0: 11/4 of hidden, a multiple of 128; kv_heads 0: as many as heads. Numbers are drawn on `device`.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    inner = inner or hidden * 11 // 4 // 128 * 128
    kv_heads = kv_heads or hidden // head_dim
    generator = torch.Generator(device).manual_seed(0)
    stored: torch.dtype = getattr(torch, dtype)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": hidden,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "dtype": dtype,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    sizes |= {f"self_attn.{name}_proj": (kv_heads * head_dim, hidden) for name in "kv"}
    sizes |= {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    listed: dict[str, str] = {}
    total = 0

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> int:
        name = f"model-{number:05}.safetensors"
        tensors = {key: value.to(stored).cpu() for key, value in tensors.items()}
        save_file(tensors, folder / name)
        listed.update(dict.fromkeys(tensors, name))
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def draw(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for index in range(blocks):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}{n}.weight": draw(s) / s[1] ** 0.5 for n, s in sizes.items()}
        tensors |= {
            f"{prefix}{n}_layernorm.weight": torch.ones(hidden) for n in ("input", "post_attention")
        }
        total += shard(index, tensors)
    ends = {n: draw((256, hidden)) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    total += shard(blocks, {**ends, "model.norm.weight": torch.ones(hidden)})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": listed})
    )
    return total


def measure(method: str, blocks: int, hidden: int) -> tuple[int, dict[str, float]]:
    """Bytes of the weights, and what the child measured: growth in bytes, seconds, cells."""
    with tempfile.TemporaryDirectory() as scratch:
        size = write_model(Path(scratch) / "model", blocks, hidden)
        command = [sys.executable, "-c", CHILD, f"{scratch}/model", f"{scratch}/store", method]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_TRIM_THRESHOLD_": "0",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method}, {blocks} blocks:\n{done.stderr}")
    return size, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)))
    arguments = parser.parse_args()
    print(
        f"hidden size {arguments.hidden}, cells in company, 8 windows of 64 tokens, float32, one thread"
    )
    for method in arguments.methods.split(","):
        first = None
        for blocks in map(int, arguments.depths.split(",")):
            size, measured = measure(method, blocks, arguments.hidden)
            first = first or measured["growth"]
            print(
                f"{method:18}{blocks:3} blocks   {measured['cells']} cells   weights {size / 2**20:5.0f} MiB   growth of memory "
                f"{measured['growth'] / 2**20:5.0f} MiB   {measured['growth'] / first:5.2f} of the first   "
                f"{measured['seconds'] / blocks:5.2f} s per block",
                flush=True,
            )


if __name__ == "__main__":
    main()
