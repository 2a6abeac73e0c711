"""ShortGPT: the blocks that change their input least are removed, after one pass over calibration text.

ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (arXiv 2403.03853). Influence of block i (eq. 1):

    BI_i = 1 - E over tokens of cos(x_i, x_i+1)        x_i the block's input, x_i+1 its output

All blocks to remove are chosen at once, those of least influence, of equal ones the first. measure: angular is that of The
Unreasonable Ineffectiveness of the Deeper Layers (2403.17887): the run of k consecutive blocks with the least
arccos(cos(x_i, x_i+k)) / π, of the last token of every window.

Where we differ from the published code: the influence of the last block is that of its own output; the published one is of the
output behind the final norm. A token whose input or output is zero counts as a cosine of 0.5, as there.
"""

from __future__ import annotations

import math
from collections.abc import Generator as Generating
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from harness.core.shapes import Shapes
from harness.quantization.methods.protocols import ModelReader, Survey
from harness.quantization.methods.reducing import (
    check_blocks,
    cosines,
    mean_cosine,
    text_of,
    without_blocks,
)


class Reduction:
    """Removes blocks."""

    version = 1
    needs = ("block_states",)
    stochastic = False

    @dataclass(frozen=True)
    class Settings:
        """
        blocks   how many blocks are removed; 0: as `share` says
        share    of the blocks, rounded to the nearest number; 0: as `blocks` says
        drop     numbers of the blocks to remove, from 0, whatever their influence; empty: chosen by influence
        protect  numbers of blocks that are never chosen
        measure  cosine: each block on its own; angular: consecutive blocks, by their last tokens
        """

        blocks: int = 0
        share: float = 0.0
        drop: tuple[int, ...] = ()
        protect: tuple[int, ...] = ()
        measure: Literal["cosine", "angular"] = "cosine"

        def __post_init__(self) -> None:
            given = [bool(self.blocks), bool(self.share), bool(self.drop)]
            if sum(given) > 1:
                raise ValueError("state one of blocks, share and drop")
            if self.blocks < 0 or not 0 <= self.share < 1:
                raise ValueError(
                    f"blocks is {self.blocks} and share {self.share}; blocks is a number from 1, share lies between 0 and 1"
                )
            if self.measure not in ("cosine", "angular"):
                raise ValueError(f'measure is "{self.measure}"; it must be cosine or angular')

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
        """Any model whose config says nothing of a block by its index that cannot be cut with the blocks."""
        settings, reasons = self.settings, check_blocks(config)
        if not (settings.blocks or settings.share or settings.drop):
            reasons.append(
                "nothing says how many blocks are removed; set reduction.blocks, reduction.share or reduction.drop"
            )
            return reasons
        named = sorted({*settings.drop, *settings.protect})
        if any(not 0 <= index < shapes.blocks for index in named):
            reasons.append(
                f"drop and protect name blocks 0 to {shapes.blocks - 1} of this model, not {named}"
            )
        count = self._count(shapes.blocks)
        free = shapes.blocks - len(set(settings.protect))
        if settings.drop and set(settings.drop) & set(settings.protect):
            reasons.append("a block is named in drop and in protect")
        elif not 1 <= count < shapes.blocks:
            reasons.append(
                f"{count} of {shapes.blocks} blocks would be removed; at least one is removed, and one is left"
            )
        elif not settings.drop and count > free:
            reasons.append(f"{count} blocks to remove, and {free} that are not protected")
        elif settings.measure == "angular" and not settings.drop and not self._runs(shapes.blocks):
            reasons.append(
                f"measure angular removes {count} consecutive blocks, and no {count} without a protected one follow each other"
            )
        return reasons

    def config(
        self, config: Mapping[str, Any], choice: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The config with the kept blocks; in a plan, where the choice is not known, with as many of the first ones."""
        blocks = text_of(config)["num_hidden_layers"]
        if choice is not None:
            return without_blocks(config, choice["kept"])
        if self.settings.drop:
            return without_blocks(config, [i for i in range(blocks) if i not in self.settings.drop])
        return without_blocks(config, range(blocks - self._count(blocks)))

    def choose(
        self, model: Survey, rng: Generator
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """{"kept", "dropped", "influence": by block}; of the angular measure the influence of the run that begins at a block."""
        settings, count = self.settings, model.shapes.blocks
        if settings.drop:
            return _choice(count, sorted(set(settings.drop)), [])
        remove = self._count(count)
        influence: list[float] = []
        last: list[Tensor] = []  # inputs of each block at the last token of every window
        for block in model.surveyed():
            if settings.measure == "cosine":
                influence.append(1 - mean_cosine(block.inputs, block.outputs))
            else:
                last.append(_last_tokens(block.inputs))
                if block.index == count - 1:
                    last.append(_last_tokens(block.outputs))
            yield block.index + 1, count
        if settings.measure == "angular":
            influence = [_angle(last[i], last[i + remove]) for i in range(count - remove + 1)]
            first = min(self._runs(count), key=lambda start: (influence[start], start))
            return _choice(count, range(first, first + remove), influence)
        free = [index for index in range(count) if index not in settings.protect]
        least = sorted(free, key=lambda index: (influence[index], index))[:remove]
        return _choice(count, sorted(least), influence)

    def tensors(
        self, choice: Mapping[str, Any], model: ModelReader
    ) -> Iterator[tuple[str, Tensor]]:
        """The ends as they are, and the kept blocks with new numbers."""
        yield from model.ends().items()
        for number, index in enumerate(choice["kept"]):
            for name, tensor in model.block(index).items():
                yield model.name(number, name), tensor

    def _runs(self, blocks: int) -> list[int]:
        """Where runs of as many blocks as are removed begin that hold no protected one."""
        count, protect = self._count(blocks), set(self.settings.protect)
        starts = range(blocks - count + 1)
        return [start for start in starts if protect.isdisjoint(range(start, start + count))]

    def _count(self, blocks: int) -> int:
        """How many of so many blocks are removed."""
        if self.settings.drop:
            return len(set(self.settings.drop))
        if self.settings.share:
            return max(1, math.floor(self.settings.share * blocks + 0.5))
        return self.settings.blocks


def _choice(count: int, dropped: Any, influence: list[float]) -> dict[str, Any]:
    gone = list(dropped)
    kept = [index for index in range(count) if index not in gone]
    return {"kept": kept, "dropped": gone, "influence": influence}


def _last_tokens(states: Any) -> Tensor:
    return torch.cat([state[:, -1] for state in states]).float()


def _angle(first: Tensor, second: Tensor) -> float:
    return float(cosines(first, second).clamp(-1, 1).arccos().double().sum() / math.pi)
