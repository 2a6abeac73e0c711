"""The base of a fine-tune, read block by block: what the differences in a checkpoint are added to.

A checkpoint of differences states the base in its manifest and holds none of it. Whoever reads the checkpoint adds the base's
matrices here; another base is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from harness.core.cell import Cell, Model, base_of
from harness.core.errors import MethodError, StoreError
from harness.data import hub, model_folders
from harness.quantization.formats.native import BlockContent
from harness.quantization.formats.weight_files import DTYPES, ModelWeights
from harness.quantization.models import family_of, read_config
from harness.quantization.models.protocols import WeightLocation
from harness.quantization.numerics.deltas import DeltaWeight
from harness.quantization.numerics.weights import QuantizedWeight


class BaseModel:
    """The model that a fine-tune came from. Peak memory: the matrices of one block in float32."""

    def __init__(self, folder: Path, model: Model) -> None:
        """model: as the base is named by the fine-tune, with its digest and the fine-tune's dtype."""
        self.model, self.dtype = model, DTYPES[model.dtype]
        data = read_config(folder)
        self.family = family_of(data)
        self.config = self.family.config(data)
        self.skeleton = self.family.skeleton(self.config, self.dtype)
        self.weights = ModelWeights(folder, self.skeleton)

    @classmethod
    def of(cls, cell: Cell) -> Self:
        """The base that a cell's model names.

        Raises MethodError where it names none, ModelError where it cannot be read, StoreError where its files have changed since
        the sweep was read.
        """
        base = base_of(cell.model)
        if base is None:
            raise MethodError(
                f"{cell.title}: stores a difference, and the model names no base; set model.base"
            )
        folder = model_folders.model_folder(base)
        if not hub.COMMIT.fullmatch(base.digest):
            found = model_folders.model_digest(base.source)
            if found != base.digest:
                raise StoreError(
                    f"{cell.title}: the base {base.source} has the digest {found[:12]} now, and {base.digest[:12]} when the "
                    "sweep was read; its files have changed"
                )
        return cls(folder, base)

    @classmethod
    def stated(cls, cell: Cell, manifest: Mapping[str, Any]) -> Self | None:
        """The base of a finished checkpoint of the cell; None for a checkpoint without differences.

        Raises StoreError where the checkpoint was made with another base than the cell's model names.
        """
        made_with = manifest.get("base")
        if made_with is None:
            return None
        named = base_of(cell.model)
        if named is None or named.digest != made_with["digest"]:
            other = "none" if named is None else f"{named.source} ({named.digest[:12]})"
            raise StoreError(
                f"{cell.title}: its checkpoint holds differences from {made_with['source']} ({made_with['digest'][:12]}), and the "
                f"model names the base {other}; set model.base={made_with['source']}"
            )
        return cls.of(cell)

    def description(self) -> dict[str, str]:
        """The manifest's entry."""
        return {"digest": self.model.digest, "source": self.model.source, "dtype": self.model.dtype}

    def matrices(self, index: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The matrices of block `index` by linear name, [out, in] float32."""
        prefix = self.family.block_prefix(index)
        parameters: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for location in self.locations(index):
            if location.parameter not in parameters:
                parameters[location.parameter] = self.weights.read(
                    prefix + location.parameter, self.dtype, device
                )
            found[location.name] = location.view(parameters[location.parameter]).float()
        return found

    def locations(self, index: int) -> tuple[WeightLocation, ...]:
        """Where the matrices of block `index` lie."""
        return self.family.locations(self.config, index)

    def tensor(self, name: str) -> Tensor | None:
        """A tensor outside the matrices by its name in the model, in the model's dtype on the CPU; None where the base has none."""
        if name not in self.skeleton.state_dict():
            return None
        return self.weights.read(name, self.dtype, "cpu")


def with_base(
    weights: Mapping[str, QuantizedWeight], matrices: Mapping[str, Tensor]
) -> dict[str, QuantizedWeight]:
    """The weights of a block with the base's matrices, by linear name, under their differences."""
    return {
        name: weight.with_base(matrices[name]) if isinstance(weight, DeltaWeight) else weight
        for name, weight in weights.items()
    }


def on_base(
    content: BlockContent, base: BaseModel | None, index: int, device: str | torch.device = "cpu"
) -> BlockContent:
    """Block `index` of a checkpoint as it is read, with the base's matrices under its differences; itself without a base."""
    if base is None:
        return content
    weights = with_base(content.weights, base.matrices(index, device))
    return dataclasses.replace(content, weights=weights)


__all__ = ["BaseModel", "on_base", "with_base"]
