"""HIGGS: rows rotated until their entries look normal, then rounded to grids that are optimal for the normal distribution; no data.

Pushing the Limits of Large Language Model Quantization via the Linearity Theorem (arXiv 2411.17525). For each row and each run of
h consecutive inputs ("Hadamard group"), with H_h Sylvester's orthogonal matrix, ε random signs and n = 2^(p b) points of a grid:

    s = ||w||₂ / sqrt(h)        y = H_h (ε ⊙ w) / s        code of each p-tuple of y = its nearest point (Euclid)
    w' = s · ε ⊙ H_hᵀ grid[code]

so that mean y² = 1, and the relative error of a matrix is the distortion of the grid, whatever the matrix: 0.107 at 2 bits, 0.030
at 3, 0.0077 at 4 with pairs (p = 2). The matrix is rotated back when it is read, so nothing runs online. h is the largest power of
two up to hadamard_size that divides the inputs.

Where we differ: the paper draws signs, the integration in transformers has none; here `rotation_seed` draws them, and -1 means
none. Rows whose length is no multiple of h are not padded, as they are there: h is smaller instead. The grids were computed anew
(`numerics.gaussian_grids`); kernels are out of scope.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.core.shapes import LinearShape, Shapes
from harness.quantization.methods.checks import check_uniform, refusals, require_finite
from harness.quantization.methods.protocols import Evidence
from harness.quantization.numerics import gaussian_grids, hadamard
from harness.quantization.numerics.grids import SCALE_DTYPES, as_stored
from harness.quantization.numerics.packing import pack, unpack
from harness.quantization.numerics.weights import QuantizedWeight

SMALLEST_GROUP = 32
NO_SIGNS = -1


class Rounding:
    """Data-free rounding of rotated rows to Gaussian grids."""

    version = 1
    needs = ()
    stochastic = False
    activation_aware = False
    sequential = False

    @dataclass(frozen=True)
    class Settings:
        """
        vector         p, weights per code: 1 or 2
        hadamard_size  the largest Hadamard group, a power of two; 32 and up
        rotation_seed  of the signs; -1: no signs
        """

        vector: int = 2
        hadamard_size: int = 1024
        rotation_seed: int = 0

        def __post_init__(self) -> None:
            if self.vector not in (1, 2):
                raise ValueError(f"vector is {self.vector}; 1 and 2 are possible")
            size = self.hadamard_size
            if size < SMALLEST_GROUP or size & (size - 1):
                raise ValueError(
                    f"hadamard_size is {size}; it must be a power of two of {SMALLEST_GROUP} or more"
                )
            if self.rotation_seed < NO_SIGNS:
                raise ValueError(
                    f"rotation_seed is {self.rotation_seed}; it must be 0 or more, or -1 for no signs"
                )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, scheme: Scheme, shapes: Shapes) -> list[str]:
        """Symmetric integers of 2 to 4 bits, and rows that have a Hadamard group of 32 or more."""

        def reasons(linear: LinearShape, weight: WeightScheme) -> Iterator[str]:
            size = self.group_of(linear.in_features)
            if size < SMALLEST_GROUP:
                yield f"rows have no Hadamard group of {SMALLEST_GROUP}: their length must be a multiple of it"
            elif weight.group_size not in (-1, size):
                yield (
                    f"scales belong to Hadamard groups, here of {size} inputs; use group_size=-1 instead of "
                    f"{weight.group_size}"
                )
            if not weight.symmetric:
                yield "the grids are symmetric and have no zero points; use symmetric=true (as in w4sym)"

        return check_uniform(scheme, shapes, bits=(2, 3, 4)) + refusals(scheme, shapes, reasons)

    def group_of(self, inputs: int) -> int:
        """h: the largest power of two up to hadamard_size that divides a row of `inputs` weights."""
        return min(inputs & -inputs, self.settings.hadamard_size)

    def round_layer(
        self,
        name: str,
        weight: Tensor,
        evidence: Evidence | None,
        scheme: WeightScheme,
        rng: Generator,
    ) -> QuantizedWeight:
        """Quantize weight [out, in] float32. Peak memory: three copies of weight, and 2^26 distances where pairs are rounded."""
        require_finite(weight)
        settings, bits = self.settings, int(scheme.bits)
        size = self.group_of(weight.shape[1])
        groups = _signed(weight, settings.rotation_seed).unflatten(1, (-1, size))
        scale = as_stored(groups.norm(dim=-1) / size**0.5, scheme.scale_dtype)  # [out, groups]
        safe = torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
        rotated = hadamard.transform(groups / safe)
        rotated = rotated.masked_fill((scale == 0).unsqueeze(-1), 0)
        tuples = rotated.reshape(-1, settings.vector)
        codes = gaussian_grids.encode(tuples, bits).reshape(weight.shape[0], -1)
        return GaussianGridWeight(
            codes, scale, settings.vector, bits, settings.rotation_seed, scheme.scale_dtype
        )


@dataclass(frozen=True)
class GaussianGridWeight(QuantizedWeight):
    """scale · ε ⊙ Hᵀ grid[code] over Hadamard groups of consecutive inputs.

    codes   [out, in / vector] uint8, 0 … 2^(vector · bits) - 1, of the format's own table (`numerics.gaussian_grids`)
    scale   [out, groups] float32, exact in scale_dtype; a group has in / groups inputs
    seed    of the signs ε [in]; -1: none
    """

    kind = "gaussian_grid"
    codes: Tensor
    scale: Tensor
    vector: int
    bits: int
    seed: int
    scale_dtype: str = "float16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * self.vector

    @property
    def group_size(self) -> int:
        """h, inputs per Hadamard group."""
        return self.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        rows, groups = self.scale.shape
        points = gaussian_grids.decode(self.codes.reshape(-1), self.vector, self.bits)
        back = hadamard.transform(
            points.reshape(rows, groups, -1)
        )  # Sylvester's is its own inverse
        return _signed((self.scale.unsqueeze(-1) * back).flatten(1), self.seed)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "codes": pack(self.codes, self.vector * self.bits),
            "scale": self.scale.to(SCALE_DTYPES[self.scale_dtype]).contiguous(),
        }
        return tensors, {
            "shape": list(self.shape),
            "vector": self.vector,
            "bits": self.bits,
            "seed": self.seed,
            "scale_dtype": self.scale_dtype,
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Self:
        rows, columns = meta["shape"]
        vector, bits = meta["vector"], meta["bits"]
        count = rows * columns // vector
        codes = unpack(tensors["codes"], vector * bits, count).reshape(rows, -1)
        scale = tensors["scale"].float()
        return cls(codes, scale, vector, bits, meta["seed"], meta["scale_dtype"])


def _signed(matrix: Tensor, seed: int) -> Tensor:
    """Columns of a matrix [out, in] times the signs of the seed."""
    if seed == NO_SIGNS:
        return matrix
    return matrix * hadamard.random_signs(matrix.shape[1], seed).to(matrix.device, matrix.dtype)
