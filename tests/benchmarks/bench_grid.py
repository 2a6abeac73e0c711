"""What cells in one pass cost, against the sum of the same cells alone: `python tests/benchmarks/bench_grid.py [--hidden 256]`.

A random model of Llama's shape with some large channels is quantized by {RTN, GPTQ, AWQ, SmoothQuant} × {2, 3, 4, 8} bits × {one
scale per channel, groups of 64}, calibrated on full-precision inputs: every cell in a pass of its own, then all in one pass. CPU
time of one thread; the files of every checkpoint are compared, byte by byte. Before it, one cell is run to warm up.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from bench_memory import write_model
from safetensors.torch import load_file, save_file
from small import GPTQ, RTN, cell, content, failures, part, quantize

from harness.core.cell import Cell, Method, quantize_key

METHODS = (
    RTN,
    GPTQ,
    Method("awq", transform=part("awq", "transform"), rounding=part("awq")),
    Method("smoothquant", transform=part("smoothquant", "transform"), rounding=part("rtn")),
)
LARGE = 8  # channels of each norm that are ten times larger


def plant_large_channels(folder: Path) -> None:
    """Give each norm a spread of weights and a few large ones, as trained models have: else all of AWQ's exponents are alike."""
    generator = torch.Generator().manual_seed(1)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "layernorm" in name:
                tensor.copy_(torch.exp(0.5 * torch.randn(tensor.shape, generator=generator)))
                tensor[torch.randperm(tensor.numel(), generator=generator)[:LARGE]] *= 10
        save_file(tensors, path)


def cpu_seconds(cells: Sequence[Cell], folder: Path, store: Path, windows: Tensor) -> float:
    """CPU time of one pass over the cells; their checkpoints are in store."""
    began = time.process_time()
    failed = failures(quantize(cells, folder, store, windows))
    assert not failed, failed
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--inputs", default="full_precision", choices=("full_precision", "quantized")
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    windows = torch.randint(
        0, 256, (given.samples, given.length), generator=torch.Generator().manual_seed(0)
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        size = write_model(folder, given.blocks, given.hidden)
        plant_large_channels(folder)
        cells = [
            cell(folder, method, bits, group_size, inputs=given.inputs)
            for method in METHODS
            for bits in (2, 3, 4, 8)
            for group_size in (-1, 64)
        ]
        print(
            f"{size / 4e6:.1f} M parameters, {given.samples} × {given.length} tokens, inputs {given.inputs}; CPU time of one "
            f"thread, {platform.machine()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n"
        )
        cpu_seconds([cells[-1]], folder, Path(scratch) / "warm", windows)
        alone: dict[str, float] = {}
        for each in cells:
            taken = cpu_seconds([each], folder, Path(scratch) / "alone", windows)
            alone[each.method.name] = alone.get(each.method.name, 0.0) + taken
        for name, taken in alone.items():
            print(f"{name:14}{taken / 8:>8.2f} s a cell")
        together = cpu_seconds(cells, folder, Path(scratch) / "together", windows)
        different = [
            each.title
            for each in cells
            if content(Path(scratch) / "alone" / quantize_key(each))
            != content(Path(scratch) / "together" / quantize_key(each))
        ]
        total = sum(alone.values())
        print(
            f"\n{len(cells)} cells alone {total:.1f} s, in one pass {together:.1f} s: {together / total:.2f} of the sum"
        )
        print(f"checkpoints that differ: {', '.join(different) or 'none'}")
        assert not different


if __name__ == "__main__":
    main()
