"""What passes and products cost on a card, for the shapes of 8B and 70B models with random weights.

    python tests/benchmarks/bench_gpu.py [--minutes 8] [--samples 128] [--length 2048]
    python tests/benchmarks/bench_gpu.py --device cpu --shapes tiny        # the same code in seconds, to see that it works

Passes: a model of one block (70B) or two (8B) is written to disk and quantized, from files to files; "whole model" is the time of a
block times the number of blocks, without any overlap of reading, rounding and writing. Peak memory is that of the card.
Products: a matrix on each native kernel that holds it, beside its bfloat16 form, 1, 16 and 256 rows of input. Measurements are made
in order of interest; one that would pass the limit of minutes, or that fails, is listed with its reason and not estimated.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from bench_memory import write_model
from small import GPTQ, RTN, cell, part

from harness.core import plugins
from harness.core.cell import ActivationScheme, Cell, Method, WeightScheme, quantize_key
from harness.core.errors import HarnessError
from harness.core.events import Failed
from harness.quantization.formats.native import CheckpointWriter
from harness.quantization.inference import kernels
from harness.quantization.numerics.weights import QuantizedWeight
from harness.quantization.pipeline.passes import run_pass

AWQ = Method("awq", transform=part("awq", "transform"), rounding=part("awq"))
HQQ = Method("hqq", rounding=part("hqq"))


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. blocks: of the whole model; measured: of the model that is written here."""

    hidden: int
    inner: int
    head_dim: int
    kv_heads: int
    blocks: int
    measured: int


SHAPES = {
    "8B": Shape(4096, 14336, 128, 8, 32, 2),
    "70B": Shape(8192, 28672, 128, 8, 80, 1),
    "tiny": Shape(128, 256, 64, 2, 4, 2),
}


@dataclass(frozen=True)
class Work:
    """One pass to measure. goal: seconds for the whole model on a card of 80 GB, 0 where none is stated."""

    title: str
    shape: str
    cells: tuple[tuple[Method, int, int], ...]  # method, bits, group size
    inputs: str = "quantized"
    goal: float = 0


GRID = tuple((method, bits, 128) for method in (RTN, GPTQ, AWQ) for bits in (2, 3, 4, 8))
WORKS = (
    Work("RTN w4 g128", "8B", ((RTN, 4, 128),)),
    Work("GPTQ w4 g128", "8B", ((GPTQ, 4, 128),), goal=60),
    Work("HQQ w4 g128", "70B", ((HQQ, 4, 128),), goal=120),
    Work("GPTQ w4 g128", "70B", ((GPTQ, 4, 128),), goal=600),
    Work("AWQ w4 g128", "8B", ((AWQ, 4, 128),)),
    Work("grid of RTN, GPTQ, AWQ × 4 widths", "8B", GRID, inputs="full_precision"),
)


def peak(device: str) -> str:
    if device == "cpu":
        return "not measured"
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"


