"""How fast the numerics are, each beside a plain way of doing the same: `python tests/benchmarks/bench_numerics.py [cpu|cuda]`.

    GPTQ, one layer     our rounding from the Hessian on, against the published algorithm with its blocks of 128 columns
    three linears       q, k, v with one Hessian, at two widths: factored once against factored every time
    AWQ, one block      scales and clipping against the published search, all exponents on all sequences
    AWQ clipping        moments of groups against dot products over 512 tokens
    packing             codes per second in and out, beside copying the same bytes

Every number is the median of several runs after one warm-up, the two sides in turn, in seconds of CPU time of one thread (on a card
of wall time); the conditions are printed above the table.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from evidence import (
    FakeBlock,
    FakeEvidence,
    HessianEvidence,
    correlated_inputs,
    generator,
    random_weight,
)

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import ScalePair
from harness.quantization.numerics import grids
from harness.quantization.numerics.hessians import factored
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import QuantizedWeight

Row = tuple[str, str, str, str]


def seconds(*works: Callable[[], object], repeats: int = 3) -> list[float]:
    """Median CPU times of `repeats` runs of each, in turn, after one that warms up; wall times where there is a card."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, taken in zip(works, times, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = clock()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(clock() - start)
    return [statistics.median(taken[1:]) for taken in times]


class PublishedGrid:
    """An asymmetric grid per row, as the published code fits and applies it."""

    def __init__(self, values: Tensor, bits: int) -> None:
        self.top = 2**bits - 1
        zeros = torch.zeros(values.shape[0], device=values.device)
        lo, hi = (
            torch.minimum(values.min(1).values, zeros),
            torch.maximum(values.max(1).values, zeros),
        )
        empty = (lo == 0) & (hi == 0)
        lo[empty], hi[empty] = -1, 1
        self.scale = ((hi - lo) / self.top).unsqueeze(1)
        self.zero = torch.round(-lo.unsqueeze(1) / self.scale)

    def nearest(self, values: Tensor) -> Tensor:
        """values [out, columns] on the grid."""
        codes = torch.clamp(torch.round(values / self.scale) + self.zero, 0, self.top)
        return self.scale * (codes - self.zero)


