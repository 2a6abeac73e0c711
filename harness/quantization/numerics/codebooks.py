"""Codebooks: fixed tables, tables learned per row by one-dimensional k-means, and vector codebooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor

from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.sparse import Outliers
from harness.quantization.numerics.weights import QuantizedWeight

# ---- vectors ---------------------------------------------------------------------------------------------------------

PRODUCTS = 2**26  # distances held at a time


def nearest_vectors(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index [n] int64 of the nearest entry of codebook [k, v] for each of vectors [n, v]. Memory: PRODUCTS distances."""
    norms = codebook.square().sum(1)
    rows = max(1, PRODUCTS // codebook.shape[0])
    return torch.cat(
        [torch.addmm(norms, part, codebook.T, alpha=-2).argmin(1) for part in vectors.split(rows)]
    )


def cluster_vectors(
    vectors: Tensor,
    weights: Tensor,
    k: int,
    rng: Generator,
    *,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> Tensor:
    """k centroids [k, v] of weighted k-means (Lloyd), started from k of the vectors drawn by rng.

    vectors [n, v], n >= k; weights [n], not negative. Stops when the centroids move, in total, by less than tolerance times the
    mean variance of a coordinate. A cluster that loses its members keeps its centroid. Sums run in one order on every device.
    Time: n · k · v multiply-adds per iteration.
    """
    start = torch.randperm(vectors.shape[0], generator=rng, device=rng.device)[:k].to(
        vectors.device
    )
    centroids = vectors[start].clone()
    enough = tolerance * float(vectors.var(0, unbiased=False).mean())
    weighted = torch.cat((vectors * weights.unsqueeze(1), weights.unsqueeze(1)), dim=1)
    for _ in range(iterations):
        labels = nearest_vectors(vectors, centroids)
        order = torch.argsort(labels, stable=True)
        members = torch.bincount(labels, minlength=k)
        # segment sums instead of scattered additions, whose order changes from run to run on a GPU
        sums = torch.segment_reduce(weighted[order], "sum", lengths=members, axis=0)
        total = sums[:, -1:]
        moved = torch.where(
            total > 0, sums[:, :-1] / total.clamp(min=torch.finfo(total.dtype).tiny), centroids
        )
        shift = float((moved - centroids).square().sum())
        centroids = moved
        if shift <= enough:
            break
    return centroids


# ---- one table per row -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookupWeight(QuantizedWeight):
    """table[row, code], with outliers on top.

    codes  [out, in] uint8, 0 … 2^bits - 1
    table  [out, 2^bits] float32, exact in scale_dtype
    """

    kind = "lookup"
    codes: Tensor
    table: Tensor
    bits: int
    scale_dtype: str = "float16"
    outliers: Outliers | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        values = self.table.gather(1, self.codes.long())
        return values if self.outliers is None else self.outliers.put_into(values)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "codes": pack(self.codes, self.bits),
            "table": self.table.to(SCALE_DTYPES[self.scale_dtype]).contiguous(),
        }
        meta: dict[str, Any] = {
            "shape": list(self.shape),
            "bits": self.bits,
            "scale_dtype": self.scale_dtype,
        }
        if self.outliers is not None:
            outliers, meta["outliers"] = self.outliers.pack()
            tensors |= {f"outlier_{name}": tensor for name, tensor in outliers.items()}
        return tensors, meta

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        codes = unpack(tensors["codes"], meta["bits"], rows * columns).reshape(rows, columns)
        outliers = None
        if "outliers" in meta:
            kept = {
                name.removeprefix("outlier_"): tensor
                for name, tensor in tensors.items()
                if name.startswith("outlier_")
            }
            outliers = Outliers.unpack(kept, meta["outliers"])
        return cls(codes, tensors["table"].float(), meta["bits"], meta["scale_dtype"], outliers)


@dataclass(frozen=True)
class NestedWeight(QuantizedWeight):
    """Tables per row of several widths, each splitting the entries of the one before: `LookupWeight`s stored once.

    codes   [out, in] uint8 of the largest width; the first b bits of a code are the code at b bits
    tables  by width in bits, ascending: [out, 2^bits] float32, exact in scale_dtype
    Dequantized as a whole it is the matrix at the largest width.
    """

    kind = "nested"
    codes: Tensor
    tables: dict[int, Tensor]
    scale_dtype: str = "float16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.tables)

    def at(self, bits: float) -> LookupWeight:
        """The matrix at a width. Raises KeyError for one that is not stored."""
        width = int(bits)
        codes = self.codes >> (self.widths[-1] - width)
        return LookupWeight(codes, self.tables[width], width, self.scale_dtype)

    def dequantize(self) -> Tensor:
        return self.at(self.widths[-1]).dequantize()

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        target = SCALE_DTYPES[self.scale_dtype]
        tensors = {"codes": pack(self.codes, self.widths[-1])}
        for bits, table in self.tables.items():
            tensors[f"table_{bits}"] = table.to(target).contiguous()
        return tensors, {
            "shape": list(self.shape),
            "widths": list(self.widths),
            "scale_dtype": self.scale_dtype,
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        codes = unpack(tensors["codes"], meta["widths"][-1], rows * columns).reshape(rows, columns)
        tables = {bits: tensors[f"table_{bits}"].float() for bits in meta["widths"]}
        return cls(codes, tables, meta["scale_dtype"])


@dataclass(frozen=True)
class SortedRows:
    """Rows in ascending order with prefix sums, so that the weighted mean of any run costs two look-ups.

    order    [rows, n] int64: place in the row of the k-th smallest value
    values   [rows, n] float64, ascending
    weight, weighted, plain, positive   [rows, n + 1] float64: sums over the first k values of the weights, of weight · value, of
             the values, and of the number of positive weights
    """

    order: Tensor
    values: Tensor
    weight: Tensor
    weighted: Tensor
    plain: Tensor
    positive: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Self:
        """values, weights [rows, n]; a row whose weights are all zero counts every value once. Works on the CPU, where the order of
        prefix sums, and so the result, is always the same."""
        values, order = values.cpu().double().sort(dim=1, stable=True)
        weights = weights.cpu().double().gather(1, order)
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)

        def prefix(terms: Tensor) -> Tensor:
            return torch.nn.functional.pad(terms.cumsum(1), (1, 0))

        return cls(
            order,
            values,
            prefix(weights),
            prefix(weights * values),
            prefix(values),
            prefix((weights > 0).double()),
        )

    def mean(self, start: Tensor, end: Tensor) -> Tensor:
        """Weighted means of values start … end - 1 [rows, runs]; the plain mean where all weights are zero; NaN for empty runs."""
        weight = self._between(self.weight, start, end)
        weighted = self._between(self.weighted, start, end) / weight
        return torch.where(
            weight > 0, weighted, self._between(self.plain, start, end) / (end - start)
        )

    def total(self, start: Tensor, end: Tensor) -> Tensor:
        """Sum of the weights of each run."""
        return self._between(self.weight, start, end)

    def positives(self, start: Tensor, end: Tensor) -> Tensor:
        """Number of positive weights of each run."""
        return self._between(self.positive, start, end)

    @staticmethod
    def _between(sums: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return sums.gather(1, end) - sums.gather(1, start)

    def codes(self, borders: Tensor) -> Tensor:
        """Codes [rows, n] uint8, in the original order, of clusters borders[k] … borders[k + 1] - 1; borders [rows, k + 1]."""
        places = torch.arange(self.values.shape[1]).expand(self.values.shape[0], -1).contiguous()
        found = torch.searchsorted(borders[:, 1:-1].contiguous(), places, right=True).to(
            torch.uint8
        )
        return torch.empty_like(found).scatter_(1, self.order, found)


def cluster_rows(
    rows: SortedRows, k: int, rng: Generator, *, iterations: int = 50
) -> tuple[Tensor, Tensor]:
    """Weighted k-means of each row on its own: tables [rows, k] float64, ascending, and borders [rows, k + 1] in the sorted row.

    Greedy k-means++ (2 + log k candidates per centre), then Lloyd's steps until no border moves. Empty clusters keep their centre.
    """
    table = _spread_centres(rows, k, rng)
    count, n = rows.values.shape
    edge = torch.zeros(count, 1, dtype=torch.int64)

    def borders_of(table: Tensor) -> Tensor:
        inner = torch.searchsorted(rows.values, (table[:, :-1] + table[:, 1:]) / 2, right=True)
        return torch.cat((edge, inner, edge + n), dim=1)

    borders = borders_of(table)
    for _ in range(iterations):
        start, end = borders[:, :-1], borders[:, 1:]
        table = (
            torch.where(rows.total(start, end) > 0, rows.mean(start, end), table).sort(dim=1).values
        )
        moved = borders_of(table)
        if torch.equal(moved, borders):
            break
        borders = moved
    return table, borders


NUMBERS = 2**24  # weights whose prefix sums are held at a time


@dataclass(frozen=True)
class NestedTables:
    """Tables per row of growing width, each splitting the clusters of the one before.

    codes   [out, in] uint8 of the last width; the first b bits of a code are the code at b bits
    tables  by width in bits: [out, 2^bits] float32
    """

    codes: Tensor
    tables: dict[int, Tensor]

    def served(self, bits: int, scale_dtype: str, outliers: Outliers | None = None) -> LookupWeight:
        """The matrix at one of the widths."""
        codes = self.codes >> (max(self.tables) - bits)
        return LookupWeight(
            codes, as_stored(self.tables[bits], scale_dtype), bits, scale_dtype, outliers
        )

    def stored(self, bits: int, scale_dtype: str) -> NestedWeight:
        """All widths up to `bits` in one layout."""
        tables = {
            width: as_stored(table, scale_dtype)
            for width, table in self.tables.items()
            if width <= bits
        }
        return NestedWeight(self.codes >> (max(self.tables) - bits), tables, scale_dtype)


def nested_tables(
    weight: Tensor, importance: Tensor, widths: range, rng: Generator, *, iterations: int
) -> NestedTables:
    """Weighted k-means of each row of weight [out, in] at the first of the widths, split again and again up to the last.

    importance: [out, in], not negative; a row of zeros counts every weight once. Some 2^24 · 60 bytes on the CPU, where the sorting
    is done.
    """
    codes: list[Tensor] = []
    tables: dict[int, list[Tensor]] = {bits: [] for bits in widths}
    at_a_time = max(1, NUMBERS // weight.shape[1])
    for values, weights in zip(weight.split(at_a_time), importance.split(at_a_time), strict=True):
        rows = SortedRows.of(values, weights)
        table, borders = cluster_rows(rows, 2 ** widths[0], rng, iterations=iterations)
        for bits in widths:
            if bits > widths[0]:
                table, borders = split_clusters(rows, table, borders)
            tables[bits].append(table.float())
        codes.append(rows.codes(borders))
    return NestedTables(
        torch.cat(codes).to(weight.device),
        {bits: torch.cat(parts).to(weight.device) for bits, parts in tables.items()},
    )


def _spread_centres(rows: SortedRows, k: int, rng: Generator) -> Tensor:
    """k-means++ starts, [rows, k] ascending: each centre the best of a few candidates drawn by weight · squared distance."""
    trials = 2 + int(torch.log(torch.tensor(float(k))))
    weights = rows.weight.diff(dim=1)
    count, n = weights.shape

    def draw(mass: Tensor, candidates: int) -> Tensor:
        share = torch.rand(
            count, candidates, generator=rng, device=rng.device, dtype=torch.float64
        ).cpu()
        sums = mass.cumsum(1)
        return rows.values.gather(
            1, torch.searchsorted(sums, share * sums[:, -1:], right=True).clamp_(max=n - 1)
        )

    centres = [draw(weights, 1)]
    distance = (rows.values - centres[0]).square()
    for _ in range(1, k):
        candidates = draw(weights * distance, trials)
        best, potential = candidates[:, :1], torch.full((count, 1), torch.inf, dtype=torch.float64)
        closest = distance
        for candidate in candidates.split(1, dim=1):
            trial = torch.minimum(distance, (rows.values - candidate).square())
            cost = (weights * trial).sum(1, keepdim=True)
            better = cost < potential
            best, potential = (
                torch.where(better, candidate, best),
                torch.where(better, cost, potential),
            )
            closest = torch.where(better, trial, closest)
        centres.append(best)
        distance = closest
    return torch.cat(centres, dim=1).sort(dim=1).values


def split_clusters(rows: SortedRows, table: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """Every cluster divided in two: tables [rows, 2 k] and borders [rows, 2 k + 1], so that code c becomes 2 c or 2 c + 1.

    The border of two means is found by bisection: values left of it are at most the middle of the two means, values right of it at
    least that. An empty cluster gives its centre twice, one value itself twice; a cluster with one positive weight stays whole on
    the left, at that value; one with none is divided by plain means.
    """
    start, end = borders[:, :-1], borders[:, 1:]
    size, last = end - start, rows.values.shape[1] - 1
    only = (rows.positives(start, end) == 1) & (size > 2)
    unweighted = rows.total(start, end) <= 0

    floor, ceiling = start + 1, end - 1
    open_ = (size > 2) & ~only
    while bool(((floor < ceiling) & open_).any()):
        middle = torch.where(open_, (floor + ceiling) // 2, start)
        no_left, no_right = (rows.total(a, b) <= 0 for a, b in ((start, middle), (middle, end)))
        centre = (rows.mean(start, middle) + rows.mean(middle, end)) / 2
        below = rows.values.gather(1, (middle - 1).clamp(0, last)) <= centre
        above = centre <= rows.values.gather(1, middle.clamp(0, last))
        active = open_ & (floor < ceiling)
        up = active & torch.where(
            unweighted, below & ~above, no_left | (~no_right & below & ~above)
        )
        down = active & ~up & torch.where(unweighted, ~below, no_right | ~below)
        found = active & ~up & ~down
        floor = torch.where(up, middle + 1, torch.where(found, middle, floor))
        ceiling = torch.where(down, middle - 1, torch.where(found, middle, ceiling))
    border = torch.where(open_, (floor + ceiling) // 2, torch.where(size > 0, start + 1, start))
    border = torch.where(only, end, border)

    left = torch.where(border > start, rows.mean(start, border), table)
    right = torch.where(end > border, rows.mean(border, end), left)
    whole = rows.mean(start, end)  # the one positive weight's value
    left, right = torch.where(only, whole, left), torch.where(only, whole, right)
    new_table = torch.stack((left, right), dim=2).flatten(1)
    new_borders = torch.cat(
        (torch.stack((start, border), dim=2).flatten(1), borders[:, -1:]), dim=1
    )
    return new_table, new_borders
