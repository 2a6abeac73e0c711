"""What the `sparsity` of a weight scheme means: the share of weights that is pruned, or a pattern n:m. Loads without torch."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

PATTERN = re.compile(r"(\d+):(\d+)")
SHARE = re.compile(r"0?\.\d+")


@dataclass(frozen=True)
class Sparsity:
    """share: of the weights, pruned, as an exact fraction.   kept, of: n and m of a pattern, n kept of every m; else 0."""

    share: Fraction
    kept: int = 0
    of: int = 0

    def pruned_of(self, weights: int) -> int:
        """How many of so many weights that are compared with each other are pruned: floor(weights · share)."""
        return int(weights * self.share)


@functools.cache
def read_sparsity(text: str) -> Sparsity:
    """The sparsity that a scheme states: "0.5" (half of the weights pruned) or "2:4" (two kept of every four inputs).

    Raises ValueError with the reason for any other text.
    """
    if match := PATTERN.fullmatch(text):
        kept, of = int(match[1]), int(match[2])
        if not 1 <= kept < of:
            raise ValueError("of a pattern n:m, n are kept: n must be at least 1 and below m")
        return Sparsity(1 - Fraction(kept, of), kept, of)
    if not SHARE.fullmatch(text) or not 0 < Fraction(text) < 1:
        raise ValueError(
            'neither a share between 0 and 1 ("0.5": half of the weights pruned) nor a pattern ("2:4": two kept of four)'
        )
    return Sparsity(Fraction(text))


def sparsity_text(text: str) -> str:
    """For tables: "50 %" for "0.5", "2:4" as it is."""
    return text if ":" in text else f"{100 * float(text):g} %"
