"""Model families: how the blocks, matrices and ends of an architecture are found. One file per family.

family_of(config)       the family of a config.json
read_config(folder)     that config.json
shapes(folder)          what a plan knows of a model, without its weights
differences(folder, base)   why the matrices of two models cannot be subtracted
examine(folder)         all that can be known of a folder without reading weights: shapes, faults, notes
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from harness.core import plugins
from harness.core.errors import HarnessError, ModelError, unknown_name
from harness.core.shapes import Shapes
from harness.core.text import first_line
from harness.data import folder_check
from harness.data.folder_check import FolderLook
from harness.quantization.models.protocols import DecoderFamily

__all__ = [
    "Examined",
    "config_by_block",
    "differences",
    "examine",
    "family_of",
    "read_config",
    "shapes",
    "text_config",
]

ANY = "*"  # in `architectures`: serves what no other family names


@dataclass(frozen=True)
class Examined:
    """What a folder is, from its config and the headers of its files.

    shapes   None where the config cannot be used
    faults   every reason why the model cannot be used
    notes    what a user should know of the files; what the family says of the model is in shapes.notes
    facts    (subject, what was found), for people
    """

    shapes: Shapes | None
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def family_of(config: Mapping[str, Any]) -> DecoderFamily:
    """The family of the model that transformers builds from a config: by model_type, which decides there too, then by
    `architectures`. Raises ModelError with the nearest known one when no family serves it.
    """
    named = list(config.get("architectures") or ())
    wanted = [*_classes(config, named), *named]
    by_architecture = {
        a: name
        for name, facts in plugins.find("family").items()
        for a in facts.get("architectures", ())
    }
    name = next(
        (by_architecture[a] for a in wanted if a in by_architecture), by_architecture.get(ANY)
    )
    if name is None:
        first = wanted[0] if wanted else "(config.json names none)"
        raise ModelError(
            unknown_name("model family for the architecture", first, set(by_architecture))
            + ". Add one as harness/quantization/models/<name>.py (docs: how to add a model)"
        )
    return plugins.load("family", name)()


def _classes(config: Mapping[str, Any], named: list[str]) -> list[str]:
    """The classes that transformers has for a model_type; of several those that the config names, else the first."""
    found: list[str] = []
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        classes = mapping.get(config.get("model_type"), ())
        several = [classes] if isinstance(classes, str) else list(classes)
        found += [each for each in several if each in named] or several[:1]
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises ModelError when it is missing, no config, or that of a quantized checkpoint."""
    data = folder_check.read_config(folder)
    if data.get("model_type") == "mistral" and "layer_types" in data:
        data["model_type"] = "ministral"  # as transformers takes it
    return data


def examine(folder: Path) -> Examined:
    """All that config, headers and tokenizer files say, held against the architecture. Reads no weights, raises nothing.

    A model with 80 blocks takes 2 s the first time; a folder whose files did not change is remembered.
    """
    return _examine(folder, _stamp(folder))


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of change of a folder's files."""
    try:
        found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    except OSError:
        return ()
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in found)


@functools.lru_cache(maxsize=64)
def _examine(folder: Path, stamp: object) -> Examined:
    seen: FolderLook = folder_check.look(folder)
    faults, facts = list(seen.faults), list(seen.facts)
    notes: tuple[str, ...] = ()
    found = None
    if seen.config is not None:
        try:
            found = shapes(folder)
            facts.append(("family", f"{found.family}, {found.parameters:,} parameters"))
        except HarnessError as error:
            faults.append(str(error))
    if found is not None and seen.weights.files and not seen.weights.faults:
        from harness.quantization.models.stored import compare

        data = read_config(folder)
        family = family_of(data)
        compared = compare(family.skeleton(family.config(data), torch.float32), seen.weights)
        faults += compared.faults
        notes = compared.notes
    return Examined(found, tuple(faults), notes, tuple(facts))


def differences(folder: Path, base: Path) -> list[str]:
    """Why the block matrices of two models cannot be subtracted, from config.json alone; the first of each kind is named.

    Vocabularies, embeddings, norms and biases may differ. Raises ModelError for a config that cannot be used.
    """
    return list(_differences(folder, base, _stamp(folder), _stamp(base)))


@functools.lru_cache(maxsize=64)
def _differences(folder: Path, base: Path, stamp: object, base_stamp: object) -> tuple[str, ...]:
    data, other = read_config(folder), read_config(base)
    families = family_of(data), family_of(other)
    named = [_classes(each, list(each.get("architectures") or ()))[:1] for each in (data, other)]
    if type(families[0]) is not type(families[1]) or named[0] != named[1]:
        here, there = (each[0] if each else "unknown" for each in named)
        return (f"the architecture is {here} here and {there} in the base",)
    found: list[str] = []
    matrices = [
        _matrices(family, config) for family, config in zip(families, (data, other), strict=True)
    ]
    (count, mine), (base_count, theirs) = matrices
    if count != base_count:
        found.append(f"there are {count} blocks here and {base_count} in the base")
    odd = next((n for n in mine if n in theirs and mine[n] != theirs[n]), None)
    if odd is not None:
        found.append(f"{odd} is {list(mine[odd])} here and {list(theirs[odd])} in the base")
    missing = next((n for n in mine if n not in theirs), None)
    if missing is not None and count == base_count:
        found.append(f"{missing} is not in the base")
    return tuple(found)


def _matrices(
    family: DecoderFamily, data: Mapping[str, Any]
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """The number of blocks, and the shape of every matrix by "model.layers.0.self_attn.q_proj", in order."""
    config = family.config(dict(data))
    found: dict[str, tuple[int, ...]] = {}
    blocks = family.blocks(family.skeleton(config, torch.float32))
    for index, block in enumerate(blocks):
        parameters = dict(block.named_parameters())
        for location in family.locations(config, index):
            shape = tuple(location.view(parameters[location.parameter]).shape)
            found[family.block_prefix(index) + location.name] = shape
    return len(blocks), found


def config_by_block(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the lists that have one entry per block, as transformers derives them where the file leaves them out."""
    full = dict(data)
    text = text_config(full)
    resolved = family_of(data).config(data).get_text_config().to_dict()
    count = resolved.get("num_hidden_layers")
    for name, value in resolved.items():
        if isinstance(value, list) and len(value) == count and text.get(name) is None:
            text[name] = value
    text["num_hidden_layers"] = count
    return full


def text_config(data: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model: of a multimodal model a copy of `text_config`, put in its
    place; else the config itself."""
    if isinstance(data.get("text_config"), Mapping):
        data["text_config"] = dict(data["text_config"])
        found: dict[str, Any] = data["text_config"]
        return found
    return data


def shapes(folder: Path) -> Shapes:
    """Shapes of the model in a folder, from its config.json only."""
    path = folder / "config.json"
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    return _shapes(folder, stamp)


@functools.lru_cache(maxsize=64)
def _shapes(folder: Path, stamp: int) -> Shapes:
    config = read_config(folder)
    try:
        return family_of(config).shapes(config)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    except Exception as error:  # a config of odd values: whatever the class raises for it
        raise ModelError(
            f"{folder / folder_check.CONFIG}: transformers builds no model from it: {type(error).__name__}: {first_line(error)}; "
            "compare it with the config.json that the model was published with"
        ) from error
