"""Hadamard matrices of many sizes, and the fast product with them: orthogonal, one seed or none to store.

A Hadamard matrix has entries ±1 and H Hᵀ = n I; here they are divided by sqrt(n). A size n = K 2^m uses the smallest K = 1, q + 1
(Paley's first construction, q ≡ 3 mod 4) or 2 (q + 1) (his second, q ≡ 1 mod 4), q a power of an odd prime, and doubles it m times
(Sylvester). All sizes of current models are covered: 4096 = 2^12, 11008 = 344 · 32, 13824 = 108 · 128, 14336 = 28 · 512,
18944 = 148 · 128, 28672 = 28 · 1024, 29568 = 924 · 32.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def exists(size: int) -> bool:
    """A Hadamard matrix of this size can be built here."""
    return _core(size) is not None


def unknown_sizes(sizes: Mapping[str, int]) -> list[str]:
    """The reason against what has a size of which no Hadamard matrix is known, in one line; none where all have one."""
    without = [f"{what} ({size})" for what, size in sizes.items() if not exists(size)]
    return [f"no Hadamard matrix is known for {', '.join(without)}"] if without else []


def matrix(size: int) -> Tensor:
    """The orthogonal Hadamard matrix [size, size], float64. Raises ValueError for a size that has none here."""
    return transform(torch.eye(size, dtype=torch.float64), 0)


def random_hadamard(size: int, seed: int) -> Tensor:
    """diag(±1) H, float64: signs from a generator of the seed."""
    return random_signs(size, seed)[:, None] * matrix(size)


def random_signs(size: int, seed: int) -> Tensor:
    """±1 [size], float64, from a generator of the seed, the same with every library version."""
    key = int.from_bytes(
        hashlib.sha256(f"hadamard signs {size} {seed}".encode()).digest()[:16], "little"
    )
    raw = np.asarray(np.random.Philox(key=key).random_raw(size), dtype=np.uint64)
    return torch.from_numpy((raw >> np.uint64(63)).astype(np.float64)) * 2 - 1


def transform(x: Tensor, axis: int = -1) -> Tensor:
    """H x along an axis, in x's dtype (computed in float32 where that is narrower). Costs n (K + log2(n / K)) per vector."""
    size = x.shape[axis]
    core = _core(size)
    if core is None:
        raise ValueError(f"no Hadamard matrix of size {size} is known here")
    wide = x if x.dtype == torch.float64 else x.float()
    moved = wide.movedim(axis, -1)
    rest = size // core
    values = moved.reshape(*moved.shape[:-1], core, rest)
    step = 1
    while step < rest:  # H_2 ⊗ … ⊗ H_2 on the inner axis
        pairs = values.reshape(*values.shape[:-1], rest // (2 * step), 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack((first + second, first - second), dim=-2).reshape(
            *values.shape[:-1], rest
        )
        step *= 2
    if core > 1:
        values = torch.einsum(
            "ij,...jk->...ik", _paley(core).to(values.device, values.dtype), values
        )
    mixed = values.reshape(moved.shape) / size**0.5
    return mixed.movedim(-1, axis).to(x.dtype)


@functools.cache
def _core(size: int) -> int | None:
    """The smallest K with size = K 2^m that a construction gives; None where no K does."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    if size < 1:
        return None
    return next(
        (
            k
            for m in itertools.takewhile(lambda m: odd << m <= size, itertools.count())
            if _built(k := odd << m)
        ),
        None,
    )


def _built(size: int) -> bool:
    return size == 1 or _first(size) or _second(size)


def _first(size: int) -> bool:
    return size % 4 == 0 and _prime_power(size - 1) is not None


def _second(size: int) -> bool:
    return size % 4 == 0 and (size // 2 - 1) % 4 == 1 and _prime_power(size // 2 - 1) is not None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p an odd prime; None for other numbers."""
    if q < 3 or q % 2 == 0:
        return None
    p = next((d for d in range(3, int(q**0.5) + 1, 2) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        rest, k = rest // p, k + 1
    return (p, k) if rest == 1 else None


@functools.lru_cache(maxsize=8)
def _paley(size: int) -> Tensor:
    """The ±1 matrix [size, size] of one of Paley's constructions, float32."""
    first = _first(size)
    q = size - 1 if first else size // 2 - 1
    jacobsthal = _jacobsthal(q)
    border = np.ones((q + 1, q + 1), dtype=np.float32)
    border[0, 0] = 0
    border[1:, 0] = -1 if first else 1
    border[1:, 1:] = jacobsthal
    eye = np.eye(q + 1, dtype=np.float32)
    if first:
        return torch.from_numpy(border + eye)  # skew conference matrix + I
    return torch.from_numpy(
        np.kron(border, np.array([[1, 1], [1, -1]])) + np.kron(eye, np.array([[1, -1], [-1, -1]]))
    ).float()


def _jacobsthal(q: int) -> np.ndarray:
    """χ(a - b) for all a, b of the field of q elements: 1 on squares, -1 on others, 0 at 0."""
    power = _prime_power(q)
    assert power is not None
    p, k = power
    # elements as polynomials
    digits = np.array(list(itertools.product(range(p), repeat=k)), dtype=np.int64)
    place = p ** np.arange(k - 1, -1, -1)
    reduction = _irreducible(p, k)
    character = np.full(q, -1, dtype=np.float32)
    for element in digits:
        character[int(_times(element, element, reduction, p) @ place)] = 1
    character[0] = 0
    differences = (digits[:, None, :] - digits[None, :, :]) % p
    return character[differences @ place]


def _times(a: np.ndarray, b: np.ndarray, reduction: np.ndarray, p: int) -> np.ndarray:
    """a b modulo the monic polynomial x^k - reduction; coefficients from the highest power down."""
    k = len(a)
    product = np.convolve(a, b) % p
    for index in range(len(product) - k):
        product[index + 1 : index + 1 + k] = (
            product[index + 1 : index + 1 + k] + product[index] * reduction
        ) % p
    return product[len(product) - k :]


@functools.cache
def _irreducible(p: int, k: int) -> np.ndarray:
    """Coefficients r of the first x^k - r(x) that has no divisor: modulo it no two non-zero elements have product zero."""
    if k == 1:
        return np.zeros(1, dtype=np.int64)
    elements = [np.array(e, dtype=np.int64) for e in itertools.product(range(p), repeat=k)][1:]
    # one factor has at most half the degree
    divisors = [e for e in elements if not e[: k - 1 - k // 2].any()]
    for reduction in elements:
        if all(_times(a, b, reduction, p).any() for a in divisors for b in elements):
            return reduction
    raise AssertionError(f"no field of {p}^{k} elements")
