"""Speed of real low-bit products beside bfloat16, one thread, both sides in turn in one run.

    python tests/benchmarks/bench_kernels.py [--seconds 1.0]

A product: x [rows, n] times a matrix [n, n] of codes. "× bfloat16" is the time of a dequantized bfloat16 matrix over that of the
kernel: above 1 the kernel is faster. A model: a Llama of random weights whose time is in its matrices, decoded at batch 1. Matrices
are used in turn, more than the caches hold, as a model's layers are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.core.cell import WeightScheme
from harness.quantization.inference import kernels
from harness.quantization.inference.linear import QuantizedLinear
from harness.quantization.numerics.weights import UniformWeight

CPU, BF16 = torch.device("cpu"), torch.bfloat16
CACHE_BYTES = 64 << 20
SCHEMES = {"int4pack": (4, 64), "int8pack": (8, -1)}


def codes(size: int, bits: int, group: int, seed: int) -> UniformWeight:
    generator = torch.Generator().manual_seed(seed)
    width = size if group == -1 else group
    values = torch.randint(0, 2**bits, (size, size), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(size, size // width, generator=generator) * 0.02).to(BF16).float()
    return UniformWeight(values, scale, None, bits, "bfloat16")


def ratio(kernel: Callable[[], object], dense: Callable[[], object], seconds: float) -> float:
    """Time of `dense` over that of `kernel`: the median over pairs of runs."""
    for side in (kernel, dense):
        side()
    began = time.perf_counter()
    kernel()
    dense()
    repeats = max(1, int(0.02 / (time.perf_counter() - began)))
    found: list[float] = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(found) < 5:
        spent = []
        for side in (kernel, dense):
            start = time.thread_time()
            for _ in range(repeats):
                side()
            spent.append(time.thread_time() - start)
        found.append(spent[1] / spent[0])
    return statistics.median(found)


def product(name: str, size: int, rows: int, seconds: float) -> float:
    bits, group = SCHEMES[name]
    count = max(1, min(16, CACHE_BYTES // (2 * size * size)))
    held = [codes(size, bits, group, seed) for seed in range(count)]
    kernel = kernels.kernel(name)
    buffers = [kernel.prepare(each, CPU) for each in held]
    matrices = [each.dequantize().to(BF16) for each in held]
    x = torch.randn(rows, size).to(BF16)

    def native() -> None:
        for each in buffers:
            kernel.multiply(x, each, None)

    def dense() -> None:
        for each in matrices:
            functional.linear(x, each)

    return ratio(native, dense, seconds)


def decoding(name: str, seconds: float) -> float:
    """Tokens per second of a Llama on a kernel over those on bfloat16 matrices, batch 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    bits, group = SCHEMES[name]
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    models: list[Any] = []
    for mode in (f"native:{name}", "dense"):
        model = LlamaForCausalLM(config).to(BF16).eval()
        for parent in list(model.model.layers.modules()):
            for leaf, module in list(parent.named_children()):
                if isinstance(module, torch.nn.Linear):
                    rows, columns = module.weight.shape
                    width = columns if group == -1 else group
                    held = UniformWeight(
                        torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8),
                        (torch.rand(rows, columns // width) * 0.01).to(BF16).float(),
                        None,
                        bits,
                        "bfloat16",
                    )
                    setattr(parent, leaf, QuantizedLinear(held, None, BF16, CPU, None, mode))
        models.append(model)
    prompt = torch.randint(0, 512, (1, 16))

    def decode(model: Any) -> Tensor:
        with torch.inference_mode():
            output = model(input_ids=prompt, use_cache=True)
            for _ in range(8):
                token = output.logits[:, -1:].argmax(-1)
                output = model(
                    input_ids=token, past_key_values=output.past_key_values, use_cache=True
                )
        return output.logits

    return ratio(lambda: decode(models[0]), lambda: decode(models[1]), seconds)


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    scheme = WeightScheme(bits=4, group_size=64, scale_dtype="bfloat16")
    print(
        f"kernels beside bfloat16 matrices, one thread, torch {torch.__version__}; {scheme.bits} bits in groups of 64, 8 per row"
    )
    print("kernel      size   rows   × bfloat16")
    for name in SCHEMES:
        for size in (512, 1024, 2048):
            for rows in (1, 4, 16):
                print(
                    f"{name:<11} {size:>4}   {rows:>4}   {product(name, size, rows, seconds):>10.2f}",
                    flush=True,
                )
    for name in SCHEMES:
        print(
            f"{name:<11} decoding a 4-layer Llama of 1024 at batch 1   {decoding(name, seconds):>6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
