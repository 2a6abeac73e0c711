"""The recipe of the tables in `harness/quantization/numerics/gaussian_grids.py`.

    python tests/support/gaussian_grids.py        # prints them all with their distortions; some minutes on one core

One dimension: Lloyd–Max of N(0, 1) with exact integrals. Two dimensions: Lloyd's algorithm on 2^22 pairs of normal numbers (2^20
for 256 points), which Box and Muller's formula makes of Philox's raw stream. It starts from a sunflower spiral whose density is
that of an optimal grid, the square root of the normal density, and runs on a part of the pairs first, where there are several
spirals from each of them; the best goes on.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import ndtr

KEY = 2411_17525  # of Philox
PAIRS = 2**22
# pairs and the change of distortion that ends each stage, by the number of points; and the spirals to start from
STAGES = {
    16: ((2**16, 1e-6), (2**19, 3e-7), (PAIRS, 1e-7)),
    64: ((2**16, 1e-6), (2**19, 3e-7), (PAIRS, 1e-7)),
    256: ((2**15, 1e-6), (2**17, 1e-6), (2**20, 1e-6)),
}
TURNS = {16: (1, 1.01, 1.1, 0.9), 64: (1, 1.01, 1.1, 0.9), 256: (1,)}


def lloyd_max(n: int) -> np.ndarray:
    """The n points of N(0, 1) [n], ascending, to a change below 1e-12."""
    points = np.sqrt(3) * np.linspace(-1, 1, n) * math.log2(n) / 2
    while True:
        borders = np.concatenate(([-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]))
        density = np.exp(-borders * borders / 2) / math.sqrt(2 * math.pi)
        moved = (density[:-1] - density[1:]) / np.diff(ndtr(borders))
        if np.abs(moved - points).max() < 1e-12:
            return moved
        points = moved


def normal_pairs(count: int, key: int = KEY) -> np.ndarray:
    """[count, 2] float64, of N(0, I)."""
    raw = np.random.Philox(key=key).random_raw(2 * count).reshape(count, 2)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    radius, angle = np.sqrt(-2 * np.log(uniform[:, 0])), 2 * math.pi * uniform[:, 1]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)


def spiral(n: int, turn: float) -> np.ndarray:
    """n points in the density of N(0, 2 I)."""
    k = np.arange(n)
    radius = np.sqrt(-4 * np.log(1 - (k + 0.5) / n))
    angle = math.pi * (3 - math.sqrt(5)) * k * turn
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)


def lloyd(points: np.ndarray, pairs: np.ndarray, change: float) -> tuple[np.ndarray, float]:
    """Lloyd's steps until the distortion per coordinate falls by less than `change`."""
    before = math.inf
    while True:
        distance, code = cKDTree(points).query(pairs)
        distortion = float((distance * distance).mean() / 2)
        count = np.bincount(code, minlength=len(points))
        sums = [np.bincount(code, weights=pairs[:, axis], minlength=len(points)) for axis in (0, 1)]
        points = np.where(
            count[:, None] > 0, np.stack(sums, 1) / np.maximum(count, 1)[:, None], points
        )
        if before - distortion < change:
            return points, distortion
        before = distortion


def pairs_table(n: int) -> tuple[np.ndarray, float]:
    """The n points of N(0, I) [n, 2], sorted by their first coordinate and then their second, and their distortion."""
    pairs, (first, *more) = normal_pairs(PAIRS), STAGES[n]
    starts = [lloyd(spiral(n, turn), pairs[: first[0]], first[1]) for turn in TURNS[n]]
    points, distortion = min(starts, key=lambda found: found[1])
    for count, change in more:
        points, distortion = lloyd(points, pairs[:count], change)
    return points[np.lexsort((points[:, 1], points[:, 0]))], distortion


def main() -> None:
    for bits in (2, 3, 4):
        print(f"1 {bits}", " ".join(f"{value:.7f}" for value in lloyd_max(2**bits)), flush=True)
    for bits in (2, 3, 4):
        points, distortion = pairs_table(4**bits)
        print(
            f"2 {bits} {distortion:.7f}",
            " ".join(f"{x:.5f} {y:.5f}" for x, y in points),
            flush=True,
        )


if __name__ == "__main__":
    main()
