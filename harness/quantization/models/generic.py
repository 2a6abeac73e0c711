"""The family of every causal language model that transformers loads and no other family file names.

Nothing is known of such a model beforehand, so it is watched: it runs once on tensors that have shapes and no memory, which tells
which linears run, in which order, and which of them multiply one and the same tensor. That is enough for data-free methods, and
for all that need only inputs of linears (GPTQ and its relatives).

What it cannot do: transforms are refused, because what produces a linear's input, and what else reads it, cannot be seen from
outside. Fused expert parameters are refused here, with their names: skipping them would leave most of the model unquantized.
Everything else that is left as it is stands in the notes of the plan. A family file makes a model of these full members.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from harness.core.errors import ModelError
from harness.core.text import short_list
from harness.quantization.models.protocols import DecoderFamily, WeightLocation

TOKENS = 4  # length of the observed run; no number depends on it


class Family(DecoderFamily):
    """Blocks, linears and ends as a run of the model shows them."""

    architectures = ("*",)

    def __init__(self) -> None:
        self._locations: list[tuple[WeightLocation, ...]] = []
        self._left: list[str] = []  # matrices of blocks that no linear multiplies text with

    def config(self, data: Mapping[str, Any]) -> PretrainedConfig:
        """As for any family; also looks at the model. Raises ModelError when it is not built of decoder blocks with linears."""
        config = super().config(data)
        mode = FakeTensorMode()
        try:
            with mode:
                model = self.auto_class.from_config(copy.deepcopy(config)).eval()
        except Exception as error:
            # ValueError for a foreign config, whatever the class raises for an odd one
            named = ", ".join(data.get("architectures") or ("no architecture",))
            raise ModelError(
                f"transformers builds no causal language model from this config.json ({named}): {error}"
            ) from error
        self.blocks_name = _find_blocks(model, config)
        self._refuse_fused(model)
        with mode:
            self._watch_run(model)
        self._find_ends(model)
        return config

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        return self._locations[index]

    def notes(self, config: PretrainedConfig) -> tuple[str, ...]:
        known = f"{config.model_type} has no family file: transforms are refused, and grouping is as one run of the model showed it"
        left = list(dict.fromkeys(self._left))
        if not left:
            return (known,)
        return (known, f"left as they are in the blocks: {short_list(left, 4)}")

    def _refuse_fused(self, model: nn.Module) -> None:
        fused = [
            f"{name} {list(parameter.shape)}"
            for name, module in self.blocks(model)[-1].named_modules()
            if not isinstance(module, nn.modules.conv._ConvNd)
            for name, parameter in (
                (f"{name}.{leaf}", p) for leaf, p in module.named_parameters(recurse=False)
            )
            if parameter.ndim > 2
        ]
        if fused:
            raise ModelError(
                f"{type(model).__name__} has fused matrices in its blocks ({', '.join(fused)}), which only a family file can take "
                "apart; see docs/adding.md"
            )

    def _watch_run(self, model: nn.Module) -> None:
        """Fill in the locations of every block, in order of execution, and how a block returns its output."""
        blocks = self.blocks(model)
        seen: list[dict[str, Tensor]] = [{} for _ in blocks]
        tuples: list[bool] = []

        def note_input(index: int, name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[index].setdefault(name, args[0])

        handles = [
            blocks[0].register_forward_hook(
                lambda _m, _a, output: tuples.append(isinstance(output, tuple))
            )
        ]
        for index, block in enumerate(blocks):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear | Conv1D):
                    handles.append(
                        module.register_forward_pre_hook(partial(note_input, index, name))
                    )
        try:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
        except Exception as error:  # code that asks for values, which are not there
            raise ModelError(
                f"{type(model).__name__} cannot be run without its weights to see its linears, so it needs a family file: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if not tuples or not all(seen):
            empty = [str(index) for index, found in enumerate(seen) if not found]
            listed = ", ".join(empty)
            raise ModelError(
                f"{type(model).__name__}: no linear of the blocks {listed} multiplies text; it needs a family file"
            )
        self.returns_tuple = tuples[0]
        self._locations = [
            self._locations_of(block, found) for block, found in zip(blocks, seen, strict=True)
        ]

    def _locations_of(
        self, block: nn.Module, seen: Mapping[str, Tensor]
    ) -> tuple[WeightLocation, ...]:
        # the tensors are alive in `seen`, so that their ids are their own
        first: dict[int, str] = {}
        locations = []
        for name, inputs in seen.items():
            module = block.get_submodule(name)
            bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
            group = first.setdefault(id(inputs), name)
            locations.append(
                WeightLocation(
                    name, group, f"{name}.weight", transposed=isinstance(module, Conv1D), bias=bias
                )
            )
        taken = {location.parameter for location in locations}
        self._left += [
            name
            for name, parameter in block.named_parameters()
            if parameter.ndim > 1 and name not in taken
        ]
        return tuple(locations)

    def _find_ends(self, model: Any) -> None:
        """The head is after the blocks; all else outside them counts as before, which costs memory and nothing more."""
        head = model.get_output_embeddings()
        self.after = tuple(name for name, module in model.named_modules() if module is head)
        if head is None or not self.after:
            raise ModelError(
                f"{type(model).__name__} has no output embeddings that transformers knows of; it needs a family file"
            )
        outside = [
            name for name in model.state_dict() if not name.startswith(f"{self.blocks_name}.")
        ]
        owners = dict.fromkeys(name.rpartition(".")[0] for name in outside)
        self.before = tuple(owner for owner in owners if owner and owner not in self.after)


def _find_blocks(model: nn.Module, config: PretrainedConfig) -> str:
    """The name of the list of decoder blocks: as many as the config has layers, with linears in them."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and any(isinstance(part, nn.Linear | Conv1D) for part in module[0].modules())
    ]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of {count} blocks with linears in them; it needs a family file"
        )
    return min(lists, key=lambda name: name.count("."))


__all__ = ["Family"]
