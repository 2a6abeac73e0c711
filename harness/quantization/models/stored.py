"""Which tensors of the weight files make up each parameter of a model, by transformers' own rules.

Names in files differ from names in a model: prefixes come and go, published names are older than the module's, and experts are
stored one by one and fused while they are read. transformers has a rule for each, and its rules alone are applied here, so that
there is one reading of a folder:

    StoredNames(model, names)     the tensors of each parameter, and those that are of none
    compare(model, weights)       what the files lack, hold besides, or hold in another shape or dtype; from headers alone
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from harness.core.errors import ModelError
from harness.data.folder_check import FLOATS
from harness.data.safetensors_headers import StoredTensor, WeightFiles, summary
from harness.quantization.models.protocols import tied

Read = Callable[[str], Tensor]  # a tensor of the files by its name there


@dataclass
class Parts:
    """The stored tensors of one parameter. converter: what makes the parameter of them; None where it is the one tensor."""

    names: dict[str, list[str]] = field(default_factory=dict)  # pattern of the converter -> names
    converter: WeightConverter | None = None

    def all(self) -> list[str]:
        """Every name, in the order in which they are put together."""
        return [name for names in self.names.values() for name in names]

    @property
    def is_stack(self) -> bool:
        """Matrices of experts that are stacked, and halves of them joined by rows: put together one expert at a time."""
        kinds = (
            [(type(op), getattr(op, "dim", None)) for op in self.converter.operations]
            if self.converter is not None
            else []
        )
        merge = (MergeModulelist, 0)
        return kinds == [merge] or kinds == [merge, (Concatenate, 1)]


class StoredNames:
    """The parameters and stored buffers of a model by the names of the tensors that they are made of.

    parts       by parameter; without those that no tensor stands for
    unexpected  names of tensors that are of no parameter and that the model's class does not name as left over
    doubled     parameters for which more than one stored tensor stands, with these names
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        prefix, expected = model.base_model_prefix, model.state_dict()
        self.model = model
        self.parts: dict[str, Parts] = {}
        self.doubled: dict[str, list[str]] = {}
        leftover = []
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = rename_source_key(name, [], [], prefix, expected)
            if target not in expected:
                leftover.append((name, target))
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            parts = self.parts.setdefault(target, Parts(converter=converter))
            if parts.converter is not converter or (converter is None and parts.names):
                self.doubled.setdefault(target, parts.all()).append(name)
                continue
            order = list(converter.source_patterns) if converter is not None else [""]
            parts.names.setdefault(pattern or "", []).append(name)
            parts.names = {key: parts.names[key] for key in order if key in parts.names}
        ignored = _ignored(model)
        self.unexpected = [
            name
            for name, target in leftover
            if not any(re.search(rule, target) for rule in ignored)
        ]

    def read(self, parameter: str, read: Read) -> Tensor:
        """A parameter, put together of its stored tensors. read: returns a stored tensor by its name in the files."""
        parts = self.parts[parameter]
        if parts.converter is None:
            return read(parts.all()[0])
        if parts.is_stack:
            return _stacked(list(parts.names.values()), read)
        return self._converted(parameter, parts, read)[parameter]

    def made_besides(self, shapes: Mapping[str, Tensor]) -> None:
        """Add the parameters that converters make besides the first one (a fused tensor that is split in parts).

        shapes: stand-ins for the stored tensors, by name. Conversions that fail are left to `compare`.
        """
        for parameter, parts in list(self.parts.items()):
            if parts.converter is None or parts.is_stack:
                continue
            try:
                made = self._converted(parameter, parts, shapes.__getitem__)
            except Exception:  # whatever an operation raises on tensors that do not fit
                continue
            for other in made:
                self.parts.setdefault(other, _Besides(parts.names, parts.converter, parameter))

    def _converted(self, parameter: str, parts: Parts, read: Read) -> dict[str, Tensor]:
        converter = copy.deepcopy(parts.converter)
        first = parts.first if isinstance(parts, _Besides) else parameter
        assert converter is not None
        converter.collected_tensors = {
            pattern: [read(name) for name in names] for pattern, names in parts.names.items()
        }
        made: Mapping[str, Any] = converter.convert(
            first, model=self.model, config=self.model.config
        )
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


@dataclass
class _Besides(Parts):
    """A parameter that a converter makes besides the one it is filed under (first)."""

    first: str = ""


