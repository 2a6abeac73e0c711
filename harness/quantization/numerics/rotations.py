"""Rotations: random ones that cost O(n · sqrt(n)) to apply and one seed to store, and a step of learning one."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Butterfly:
    """An orthogonal matrix of QuIP (arXiv 2307.13304, §4.1): permute, mix in two sets of small blocks, permute again.

    With n = p · q, x is read as a matrix [p, q]; each of its q columns is multiplied by a random rotation of p, then each of the p
    rows by one of q. x' = P2 · mix(P1 · x).

    first, last  [n] int64, P1 and P2 as indices
    columns      [q, p, p], rows [p, q, q]: special orthogonal, float32
    """

    first: Tensor
    columns: Tensor
    rows: Tensor
    last: Tensor

    @classmethod
    def from_seed(cls, size: int, seed: int, device: torch.device | str = "cpu") -> Butterfly:
        """The matrix of one seed (0 … 2^63 - 1), the same on every device, with every library version.

        Numbers come from the raw stream of Philox, whose bits numpy guarantees, not from a library's normal distribution.
        """
        p, q = split(size)
        key = int.from_bytes(
            hashlib.sha256(f"butterfly {size} {seed}".encode()).digest()[:16], "little"
        )
        stream = np.random.Philox(key=key)
        first, last = _permutation(stream, size), _permutation(stream, size)
        columns, rows = _rotations(stream, q, p), _rotations(stream, p, q)
        return cls(first.to(device), columns.to(device), rows.to(device), last.to(device))

    def apply(self, values: Tensor) -> Tensor:
        """R x along the last axis of values [..., n], in their dtype."""
        q, p = self.columns.shape[:2]
        mixed = values[..., self.first].unflatten(-1, (p, q))
        mixed = torch.einsum("qij,...jq->...iq", self.columns.to(values.dtype), mixed)
        mixed = torch.einsum("pij,...pj->...pi", self.rows.to(values.dtype), mixed)
        return mixed.flatten(-2)[..., self.last]

    def undo(self, values: Tensor) -> Tensor:
        """Rᵀ x along the last axis of values [..., n]."""
        q, p = self.columns.shape[:2]
        mixed = torch.empty_like(values)
        mixed[..., self.last] = values
        mixed = mixed.unflatten(-1, (p, q))
        mixed = torch.einsum("pji,...pj->...pi", self.rows.to(values.dtype), mixed)
        mixed = torch.einsum("qji,...jq->...iq", self.columns.to(values.dtype), mixed).flatten(-2)
        result = torch.empty_like(mixed)
        result[..., self.first] = mixed
        return result


@torch.no_grad()
def cayley_step(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One step of gradient descent over orthogonal matrices: R (I - a/2 A) (I + a/2 A)⁻¹, A = (Rᵀ G - Gᵀ R) / 2.

    A is the part of the gradient G along which R stays orthogonal, and Cayley's map turns a step along it into a rotation (Cayley
    SGD, arXiv 2002.01113, without momentum). a is at most rate, and at most 1 over the largest column sum of |A|. Solved exactly,
    in float64, then brought back to orthogonality by one step of Newton and Schulz, so that ||Rᵀ R - I|| stays below 1e-12.

    rotation, gradient: [n, n].   Returns [n, n] in rotation's dtype.
    """
    r, g = rotation.double(), gradient.double()
    skew = (r.T @ g - g.T @ r) / 2
    step = min(rate, 1.0 / (float(skew.abs().sum(0).max()) + 1e-8))
    half = skew * (step / 2)
    eye = torch.eye(r.shape[0], dtype=r.dtype, device=r.device)
    moved = r @ torch.linalg.solve(eye + half, eye - half)  # the two factors commute
    return (moved @ (3 * eye - moved.T @ moved) / 2).to(rotation.dtype)


def split(size: int) -> tuple[int, int]:
    """size as p · q: p takes the 1st, 3rd, … and q the 2nd, 4th, … of its prime factors in ascending order.

    >>> split(4096), split(11008), split(7)
    ((64, 64), (688, 16), (7, 1))
    """
    primes, rest, candidate = [], size, 2
    while candidate * candidate <= rest:
        while rest % candidate == 0:
            primes.append(candidate)
            rest //= candidate
        candidate += 1
    if rest > 1:
        primes.append(rest)
    return math.prod(primes[::2]), math.prod(primes[1::2])


def _uniform(stream: np.random.Philox, count: int) -> np.ndarray:
    """Numbers in (0, 1), float64, from the top 53 bits of the raw stream."""
    raw = np.atleast_1d(np.asarray(stream.random_raw(count), dtype=np.uint64))
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def _permutation(stream: np.random.Philox, size: int) -> Tensor:
    return torch.from_numpy(np.argsort(_uniform(stream, size), kind="stable").astype(np.int64))


def _rotations(stream: np.random.Philox, count: int, size: int) -> Tensor:
    """count matrices [size, size] of determinant 1, uniformly distributed (a uniform angle for size 2)."""
    if size == 1:
        return torch.ones(count, 1, 1)
    u = _uniform(stream, 2 * count * size * size)
    normal = np.sqrt(-2 * np.log(u[::2])) * np.cos(2 * np.pi * u[1::2])
    q, r = torch.linalg.qr(torch.from_numpy(normal.reshape(count, size, size)))
    # without it QR's Q is not uniform
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
    q[:, :, 0] *= torch.linalg.det(q).sign().unsqueeze(-1)
    return q.float()
