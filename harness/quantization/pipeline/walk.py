"""A walk over the blocks of a model: each runs on all sequences, and statistics of its inputs are gathered."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """Run the blocks of the unrounded model in order.

    Yields for each block its index, its matrices [out, in] by name, and statistics by linear.
    needs: names of statistics of inputs. Memory: one block and the statistics of its inputs.
    """
    walk = Walk(folder, dtype, device)
    hidden = [h.to(walk.storage) for h in walk.blocks.start(windows)]
    for index in range(len(walk.blocks)):
        tensors = walk.blocks.tensors(index)
        seen, hidden = walk._observe(
            index, walk.blocks.build(index, tensors), hidden, {"*": needs}, True
        )
        locations = walk.blocks.locations(index)
        matrices = {
            location.name: location.view(tensors[location.parameter]).float()
            for location in locations
        }
        yield index, matrices, {location.name: seen[location.group] for location in locations}


@dataclass(frozen=True)
class Original:
    """What "cross" statistics compare a block with: the unrounded block, and its inputs in the full-precision model by sequence."""

    block: nn.Module
    hidden: Sequence[Tensor]


class Walk:
    """The base of a pass and of a survey: runs a block on all sequences and gathers statistics of its inputs."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        self.blocks = Blocks(folder, dtype, device)
        self.storage = torch.device("cpu")

    def _observe(
        self,
        index: int,
        block: nn.Module,
        hidden: Sequence[Tensor],
        needs: Mapping[str, Collection[str]],
        with_outputs: bool,
        original: Original | None = None,
    ) -> tuple[Statistics, list[Tensor]]:
        """Run a block on every sequence.

        needs         statistics by group, all groups where {"*": …}
        with_outputs  whether its outputs are returned, else no tensors
        original      run beside it, sequence by sequence, for "cross"; None: it has the same inputs everywhere
        """
        locations = self._locations(index, dict(block.named_parameters()))
        wanted = {
            location.group: frozenset(needs.get(location.group, needs.get("*", ())))
            & set(OF_INPUTS)
            for location in locations
        }
        asked = {group for group in wanted if needs.get(group) or needs.get("*")}
        collectors = {
            group: Collector(group, wanted[group], len(hidden), self.storage)
            for group in wanted
            if group in asked
        }
        # an expert's tokens in the two models have no common order
        compared = [
            location
            for location in locations
            if location.expert is None and "cross" in wanted[location.group]
        ]
        current = 0
        full: dict[str, Tensor] = {}  # inputs of the current sequence in the full-precision model

        def receive(group: str, inputs: Tensor) -> None:
            if group in collectors:
                collectors[group].add(current, inputs, full.get(group))

        outputs: list[Tensor] = []
        if not collectors and not with_outputs:
            return {}, outputs
        with (
            torch.no_grad(),
            self.blocks.family.watch(block, locations if collectors else (), receive),
        ):
            for current, sequence in enumerate(hidden):  # `receive` reads current and full
                if original is not None and compared:
                    full = self._inputs_of(original, index, current, compared)
                result = self.blocks.run(block, index, current, sequence)
                if with_outputs:
                    outputs.append(result.to(self.storage))
        return {group: collector.finish() for group, collector in collectors.items()}, outputs

    def _original(
        self, index: int, tensors: Mapping[str, Tensor], hidden: Sequence[Tensor] | None
    ) -> Original | None:
        """The unrounded block with these tensors on the full-precision model's inputs, where they are given."""
        return None if hidden is None else Original(self.blocks.build(index, tensors), hidden)

    def _inputs_of(
        self, original: Original, index: int, sequence: int, locations: Sequence[WeightLocation]
    ) -> dict[str, Tensor]:
        """Inputs by group of these matrices, in one sequence of the full-precision model."""
        found: dict[str, Tensor] = {}
        with self.blocks.family.watch(original.block, locations, found.__setitem__):
            self.blocks.run(original.block, index, sequence, original.hidden[sequence])
        return found

    def _locations(self, index: int, tensors: Mapping[str, Tensor]) -> tuple[WeightLocation, ...]:
        """The matrices of a block with these tensors. Those of a group whose input is transformed alike stay one group, a matrix
        with an input transform of its own becomes a group of its own."""
        groups: dict[str, list[tuple[str, dict[str, Tensor]]]] = {}  # by the family's group

        def own(location: WeightLocation) -> WeightLocation:
            owner = location.parameter.rpartition(".")[0]
            held = {
                name: tensors[f"{owner}.{name}"]
                for name in INPUT_TENSORS
                if f"{owner}.{name}" in tensors
            }
            if not held:
                return location
            known = groups.setdefault(location.group, [])
            same = next((group for group, other in known if _equal(held, other)), None)
            if same is None:
                same = f"{location.group}: {location.name}"
                known.append((same, held))
            return dataclasses.replace(location, group=same, stage=location.stage or location.group)

        return tuple(own(location) for location in self.blocks.locations(index))


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
