"""The walk over a model's blocks: run each on all sequences and gather statistics of its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.quantization.models.protocols import WeightLocation
from harness.quantization.numerics.inputs import NAMES as INPUT_TENSORS
from harness.quantization.pipeline.blocks import Blocks
from harness.quantization.pipeline.observers import OF_INPUTS, Collector, Statistics


def survey(
    folder: Path, dtype: str, windows: Tensor, needs: Collection[str], device: str = "cpu"
) -> Iterator[tuple[int, dict[str, Tensor], Statistics]]:
    """Walk the unrounded model once. Yields for each block its index, its matrices [out, in] by name, and statistics by linear.

    needs: names of statistics of inputs. Memory: one block, and of its inputs what the statistics hold.
    """
    walk = Walk(folder, dtype, device)
    hidden = [h.to(walk.storage) for h in walk.blocks.start(windows)]
    for index in range(len(walk.blocks)):
        tensors = walk.blocks.tensors(index)
        seen, hidden = walk._observe(
            index, walk.blocks.build(index, tensors), hidden, {"*": needs}, True
        )
        slots = walk.blocks.slots(index)
        matrices = {slot.name: slot.view(tensors[slot.parameter]).float() for slot in slots}
        yield index, matrices, {slot.name: seen[slot.group] for slot in slots}


class Walk:
    """What every walk does with a block: run it on all sequences and gather statistics of its inputs."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        self.blocks = Blocks(folder, dtype, device)
        self.storage = torch.device("cpu")

    def _observe(
        self,
        index: int,
        block: nn.Module,
        hidden: Sequence[Tensor],
        needs: Mapping[str, Collection[str]],
        keep: bool,
    ) -> tuple[Statistics, list[Tensor]]:
        """Run a block on every sequence. needs: statistics by group, all groups where {"*": …}; keep: return its outputs."""
        slots = self._slots(index, dict(block.named_parameters()))
        wanted = {
            slot.group: frozenset(needs.get(slot.group, needs.get("*", ()))) & set(OF_INPUTS)
            for slot in slots
        }
        asked = {group for group in wanted if needs.get(group) or needs.get("*")}
        collectors = {
            group: Collector(group, wanted[group], len(hidden), self.storage)
            for group in wanted
            if group in asked
        }
        current = 0

        def receive(group: str, inputs: Tensor) -> None:
            if group in collectors:
                collectors[group].add(current, inputs)

        outputs: list[Tensor] = []
        if not collectors and not keep:
            return {}, outputs
        with torch.no_grad(), self.blocks.family.watch(block, slots if collectors else (), receive):
            for current, sequence in enumerate(hidden):  # `receive` reads current
                result = self.blocks.run(block, index, current, sequence)
                if keep:
                    outputs.append(result.to(self.storage))
        return {group: collector.finish() for group, collector in collectors.items()}, outputs

    def _slots(self, index: int, tensors: Collection[str]) -> tuple[WeightLocation, ...]:
        """The matrices of a block with these tensors; one whose own input is transformed is a group of its own."""

        def own(slot: WeightLocation) -> WeightLocation:
            owner = slot.parameter.rpartition(".")[0]
            if not any(f"{owner}.{name}" in tensors for name in INPUT_TENSORS):
                return slot
            return dataclasses.replace(
                slot, group=f"{slot.group}: {slot.name}", stage=slot.stage or slot.group
            )

        return tuple(own(slot) for slot in self.blocks.slots(index))
