"""VPTQ: runs of weights along the output share an index into a learned codebook, assigned column by column with error feedback.

VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models (arXiv 2409.17066), algorithms 1 and 2.
Objective: min ||W X - W' X||² over codebook indices. A vector is `vector_length` consecutive outputs of one input column. With H
scaled to mean diagonal 1, plus 0.01 I, columns in descending order of its diagonal and U from its damped inverse:

    codebook     k-means of all vectors, weighted by H_jj (eq. 8)
    assignment   nearest centroid of each vector of the column, then GPTQ's update (eq. 6)
    residual     k-means of what the assignment left over; then all columns again: nearest centroid plus nearest residual centroid

Bits follow from the sizes: (index bits + residual index bits) / vector_length. Here scheme.weight.bits gives them: bits times
vector_length index bits, up to `index_bits` of them for the codebook, the rest for the residual one. So 2, 3 and 4 bits with
vectors of 8 are the paper's codebook of 65536 with none, 256 and 65536 residuals; 1.5 is 4096; 2.33 with vectors of 12 is 65536
and 4096.
With outlier_share, that share of the columns, those with the largest H_jj, has one codebook of its own, of outlier_index_bits for
vectors of outlier_vector_length; the other columns have what is described above.
Codebooks, column scales and offsets are counted by `bits_per_weight`; `nominal_bits` is what papers quote.

As in the authors' released code (branch "algorithm"): normalisation per input column to 0 … 1, dead columns zeroed after it, zero
padding of the last vector takes part in the clustering. Where we differ: k-means is ours, seeded by the cell (cuML's has no
reproducible result on a GPU); the residual k-means has one weight per vector, H_jj, as the first (there it gets the unreduced
matrix); codebook, scales and offsets are rounded to scale_dtype before they are used; indices are stored in the columns' own
order, so no permutation is; outlier columns are those with the largest H_jj also without act_order (there: the first columns).
Several codebooks per matrix are not offered; the paper's fine-tuning is not in the released code and not here. Published Hessians
are of the full-precision model: inputs=full_precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics.codebooks import cluster_vectors, nearest_vectors
from harness.quantization.numerics.error_feedback import Columns, feed_forward
from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored
from harness.quantization.numerics.hessians import damped, inverse_factor
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import QuantizedWeight

RELATIVE_DAMPING = 0.01  # added to H scaled to mean diagonal 1, before the damping of its inverse


@dataclass(frozen=True)
class Codebook:
    """entries [k, v] float32, k a power of two; indices [vectors per column, in] int64."""

    entries: Tensor
    indices: Tensor

    @property
    def bits(self) -> int:
        return (self.entries.shape[0] - 1).bit_length()

    def read(self) -> Tensor:
        """[vectors per column · v, in]"""
        return self.entries[self.indices].transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class VectorWeight(QuantizedWeight):
    """codebook (+ residual codebook), times a scale and plus an offset per input column.

    codebooks      of all columns but outliers, in their order
    scale, offset  [in] float32, exact in scale_dtype; None without normalisation
    outliers       the codebook of outlier columns, and which columns they are, [n] int64 ascending; None where there are none
    """

    kind = "vector"
    codebooks: tuple[Codebook, ...]
    rows: int
    scale: Tensor | None
    offset: Tensor | None
    scale_dtype: str = "float16"
    outliers: tuple[Codebook, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        columns = self.codebooks[0].indices.shape[1]
        return self.rows, columns + (len(self.outliers[1]) if self.outliers is not None else 0)

    @property
    def nominal_bits(self) -> float:
        """As papers count: index bits over vector length, of all columns but outliers."""
        return sum(book.bits for book in self.codebooks) / self.codebooks[0].entries.shape[1]

    def dequantize(self) -> Tensor:
        values = sum((book.read() for book in self.codebooks[1:]), self.codebooks[0].read())[
            : self.rows
        ]
        if self.outliers is not None:
            book, places = self.outliers
            merged = values.new_empty(self.shape)
            merged[:, places] = book.read()[: self.rows]
            merged[:, _others(places, self.shape[1])] = values
            values = merged
        return (
            values
            if self.scale is None or self.offset is None
            else values * self.scale + self.offset
        )

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        target = SCALE_DTYPES[self.scale_dtype]
        tensors: dict[str, Tensor] = {}
        for number, book in enumerate(self.codebooks):
            tensors[f"entries_{number}"] = book.entries.to(target).contiguous()
            tensors[f"indices_{number}"] = pack(book.indices, book.bits)
        if self.outliers is not None:
            book, places = self.outliers
            tensors |= {
                "outlier_entries": book.entries.to(target).contiguous(),
                "outlier_indices": pack(book.indices, book.bits),
                "outlier_columns": places.to(torch.int32),
            }
        if self.scale is not None and self.offset is not None:
            tensors |= {
                "scale": self.scale.to(target).contiguous(),
                "offset": self.offset.to(target).contiguous(),
            }
        return tensors, {
            "shape": list(self.shape),
            "codebooks": len(self.codebooks),
            "scale_dtype": self.scale_dtype,
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]

        def book(stored: Tensor, packed: Tensor, columns: int) -> Codebook:
            entries = stored.float()
            bits, per_column = (entries.shape[0] - 1).bit_length(), -(-rows // entries.shape[1])
            indices = unpack(packed, bits, per_column * columns).long()
            return Codebook(entries, indices.reshape(per_column, columns))

        outliers = None
        if "outlier_columns" in tensors:
            places = tensors["outlier_columns"].long()
            own = book(tensors["outlier_entries"], tensors["outlier_indices"], len(places))
            outliers, columns = (own, places), columns - len(places)
        books = [
            book(tensors[f"entries_{number}"], tensors[f"indices_{number}"], columns)
            for number in range(meta["codebooks"])
        ]
        scale, offset = (
            tensors[name].float() if name in tensors else None for name in ("scale", "offset")
        )
        return cls(tuple(books), rows, scale, offset, meta["scale_dtype"], outliers)


def _others(places: Tensor, columns: int) -> Tensor:
    """The columns that are not in places, ascending."""
    mask = torch.ones(columns, dtype=torch.bool, device=places.device)
    mask[places] = False
    return mask.nonzero()[:, 0]


@dataclass(frozen=True)
class OutlierColumns:
    """Columns with a codebook of their own while a matrix is rounded, in the order of rounding.

    entries  [k, v] float32   mask  [in] bool   indices  [out / v, in] int64, written
    """

    entries: Tensor
    mask: list[bool]
    indices: Tensor


class Rounding:
    """Vector quantization with second-order error feedback."""

    version = 1
    needs = ("hessian",)
    stochastic = True
    activation_aware = False
    reordered_groups: ClassVar[dict[str, bool]] = {"act_order": True}
    sequential = False
    settings_added_later: ClassVar[dict[str, float]] = {
        "outlier_share": 0.0,
        "outlier_vector_length": 4,
        "outlier_index_bits": 12,
    }

    @dataclass(frozen=True)
    class Settings:
        """
        vector_length     consecutive outputs that share an index
        index_bits        of the codebook at most; what the scheme's bits ask beyond goes to a residual codebook
        normalize         each input column to 0 … 1 over the outputs
        act_order         columns with the largest diagonal of H first
        iterations        of k-means, at most
        tolerance         of k-means: movement of the centroids, relative to the variance, below which it stops
        damping_fraction  of the mean diagonal, added to the diagonal of H
        block_size        columns between two products; changes the order of float sums only
        outlier_share     of the columns, those with the largest diagonal of H, that have a codebook of their own; 0: none do
        outlier_vector_length, outlier_index_bits  of that codebook
        """

        vector_length: int = 8
        index_bits: int = 16
        normalize: bool = True
        act_order: bool = True
        iterations: int = 100
        tolerance: float = 1e-5
        damping_fraction: float = 0.01
        block_size: int = 128
        outlier_share: float = 0.0
        outlier_vector_length: int = 4
        outlier_index_bits: int = 12

        def __post_init__(self) -> None:
            if not 0 <= self.outlier_share < 1:
                raise ValueError(f"outlier_share is {self.outlier_share}; it must be 0 to below 1")
            if self.outlier_vector_length < 1 or not 1 <= self.outlier_index_bits <= 16:
                raise ValueError(
                    f"outlier_vector_length={self.outlier_vector_length} must be at least 1, and "
                    f"outlier_index_bits={self.outlier_index_bits} 1 to 16"
                )
            if self.vector_length < 1 or self.iterations < 1 or self.block_size < 1:
                sizes = f"vector_length={self.vector_length}, iterations={self.iterations}, block_size={self.block_size}"
                raise ValueError(f"{sizes}; all are at least 1")
            if not 1 <= self.index_bits <= 16:
                raise ValueError(f"index_bits is {self.index_bits}; it must be 1 to 16")
            if not self.damping_fraction > 0:
                raise ValueError(f"damping_fraction is {self.damping_fraction}; it must be above 0")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def _outliers(self, columns: int) -> int:
        """How many of a matrix's columns are outliers."""
        return int(self.settings.outlier_share * columns)

    def index_bits(self, bits: float) -> tuple[int, int]:
        """Index bits of the codebook and of the residual codebook (0: none) for this many bits per weight."""
        total = round(bits * self.settings.vector_length)
        first = min(total, self.settings.index_bits)
        return first, total - first

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Whole index bits for one or two codebooks, each matrix with at least as many vectors as its codebook has entries."""
        length, most = self.settings.vector_length, self.settings.index_bits

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            if weight.format != "int":
                yield f'format "{weight.format}" is not codebook indices; use scheme.weight.format=int'
            if weight.group_size != -1:
                yield f"VPTQ has one codebook per matrix; use group_size=-1 instead of {weight.group_size}"
            if weight.scale_dtype not in SCALE_DTYPES:
                yield f'no scale_dtype "{weight.scale_dtype}"; known: {", ".join(SCALE_DTYPES)}'
            first, residual = self.index_bits(weight.bits)
            outliers, own = self._outliers(linear.in_features), self.settings
            if abs(weight.bits * length - first - residual) > 0.1 or first < 1:
                yield f"{weight.bits:g} bits times vectors of {length} are no whole number of index bits"
            elif residual > most:
                yield (
                    f"{weight.bits:g} bits need {first + residual} index bits for vectors of {length}, two codebooks hold "
                    f"{2 * most}; use fewer bits, shorter vectors or larger index_bits"
                )
            elif 2 ** max(first, residual) > -(-linear.out_features // length) * (
                linear.in_features - outliers
            ):
                yield (
                    f"a codebook of {2 ** max(first, residual)} entries is more than the matrix has vectors of {length}; "
                    "for small models use shorter vectors and fewer index_bits (vector_length=4, index_bits=6)"
                )
            vectors = -(-linear.out_features // own.outlier_vector_length) * outliers
            if own.outlier_share and not outliers:
                yield f"an outlier_share of {own.outlier_share:g} is not one column; use a larger one, or 0"
            elif outliers and 2**own.outlier_index_bits > vectors:
                yield (
                    f"an outlier codebook of {2**own.outlier_index_bits} entries is more than the outlier columns have vectors "
                    f"of {own.outlier_vector_length}; use a larger outlier_share or fewer outlier_index_bits"
                )

        return refusals(scheme, shapes, reasons)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: five copies of weight, four [in, in], 2^26 distances."""
        assert evidence is not None, "vptq needs the Hessian"
        require_finite(weight)
        settings, dtype = self.settings, scheme.scale_dtype
        prepared = evidence.once(
            ("vptq", settings.damping_fraction, settings.act_order),
            lambda: prepare(evidence["hessian"], settings.damping_fraction, settings.act_order),
        )
        rows = weight.shape[0]
        scale = offset = None
        if settings.normalize:
            offset = as_stored(weight.amin(0), dtype)
            scale = as_stored(weight.amax(0) - offset, dtype)
            scale = torch.where(scale > 0, scale, 1.0)
            weight = (weight - offset) / scale
        weight = weight.masked_fill(prepared.dead, 0)[:, prepared.order]
        importance = prepared.importance[prepared.order]
        places = torch.argsort(prepared.importance, descending=True, stable=True)
        places = places[: self._outliers(weight.shape[1])].sort().values
        is_outlier = torch.isin(prepared.order, places)
        length, outlier_length = settings.vector_length, settings.outlier_vector_length
        multiple = math.lcm(length, outlier_length) if len(places) else length
        weight = torch.nn.functional.pad(weight, (0, 0, 0, -rows % multiple))
        outliers: OutlierColumns | None = None
        if len(places):
            vectors, weights = weight[:, is_outlier], importance[is_outlier]
            k = 2**settings.outlier_index_bits
            entries = self._learn(vectors, rows, weights, k, rng, outlier_length)
            shape = (weight.shape[0] // outlier_length, weight.shape[1])
            own = torch.zeros(shape, dtype=torch.int64, device=weight.device)
            outliers = OutlierColumns(as_stored(entries, dtype), is_outlier.tolist(), own)

        books: list[Tensor] = []
        left = weight
        for bits in self.index_bits(scheme.bits):
            if bits:
                vectors, weights = left[:, ~is_outlier], importance[~is_outlier]
                entries = self._learn(vectors, rows, weights, 2**bits, rng, length)
                books.append(as_stored(entries, dtype))
                indices, left = assign(
                    weight, prepared.upper, books, settings.block_size, rows, outliers
                )

        def placed(indices: Tensor, length: int, columns: Tensor) -> Tensor:
            """Indices of these columns, from the order of rounding, without vectors that are padding alone."""
            restored = torch.empty_like(indices)
            restored[..., prepared.order] = indices
            return restored[..., : -(-rows // length), columns]

        regular = _others(places, weight.shape[1])
        codebooks = tuple(
            Codebook(entries, placed(each, length, regular))
            for entries, each in zip(books, indices, strict=True)
        )
        apart = None
        if outliers is not None:
            each = placed(outliers.indices, outlier_length, places)
            apart = (Codebook(outliers.entries, each), places)
        return VectorWeight(codebooks, rows, scale, offset, dtype, apart)

    def _learn(
        self, matrix: Tensor, rows: int, importance: Tensor, k: int, rng: Generator, length: int
    ) -> Tensor:
        """k entries [k, v] for the vectors of matrix [out, in], weighted by their column's importance [in].

        A vector with padding beyond `rows` counts by its share of real weights.
        """
        # [in, vectors, v]
        vectors = matrix.T.reshape(matrix.shape[1], -1, length)
        real = (
            (torch.arange(matrix.shape[0], device=matrix.device) < rows)
            .float()
            .reshape(-1, length)
            .mean(1)
        )
        weights = (importance.unsqueeze(1) * real).flatten()
        return cluster_vectors(
            vectors.flatten(0, 1),
            weights,
            k,
            rng,
            iterations=self.settings.iterations,
            tolerance=self.settings.tolerance,
        )


@dataclass(frozen=True)
class Prepared:
    """Shared by all matrices with one input: U and its column order, dead columns, H's diagonal as weights of the columns."""

    upper: Tensor
    order: Tensor
    dead: Tensor
    importance: Tensor


def prepare(hessian: Tensor, damping_fraction: float, act_order: bool) -> Prepared:
    """Normalise, order and factor a Hessian [in, in]. Raises MethodError when that breaks down."""
    dead, mean = hessian.diagonal() == 0, hessian.diagonal().mean()
    hessian = hessian / torch.where(mean > 0, mean, 1.0)
    hessian = hessian + RELATIVE_DAMPING * torch.eye(
        hessian.shape[0], dtype=hessian.dtype, device=hessian.device
    )
    importance = hessian.diagonal().clone()
    order = torch.arange(hessian.shape[0], device=hessian.device)
    if act_order:
        order = torch.argsort(importance, descending=True, stable=True)
    return Prepared(
        inverse_factor(damped(hessian[order][:, order], damping_fraction)[0]),
        order,
        dead,
        importance,
    )


def assign(
    weight: Tensor,
    upper: Tensor,
    books: list[Tensor],
    block_size: int,
    rows: int | None = None,
    outliers: OutlierColumns | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices [codebooks, vectors per column, in], and what they leave over of each column when its turn comes, [out, in].

    weight [out, in], out a multiple of v; columns beyond `rows` are padding and make no error. Each vector takes its nearest
    entry of the first book, then the nearest entry of the next to what is left; in outlier columns that of their own codebook,
    and its indices are written to outliers.
    """
    length, columns = books[0].shape[1], weight.shape[1]
    indices = torch.zeros(
        len(books), weight.shape[0] // length, columns, dtype=torch.int64, device=weight.device
    )
    left = torch.empty_like(weight)

    def round_column(column: int, view: Columns) -> Tensor:
        w = view[column]
        if outliers is not None and outliers.mask[column]:
            rest = w.reshape(-1, outliers.entries.shape[1])
            found = nearest_vectors(rest, outliers.entries)
            outliers.indices[:, column] = found
            rest = rest - outliers.entries[found]
        else:
            rest = w.reshape(-1, length)
            for number, entries in enumerate(books):
                found = nearest_vectors(rest, entries)
                indices[number, :, column] = found
                rest = rest - entries[found]
        left[:, column] = rest.flatten()
        if rows is not None:
            left[rows:, column] = 0
        return w - left[:, column]

    feed_forward(weight, upper, round_column, block_size=block_size)
    return indices, left