@dataclass(frozen=True)
class Comparison:
    """The files of a folder against the model of its config.json.

    faults   why the files cannot be this model's weights
    notes    what the files hold and the model does not use
    """

    names: StoredNames
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def compare(model: PreTrainedModel, weights: WeightFiles) -> Comparison:
    """Names, shapes and dtypes of all tensors against a model on the meta device. Reads no weights.

    weights: without faults of their own.
    """
    where = weights.files[0].parent if weights.files else "the folder"
    names = StoredNames(model, weights.tensors)
    metas = {
        name: torch.empty(stored.shape, device="meta") for name, stored in weights.tensors.items()
    }
    names.made_besides(metas)
    expected, ties = model.state_dict(), tied(model)
    missing = sorted(
        expected.keys()
        - names.parts.keys()
        - {name for pair in ties.items() for name in pair if names.parts.keys() & set(pair)},
        key=dot_natural_key,
    )
    faults = []
    if missing:
        faults.append(
            f"{where}: the weight files lack {summary(missing)}, which config.json calls for; is the folder complete, and are the "
            "files and config.json of one model?"
        )
    odd: dict[tuple[Any, tuple[int, ...]], list[str]] = {}  # shape found, shape wanted
    codes: dict[str, list[str]] = {}  # dtype
    for parameter, parts in names.parts.items():
        shape, wanted = _shape(names, parameter, parts, metas), tuple(expected[parameter].shape)
        if shape != wanted:
            odd.setdefault((shape, wanted), []).append(parameter)
        for name in parts.all():
            stored = weights.tensors[name]
            if expected[parameter].is_floating_point() and stored.dtype not in FLOATS:
                codes.setdefault(stored.dtype, []).append(name)
    if odd:
        listed = "; ".join(
            f"{summary(held)} is {_times(shape)} in the files and {_times(wanted)} by config.json"
            for (shape, wanted), held in list(odd.items())[:6]
        )
        more = f"; and {len(odd) - 6} more shapes" if len(odd) > 6 else ""
        faults.append(
            f"{where}: shapes differ: {listed}{more}. Use the config.json that these files came with"
        )
    for dtype, held in codes.items():
        faults.append(
            f"{where}: {summary(held)} {'is' if len(held) == 1 else 'are'} stored as {dtype}: codes of a quantized checkpoint, not "
            "weights. Name the full-precision model behind it"
        )
    for parameter, held in names.doubled.items():
        faults.append(
            f"{where}: {' and '.join(held)} all stand for {parameter}; remove all but one from the files"
        )
    notes = []
    if names.unexpected:
        notes.append(
            f"the weight files hold {len(names.unexpected)} tensors that config.json leaves no place for, which are ignored (as by "
            f"transformers): {summary(names.unexpected, most=12)}"
        )
    both = [name for name, of in ties.items() if {name, of} <= names.parts.keys()]
    if both:
        notes.append(
            f"{summary(both)} is stored although config.json ties it (tie_word_embeddings); where its numbers differ from the "
            "embeddings' it is used as stored, as by transformers"
        )
    return Comparison(names, tuple(faults), tuple(notes))


def require(model: PreTrainedModel, weights: WeightFiles) -> StoredNames:
    """The stored names of a model's parameters. Raises ModelError with every fault of the files."""
    found = compare(model, weights)
    if found.faults:
        raise ModelError("; ".join(found.faults))
    return found.names


def _ignored(model: PreTrainedModel) -> list[str]:
    """Patterns of names that a class expects to find left over, as transformers applies them."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _stacked(halves: list[list[str]], read: Read) -> Tensor:
    """[experts, rows of all halves, columns], filled one expert at a time. halves: names by expert, one list per half."""
    first = [read(names[0]) for names in halves]
    rows = sum(tensor.shape[0] for tensor in first)
    fused = torch.empty(
        (len(halves[0]), rows, first[0].shape[1]), dtype=first[0].dtype, device=first[0].device
    )
    for expert, names in enumerate(zip(*halves, strict=True)):
        torch.cat(first if expert == 0 else [read(name) for name in names], out=fused[expert])
    return fused


def _shape(
    names: StoredNames, parameter: str, parts: Parts, metas: Mapping[str, Tensor]
) -> tuple[int, ...] | str:
    """The shape of a parameter as the stored tensors make it; in words where they do not fit together."""
    shapes = [tuple(metas[name].shape) for name in parts.all()]
    if parts.converter is None:
        return shapes[0]
    if parts.is_stack:
        halves = [[tuple(metas[name].shape) for name in group] for group in parts.names.values()]
        whole = len(halves) == len(parts.converter.source_patterns)
        even = len({len(half) for half in halves}) == 1 and all(len(set(h)) == 1 for h in halves)
        if whole and even and all(len(half[0]) == 2 for half in halves):
            if len({half[0][1] for half in halves}) == 1:
                return (len(halves[0]), sum(half[0][0] for half in halves), halves[0][0][1])
    else:
        try:
            return tuple(names._converted(parameter, parts, metas.__getitem__)[parameter].shape)
        except Exception:  # whatever an operation raises on tensors that do not fit
            pass
    listed = " and ".join(dict.fromkeys(map(_times, shapes)))
    return f"{len(shapes)} tensors of {listed}, which do not fit together,"


def _times(shape: tuple[int, ...] | str) -> str:
    return shape if isinstance(shape, str) else f"[{', '.join(map(str, shape))}]"


__all__ = ["Comparison", "Parts", "StoredNames", "StoredTensor", "compare", "require"]