def published_gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, block_size: int = 128
) -> Tensor:
    """GPTQ as its authors run it: inverse and factor, then blocks whose columns are rounded one by one, losses kept."""
    w, h = weight.clone(), hessian.clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    rounded, losses = torch.zeros_like(w), torch.zeros_like(w)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, local = w[:, start:end].clone(), upper[start:end, start:end]
        block_rounded, errors, block_losses = (torch.zeros_like(block) for _ in range(3))
        for i in range(end - start):
            column, diagonal = block[:, i], local[i, i]
            if (start + i) % group_size == 0:
                grid = PublishedGrid(w[:, start + i : start + i + group_size], bits)
            values = grid.nearest(column.unsqueeze(1)).flatten()
            block_rounded[:, i] = values
            block_losses[:, i] = (column - values) ** 2 / diagonal**2
            error = (column - values) / diagonal
            block[:, i:] -= error.unsqueeze(1).matmul(local[i, i:].unsqueeze(0))
            errors[:, i] = error
        rounded[:, start:end], losses[:, start:end] = block_rounded, block_losses / 2
        w[:, end:] -= errors.matmul(upper[start:end, end:])
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
    for width in (512, 1024, 2048) if device == "cpu" else (2048, 4096):
        weight, inputs = (
            random_weight(width, width).to(device),
            correlated_inputs(width, sequences=8, length=width // 4).to(device),
        )
        hessian = FakeEvidence(inputs)["hessian"]
        scheme = WeightScheme("int", 4, 128, False, "float32")

        def ours(
            weight: Tensor = weight, hessian: Tensor = hessian, scheme: WeightScheme = scheme
        ) -> QuantizedWeight:
            return method.round_layer(
                "mlp.up_proj", weight, HessianEvidence(hessian), scheme, generator()
            )

        def plain(weight: Tensor = weight, hessian: Tensor = hessian) -> Tensor:
            return published_gptq(weight, hessian, 4, 128)

        equal = float((ours().dequantize() == plain()).float().mean())
        fast, slow, factor = seconds(ours, plain, partial(factored, hessian, 0.01))
        yield (
            f"GPTQ w4g128, {width} × {width}",
            f"{fast:.3f} s",
            f"{slow:.3f} s, {100 * equal:.3f} % equal codes",
            f"{slow / fast:.1f}×",
        )
        yield (
            "… without the factor, which both need",
            f"{fast - factor:.3f} s",
            f"{slow - factor:.3f} s",
            f"{(slow - factor) / (fast - factor):.1f}×",
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

    fast, slow = seconds(lambda: three_linears(True), lambda: three_linears(False))
    return (
        f"GPTQ, q k v at 2 widths, {width} inputs",
        f"{fast:.3f} s",
        f"{slow:.3f} s",
        f"{slow / fast:.1f}×",
    )


def published_awq(block: FakeBlock, scheme: WeightScheme) -> dict[str, float]:
    """The exponents that AWQ's published search finds, by pair, after which it clips every linear but queries and keys.

    Twenty forwards of what is compared over all sequences: the region, or the one linear that reads the scaled channels.
    """
    size, found = scheme.group_size, {}
    for pair in block.shapes.pairs:
        weights = {name: block.linear(name).weight.detach() for name in pair.consumers}
        evidence = block.evidence[pair.consumers[0]]

        def outputs(
            named: dict[str, Tensor], pair: ScalePair = pair, inputs: Tensor = evidence["inputs"]
        ) -> Iterable[Tensor]:
            for index in range(len(block.inputs())):
                if pair.region:
                    full = {f"{name}.weight": weight for name, weight in named.items()}
                    yield block.run_region(pair.region, index, full)
                else:
                    yield inputs[index] @ named[pair.consumers[0]].T

        originals = list(outputs(weights))
        losses = []
        for step in range(20):
            scales = evidence["abs_mean"].pow(step / 20).clamp(min=1e-4)
            scales = scales / (scales.max() * scales.min()).sqrt()
            named = {}
            for name, weight in weights.items():
                grouped = (weight * scales).reshape(weight.shape[0], -1, size)
                nearest = grids.fit(grouped, int(scheme.bits), False, "awq").nearest(grouped)
                named[name] = nearest.reshape(weight.shape) / scales
            pairs = zip(outputs(named), originals, strict=True)
            losses.append(sum(float((a - b).square().mean()) for a, b in pairs))
        found[f"{pair.producer} → {', '.join(pair.consumers)}"] = losses.index(min(losses)) / 20
    for linear in block.shapes.linears:
        if not any(part in linear.name for part in ("q_proj", "k_proj")):
            inputs = block.evidence[linear.name]["inputs"].flatten(0, 1)
            few = inputs[:: max(1, inputs.shape[0] // 512)]
            dot_products(block.linear(linear.name).weight.detach(), few, scheme)
    return found


@torch.no_grad()
def awq_row() -> Row:
    """One block of a 3 M model at 16 × 256 tokens; both sides are given the statistics of its inputs."""
    scheme = WeightScheme("int", 4, 64, False, "float32")
    transform, rounding = (
        plugins.build("transform", "awq", {}),
        plugins.build("rounding", "awq", {}),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):
        blocks = [FakeBlock(256, 704, 4, 4, sequences=16, length=256) for _ in range(2)]
        for block in blocks:
            for evidence in block.evidence.values():
                for statistic in ("abs_mean", "hessian", "inputs"):
                    evidence[statistic]
        start = time.process_time()
        published = published_awq(blocks[0], scheme)
        times[1].append(time.process_time() - start)
        start = time.process_time()
        notes = transform.rewrite_block(blocks[1], Scheme("w4g64", scheme), generator())["scales"]
        for linear in blocks[1].shapes.linears:
            weight = blocks[1].linear(linear.name).weight.detach()
            rounding.round_layer(
                linear.name, weight, blocks[1].evidence[linear.name], scheme, generator()
            )
        times[0].append(time.process_time() - start)
    same = sum(notes[title]["exponent"] == exponent for title, exponent in published.items())
    ours, plain = (statistics.median(each) for each in times)
    return (
        "AWQ w4g64, one block of width 256",
        f"{ours:.2f} s",
        f"{plain:.2f} s, {same} of {len(published)} exponents the same",
        f"{plain / ours:.1f}×",
    )


def clipping_row(device: str) -> Row:
    width = 512 if device == "cpu" else 4096
    weight, inputs = (
        random_weight(width, width).to(device),
        correlated_inputs(width, sequences=8, length=64).to(device),
    )
    scheme = WeightScheme("int", 4, 128, False, "float32")
    method = plugins.build("rounding", "awq", {})
    ours, plain = seconds(
        lambda: method.round_layer(
            "mlp.up_proj", weight, FakeEvidence(inputs), scheme, generator()
        ),
        lambda: dot_products(weight, inputs, scheme),
    )
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
        packing, unpacking, copy = seconds(
            partial(pack, codes, bits), partial(unpack, packed, bits, count), codes.clone
        )
        for title, taken in (("pack", packing), ("unpack", unpacking)):
            rates = [f"{count / time / 1e6:.0f} M codes/s" for time in (taken, copy)]
            yield f"{title} {bits} bits", rates[0], f"copy {rates[1]}", f"{copy / taken:.2f}×"


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    card = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(
        f"{device} ({card}), torch {torch.__version__}; medians of 3 runs after a warm-up, in turn; "
        "last column: times faster than plain\n"
    )
    print(f"{'':42}{'ours':>18}{'plain':>36}{'':>10}")
    for rows in (
        gptq_rows(device),
        [sharing_row(device)],
        [awq_row()] if device == "cpu" else [],
        [clipping_row(device)],
        packing_rows(device),
    ):
        for title, ours, plain, ratio in rows:
            print(f"{title:42}{ours:>18}{plain:>36}{ratio:>10}", flush=True)


if __name__ == "__main__":
    main()