def measure(work: Work, shape: Shape, arguments: argparse.Namespace) -> tuple[float, str]:
    """Seconds of a pass over the written model, and the card's peak memory. Raises HarnessError where a cell fails."""
    device = arguments.device
    windows = torch.randint(
        0, 256, (arguments.samples, arguments.length), generator=torch.Generator().manual_seed(0)
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, store = Path(scratch) / "model", Path(scratch) / "store"
        write_model(
            folder,
            shape.measured,
            shape.hidden,
            inner=shape.inner,
            head_dim=shape.head_dim,
            kv_heads=shape.kv_heads,
            dtype="bfloat16",
            positions=arguments.length,
            device=device,
        )
        cells: list[Cell] = [
            cell(folder, method, bits, group, inputs=work.inputs, dtype="bfloat16")
            for method, bits, group in work.cells
        ]
        writers = {
            quantize_key(each): CheckpointWriter(store / quantize_key(each), {}) for each in cells
        }
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        began = time.monotonic()
        failed = [
            event.reason
            for event in run_pass(cells, folder, windows, writers, device)
            if isinstance(event, Failed)
        ]
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - began
    if failed:
        raise HarnessError(failed[0])
    return seconds, peak(device)


def passes(arguments: argparse.Namespace, deadline: float) -> Iterator[str]:
    """One line a pass."""
    spent: dict[str, float] = {}  # shape -> the longest pass so far, per cell
    for work in WORKS:
        name = work.shape if arguments.shapes == "models" else arguments.shapes
        shape = SHAPES[name]
        title = f"{name:5} {work.title:36}"
        expected = spent.get(name, 20.0) * max(1, len(work.cells) / 2)
        if time.monotonic() + expected > deadline:
            yield f"{title} not run: about {expected:.0f} s, and the limit of minutes is near"
            continue
        try:
            seconds, memory = measure(work, shape, arguments)
        except (HarnessError, RuntimeError) as error:
            yield f"{title} failed: {str(error).splitlines()[0]}"
            continue
        spent[name] = max(spent.get(name, 0.0), seconds / len(work.cells))
        whole = seconds / shape.measured * shape.blocks
        goal = f"   goal {work.goal:.0f} s" if work.goal and name == work.shape else ""
        yield (
            f"{title} {len(work.cells):2} cells   {shape.measured} blocks {seconds:7.1f} s   "
            f"whole model {whole:7.0f} s   peak {memory}{goal}"
        )


def schemes() -> dict[str, tuple[WeightScheme, ActivationScheme | None]]:
    """By kernel, a scheme that it holds."""
    rows = WeightScheme(bits=8, group_size=-1, symmetric=True)
    int8 = ActivationScheme(bits=8, granularity="token")
    return {
        "int_mm": (rows, int8),
        "scaled_mm": (
            WeightScheme("fp8_e4m3", 8, group_size=-1, symmetric=True, scale_dtype="float32"),
            ActivationScheme(format="fp8_e4m3", bits=8, granularity="token"),
        ),
        "int4pack": (WeightScheme(bits=4, group_size=128, scale_dtype="bfloat16"), None),
        "int8pack": (
            WeightScheme(bits=8, group_size=-1, symmetric=True, scale_dtype="bfloat16"),
            None,
        ),
    }


def rounded(rows: int, columns: int, scheme: WeightScheme, device: str) -> QuantizedWeight:
    """A random matrix, rounded to nearest."""
    generator = torch.Generator(device).manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
    rounding = plugins.build("rounding", "rtn", {})
    held: QuantizedWeight = rounding.round_layer("matrix", weight, None, scheme, generator)
    return held


def timed(work: object, device: str, seconds: float = 0.3) -> float:
    """Seconds of one call: the mean over `seconds` after a warm-up."""
    assert callable(work)
    work()
    sync = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    sync()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            work()
        count += 10
        sync()
    return (time.perf_counter() - began) / count


def products(arguments: argparse.Namespace, deadline: float) -> Iterator[str]:
    """One line a kernel and number of rows."""
    device = arguments.device
    shape = SHAPES["8B" if arguments.shapes == "models" else arguments.shapes]
    for name, (weight_scheme, activation) in schemes().items():
        title = f"{name:10} [{shape.inner} × {shape.hidden}]"
        if time.monotonic() > deadline:
            yield f"{title} not run: the limit of minutes is reached"
            continue
        try:
            held = rounded(shape.inner, shape.hidden, weight_scheme, device)
            why = kernels.reasons(name, held, activation, torch.bfloat16, torch.device(device))
            if why:
                yield f"{title} does not run here: {'; '.join(why)}"
                continue
            kernel = kernels.kernel(name)
            buffers = kernel.prepare(held, torch.device(device))
            dense = held.dequantize().to(torch.bfloat16)
            for rows in (1, 16, 256):
                x = torch.randn(rows, shape.hidden, device=device).to(torch.bfloat16)
                native = timed(lambda: kernel.multiply(x, buffers, activation), device)  # noqa: B023
                plain = timed(lambda: functional.linear(x, dense), device)  # noqa: B023
                yield (
                    f"{title} {rows:4} rows   {native * 1e6:9.1f} µs   {plain / native:5.2f} × bfloat16"
                )
        except (HarnessError, RuntimeError) as error:
            yield f"{title} failed: {str(error).splitlines()[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "")
    parser.add_argument("--shapes", default="models", choices=("models", "tiny"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--samples", type=int, default=0, help="calibration windows (128)")
    parser.add_argument("--length", type=int, default=0, help="tokens of a window (2048)")
    arguments = parser.parse_args()
    if not arguments.device:
        print("no card here: nothing is measured; --device cpu --shapes tiny shows that it works")
        return
    tiny = arguments.shapes == "tiny"
    arguments.samples = arguments.samples or (4 if tiny else 128)
    arguments.length = arguments.length or (64 if tiny else 2048)
    deadline = time.monotonic() + 60 * arguments.minutes
    named = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device)
    print(
        f"{named}, torch {torch.__version__}, CUDA {torch.version.cuda}, {time.strftime('%Y-%m-%d')}; "
        f"{arguments.samples} × {arguments.length} tokens, bfloat16"
    )
    for line in passes(arguments, deadline):
        print(line, flush=True)
    for line in products(arguments, deadline):
        print(line, flush=True)


if __name__ == "__main__":
    main()
