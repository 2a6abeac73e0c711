"""How fast the numerics are, each beside a plain way of doing the same: `python tests/benchmarks/bench_numerics.py [cpu|cuda]`.

    GPTQ, one layer     our rounding against the published loop, one column of updates of the whole matrix at a time
    three linears       q, k, v with one Hessian, at two widths: factored once against factored every time
    AWQ clipping        moments of groups against dot products over 512 tokens
    packing             codes per second in and out, beside copying the same bytes

Every number is the least of several runs after one warm-up; the conditions are printed above the table.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from evidence import (
    FakeEvidence,
    HessianEvidence,
    correlated_inputs,
    generator,
    layer_error,
    random_weight,
)

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.quantization.numerics import grids
from harness.quantization.numerics.packing import pack, unpack

Row = tuple[str, str, str, str]


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The least wall time of `repeats` runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def column_by_column(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """GPTQ as in Algorithm 1 of its paper without lazy updates: every column changes the whole rest of the matrix."""
    h = hessian.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, rounded = weight.clone(), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        if j % group_size == 0:
            grid = grids.fit(w[:, j : j + group_size], bits, False)
        rounded[:, j : j + 1] = grid.nearest(w[:, j : j + 1])
        error = (w[:, j] - rounded[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    return rounded


def dot_products(weight: Tensor, inputs: Tensor, scheme: WeightScheme) -> Tensor:
    """AWQ's clipping bounds from partial dot products over tokens, 64 rows at a time as its authors do."""
    size = scheme.group_size
    x = inputs.reshape(1, -1, weight.shape[1] // size, size)
    bounds = []
    for rows in weight.reshape(weight.shape[0], 1, -1, size).split(64):
        largest = rows.abs().amax(-1, keepdim=True)
        best, lowest = largest.clone(), torch.full_like(largest, torch.inf)
        original = (x * rows).sum(-1)
        for step in range(10):
            bound = largest * (1 - step / 20)
            clipped = rows.clamp(-bound, bound)
            nearest = grids.fit(clipped, int(scheme.bits), False, "awq").nearest(clipped)
            error = ((x * nearest).sum(-1) - original).square().mean(1).view(lowest.shape)
            better = error < lowest
            lowest, best = torch.where(better, error, lowest), torch.where(better, bound, best)
        bounds.append(best)
    return torch.cat(bounds).squeeze(1)


def gptq_rows(device: str) -> Iterable[Row]:
    method = plugins.build("rounding", "gptq", {})
    for width in (512, 1024) if device == "cpu" else (2048, 4096):
        weight, inputs = (
            random_weight(width, width).to(device),
            correlated_inputs(width, sequences=8, length=width // 4).to(device),
        )
        hessian = FakeEvidence(inputs)["hessian"]
        scheme = WeightScheme("int", 4, 128, False, "float32")

        def ours(
            weight: Tensor = weight, hessian: Tensor = hessian, scheme: WeightScheme = scheme
        ) -> Tensor:
            return method.round_layer(
                "mlp.up_proj", weight, HessianEvidence(hessian), scheme, generator()
            ).dequantize()

        def plain(weight: Tensor = weight, hessian: Tensor = hessian) -> Tensor:
            return column_by_column(weight, hessian, 4, 128)

        errors = [layer_error(weight, result(), inputs) for result in (ours, plain)]
        fast, slow = seconds(ours), seconds(plain, 1)
        yield (
            f"GPTQ w4g128, {width} × {width}",
            f"{fast:.3f} s",
            f"{slow:.3f} s, error {errors[0] / errors[1]:.4f} of its",
            f"{slow / fast:.1f}×",
        )


def sharing_row(device: str) -> Row:
    width = 768 if device == "cpu" else 4096
    weight = random_weight(width // 8, width).to(device)
    hessian = FakeEvidence(correlated_inputs(width, sequences=8, length=width // 4).to(device))[
        "hessian"
    ]
    method = plugins.build("rounding", "gptq", {})

    def three_linears(shared: bool) -> None:
        evidence = HessianEvidence(hessian)
        for _ in range(3):
            for bits in (3, 4):
                evidence = evidence if shared else HessianEvidence(hessian)
                method.round_layer(
                    "mlp.up_proj", weight, evidence, WeightScheme("int", bits, 128), generator()
                )

    fast, slow = seconds(lambda: three_linears(True)), seconds(lambda: three_linears(False))
    return (
        f"GPTQ, q k v at 2 widths, {width} inputs",
        f"{fast:.3f} s",
        f"{slow:.3f} s",
        f"{slow / fast:.1f}×",
    )


def clipping_row(device: str) -> Row:
    width = 512 if device == "cpu" else 4096
    weight, inputs = (
        random_weight(width, width).to(device),
        correlated_inputs(width, sequences=8, length=64).to(device),
    )
    scheme = WeightScheme("int", 4, 128, False, "float32")
    method = plugins.build("rounding", "awq", {})
    ours = seconds(
        lambda: method.round_layer("mlp.up_proj", weight, FakeEvidence(inputs), scheme, generator())
    )
    plain = seconds(lambda: dot_products(weight, inputs, scheme), 1)
    return (
        f"AWQ clipping w4g128, {width} × {width}",
        f"{ours:.3f} s",
        f"{plain:.3f} s",
        f"{plain / ours:.1f}×",
    )


def packing_rows(device: str) -> Iterable[Row]:
    count = 2**24 if device == "cpu" else 2**27
    for bits in (2, 3, 4):
        codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, device=device)
        packed = pack(codes, bits)
        copy = seconds(codes.clone)
        for title, work in (
            ("pack", partial(pack, codes, bits)),
            ("unpack", partial(unpack, packed, bits, count)),
        ):
            taken = seconds(work)
            rates = [f"{count / time / 1e6:.0f} M codes/s" for time in (taken, copy)]
            yield f"{title} {bits} bits", rates[0], f"copy {rates[1]}", f"{copy / taken:.2f}×"


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    torch.manual_seed(0)
    card = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(
        f"{device} ({card}), torch {torch.__version__}; least of 3 runs after a warm-up; last column: times faster than plain\n"
    )
    print(f"{'':42}{'ours':>18}{'plain':>36}{'':>10}")
    for rows in (
        gptq_rows(device),
        [sharing_row(device)],
        [clipping_row(device)],
        packing_rows(device),
    ):
        for title, ours, plain, ratio in rows:
            print(f"{title:42}{ours:>18}{plain:>36}{ratio:>10}", flush=True)


if __name__ == "__main__":
    main()
