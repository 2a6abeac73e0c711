"""A bit budget: candidate cells of one model, and the sizes that a mixture of their matrices may have.

A sweep states budgets (docs/sweeps.md); a run chooses, for each size, which candidate gives each matrix, and hands the choice out
as an ordinary cell whose scheme has overrides. What was chosen and measured lies in the store as runs/budgets/<sweep>/<name>.json
under `budget_key`, the digest of everything that changes the choice. Loads without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from harness.core.cell import Calibration, Cell, digest, quantize_key, to_json

VERSION = 1  # of the choice; part of its key
PROPOSALS = ("output_error", "fisher", "kl")  # in order of cost
MEASURED = ("fisher", "kl")  # those that need calibration windows

Proposal = Literal["output_error", "fisher", "kl"]
Together = Literal["none", "serving", "block"]


@dataclass(frozen=True)
class Accept:
    """How a mixed cell is compared with a uniform one: a paired test over the items of an evaluation.

    evaluation  one of the sweep's, with a result for each item; "": the first such
    level       of the one-sided test, corrected after Holm over the sizes of the budget
    """

    evaluation: str = ""
    level: Annotated[float, Ge(0), Le(1)] = 0.05


@dataclass(frozen=True)
class Size:
    """What the quantized matrices may take: stored bits per weight, or bytes. One of them is above 0."""

    bits: float = 0.0
    bytes: int = 0

    @property
    def label(self) -> str:
        """ "2.8" or "1.2GB"."""
        if self.bits:
            return f"{self.bits:g}"
        unit, factor = next(
            (u, f)
            for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
            if self.bytes >= f
        )
        return f"{self.bytes / factor:.6g}{unit}"

    def limit(self, weights: int) -> int:
        """The size in bits for matrices of so many weights."""
        return int(self.bits * weights) if self.bits else 8 * self.bytes


@dataclass(frozen=True)
class Budget:
    """One entry of a sweep's `budgets:` for one model and one draw of calibration windows.

    candidates   cells that differ in their weight schemes and, where blocks are assembled exactly, in their roundings
    together     matrices that get one candidate: none (each its own), serving (those that engines store as one: q, k, v; gate,
                 up; the experts of a block), block
    propose      tables from which assemblies are proposed, in order of cost
    trials       measured assemblies after the proposals; 0: the first proposal as it is, without a measurement
    windows      calibration windows of the measurement, from the end of the draw
    calibration  their draw, also where the candidates need none
    floor        the uniform cell is the answer unless the mixed cell is better by `accept`
    """

    name: str
    candidates: tuple[Cell, ...]
    sizes: tuple[Size, ...]
    calibration: Calibration | None = None
    together: Together = "serving"
    propose: tuple[Proposal, ...] = ()
    trials: Annotated[int, Ge(0)] = 64
    windows: Annotated[int, Ge(1)] = 8
    floor: bool = True
    accept: Accept = Accept()

    def name_of(self, size: Size) -> str:
        """The name of one size: of its file in the store, and of the mixed cell's scheme."""
        return f"{self.name}@{size.label}"

    @property
    def measures(self) -> bool:
        """Whether assemblies are run on calibration windows."""
        return self.trials > 0 or bool(set(self.propose[:1]) & set(MEASURED))


def budget_key(budget: Budget, size: Size) -> str:
    """Identity of one choice; 64 hexadecimal digits."""
    calibration: Any = None
    if budget.measures and budget.calibration is not None:
        calibration = {
            name: value
            for name, value in to_json(budget.calibration).items()
            if name not in ("name", "source")
        }
    identity = {
        "version": VERSION,
        "candidates": [quantize_key(cell) for cell in budget.candidates],
        "size": to_json(size),
        "together": budget.together,
        "propose": list(budget.propose),
        "trials": budget.trials,
        "windows": budget.windows if budget.measures else None,
        "calibration": calibration,
    }
    return digest(identity)
