"""Fine-tunes as differences: the matrix that is stored is what must be added to the base model's.

    DeltaWeight     base + change; the change is stored, in any layout, the base is not
    SignWeight      ±alpha, one bit per entry (BitDelta, arXiv 2402.10193)
    LowRankWeight   Σ left · diag(sizes) · right (Delta-CoMe, arXiv 2406.08903, and a truncated SVD)

Sizes are of the change alone: the base is stored once for all models that were fine-tuned from it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from harness.core.errors import MethodError
from harness.quantization.numerics.grids import SCALE_DTYPES
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import QuantizedWeight


@dataclass(frozen=True)
class DeltaWeight(QuantizedWeight):
    """The matrix of a fine-tune: base + change.

    change  in any layout, [out, in]
    base    the base model's matrix, [out, in] float32; None as read from a checkpoint, until `with_base` adds it
    """

    kind = "delta"
    change: QuantizedWeight
    base: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.change.shape

    @property
    def contained(self) -> tuple[QuantizedWeight, ...]:
        return (self.change, *self.change.contained)

    def with_base(self, base: Tensor) -> DeltaWeight:
        """The same change on this base [out, in], which is read in float32."""
        if tuple(base.shape) != tuple(self.shape):
            raise MethodError(
                f"the base's matrix is {list(base.shape)} and the difference {list(self.shape)}"
            )
        return dataclasses.replace(self, base=base.float())

    def dequantize(self) -> Tensor:
        """base + change in float32. Raises MethodError without a base."""
        if self.base is None:
            raise MethodError(
                "this matrix is a difference, and the base that it must be added to is not there; load the checkpoint with the "
                "base of its model"
            )
        change = self.change.dequantize()
        return self.base.to(change.device) + change

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = self.change.pack()
        return tensors, {"kind": self.change.kind, "change": meta}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        return cls(QuantizedWeight.kinds[meta["kind"]].unpack(tensors, meta["change"]))


@dataclass(frozen=True)
class SignWeight(QuantizedWeight):
    """alpha where a sign is set, else -alpha.

    signs  [out, in] bool: True is +1
    alpha  [1] float32, or [out]: one per row
    """

    kind = "sign"
    signs: Tensor
    alpha: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs.shape[0], self.signs.shape[1]

    def dequantize(self) -> Tensor:
        alpha = self.alpha[:, None]  # [1 or out, 1]
        return torch.where(self.signs, alpha, -alpha)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"signs": pack(self.signs.to(torch.uint8), 1), "alpha": self.alpha.contiguous()}
        return tensors, {"shape": list(self.shape)}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        signs = unpack(tensors["signs"], 1, rows * columns).reshape(rows, columns).bool()
        return cls(signs, tensors["alpha"])


@dataclass(frozen=True)
class LowRankPart:
    """Singular vectors of one width: left [out, k], sizes [k] float32 (exact in the factor dtype), right [k, in]."""

    left: QuantizedWeight
    sizes: Tensor
    right: QuantizedWeight

    def dequantize(self) -> Tensor:
        """left · diag(sizes) · right, [out, in] float32."""
        return (self.left.dequantize() * self.sizes) @ self.right.dequantize()


@dataclass(frozen=True)
class LowRankWeight(QuantizedWeight):
    """The sum of its parts, which have no more columns together than the matrix has; no part: a matrix of zeros.

    factor_dtype  of sizes as stored, and of factors that are not rounded
    unit_sizes    all sizes are 1 and not stored
    """

    kind = "low_rank"
    parts: tuple[LowRankPart, ...]
    size: tuple[int, int]
    factor_dtype: str = "bfloat16"
    unit_sizes: bool = False
    device: torch.device | str = "cpu"

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def contained(self) -> tuple[QuantizedWeight, ...]:
        return tuple(factor for part in self.parts for factor in (part.left, part.right))

    @property
    def rank(self) -> int:
        """Columns of all parts."""
        return sum(part.sizes.numel() for part in self.parts)

    def dequantize(self) -> Tensor:
        total = torch.zeros(self.size, device=self.device)
        for part in self.parts:
            total = total + part.dequantize()
        return total

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left [out, rank], diag(sizes) · right [rank, in]) of all parts together, float32: an adapter of scaling 1."""
        if not self.parts:
            rows, columns = self.size
            return torch.zeros(rows, 0), torch.zeros(0, columns)
        left = torch.cat([part.left.dequantize() for part in self.parts], dim=1)
        right = torch.cat([part.sizes[:, None] * part.right.dequantize() for part in self.parts])
        return left, right

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        described = []
        for number, part in enumerate(self.parts):
            entry: list[Any] = [part.sizes.numel()]
            for side, factor in (("left", part.left), ("right", part.right)):
                own, meta = factor.pack()
                tensors |= {f"{side}{number}_{name}": tensor for name, tensor in own.items()}
                # a factor's shape follows from the matrix and the number of columns
                kept = {name: value for name, value in meta.items() if name != "shape"}
                entry.append([factor.kind, kept])
            if not self.unit_sizes:
                tensors[f"sizes{number}"] = part.sizes.to(
                    SCALE_DTYPES[self.factor_dtype]
                ).contiguous()
            described.append(entry)
        return tensors, {
            "shape": list(self.size),
            "factor_dtype": self.factor_dtype,
            "unit_sizes": self.unit_sizes,
            "parts": described,
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        device = next(iter(tensors.values())).device if tensors else "cpu"
        parts = []
        for number, (count, *sides) in enumerate(meta["parts"]):
            factors = []
            for side, shape, (kind, kept) in zip(
                ("left", "right"), ((rows, count), (count, columns)), sides, strict=True
            ):
                start = f"{side}{number}_"
                own = {
                    name.removeprefix(start): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(start)
                }
                factors.append(
                    QuantizedWeight.kinds[kind].unpack(own, {**kept, "shape": list(shape)})
                )
            sizes = (
                torch.ones(count, device=device)
                if meta["unit_sizes"]
                else tensors[f"sizes{number}"].float()
            )
            parts.append(LowRankPart(factors[0], sizes, factors[1]))
        return cls(tuple(parts), (rows, columns), meta["factor_dtype"], meta["unit_sizes"], device)


def singular_vectors(
    matrix: Tensor, rank: int | None = None, *, randomized: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, r], S [r] falling, V [in, r] of matrix [out, in] float32, the first `rank` (None: all min(out, in)).

    Signs are canonical: of each column of U the entry of largest magnitude (the first of equals) is positive. Two libraries
    would otherwise give two checkpoints, since grids are not symmetric.
    randomized: by a sketch of rank + 10 columns with 2 power iterations (arXiv 0909.4061), always the same sketch.
    """
    if randomized and rank is not None and rank + 10 < min(matrix.shape):
        draw = torch.Generator().manual_seed(0)
        sketch = torch.randn(matrix.shape[1], rank + 10, generator=draw).to(matrix.device)
        basis = torch.linalg.qr(matrix @ sketch).Q
        for _ in range(2):
            basis = torch.linalg.qr(matrix.T @ basis).Q
            basis = torch.linalg.qr(matrix @ basis).Q
        left, sizes, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    else:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    left, sizes, right = left[:, :rank], sizes[:rank], right[:rank].T
    peaks = left.abs().argmax(dim=0)
    signs = torch.where(left.gather(0, peaks[None])[0] < 0, -1.0, 1.0)
    return (left * signs).contiguous(), sizes.contiguous(), (right * signs).contiguous()
