"""A cell's model, ready to run: the transformers model with quantized linears, rounded activations and a rounded cache.

Weights come tensor by tensor: what is not quantized from the source model, the rest from the checkpoint. Peak memory: the model in
its dtype (mode "dense"), in its packed size (mode "packed") or one byte per weight (mode "native"), and one block. A model that is
too large for one device is spread over several as it is read, or its blocks stay on the CPU until they run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel

from harness.core.cell import Cell, KVScheme
from harness.core.errors import MethodError, ModelError, StoreError
from harness.core.shapes import Shapes
from harness.quantization.calibration import draw_windows
from harness.quantization.formats.base_model import BaseModel, on_base
from harness.quantization.formats.native import BlockContent, Checkpoint
from harness.quantization.formats.weight_files import DTYPES, ModelWeights
from harness.quantization.inference import activations, kv_cache, placement
from harness.quantization.inference.activations import ActivationQuantizer
from harness.quantization.inference.linear import QuantizedLinear
from harness.quantization.models import family_of, read_config, shapes
from harness.quantization.models.protocols import (
    DecoderFamily,
    WeightLocation,
    get_tensor,
    set_tensor,
    tied,
)
from harness.quantization.numerics.inputs import attach_all, of_module
from harness.quantization.numerics.weights import DenseWeight


def load(
    cell: Cell,
    model_folder: Path,
    checkpoint: Path | None,
    device: str = "cpu",
    mode: str = "dense",
    devices: Sequence[str] = (),
    offload: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """The model of a cell and its tokenizer, in eval mode on the device.

    checkpoint: folder of the cell's checkpoint; None for the full-precision baseline.
    devices: where there are several, the model is spread over them; the first must be `device`.
    offload: its blocks stay on the CPU and visit the device to run.
    Raises StoreError for a damaged or foreign checkpoint, ModelError for a model that cannot be read, MethodError for a scheme
    that cannot be executed.
    """
    stored = Checkpoint.open(checkpoint) if checkpoint is not None else None
    data = read_config(model_folder)
    family = family_of(data)
    _check(cell, shapes(model_folder))
    config = family.config(data)
    dtype = DTYPES[cell.model.dtype]
    model = family.skeleton(config, dtype)
    weights = ModelWeights(model_folder, model)
    placed = placement.device_map(model, family, devices if len(devices) > 1 else [device])
    if offload:
        placed |= {name: "cpu" for name in placed if name.startswith(f"{family.blocks_name}.")}
    where = functools.partial(placement.device_of, placed, family)
    count = len(family.blocks(model))
    quantized = stored is not None and stored.manifest["blocks"] > 0
    if stored is not None and quantized and stored.manifest["blocks"] != count:
        raise StoreError(
            f"{checkpoint}: has {stored.manifest['blocks']} blocks, the model {count}; it is of another model"
        )
    if not quantized and cell.method.quantizes:
        raise StoreError(
            f"{cell.title}: needs a checkpoint with quantized blocks, and {checkpoint or 'none'} was given"
        )

    base = BaseModel.stated(cell, stored.manifest) if stored is not None else None
    _load_ends(model, family, weights, stored, dtype, where)
    quantizers: list[ActivationQuantizer] = []
    for index in range(count):
        target = where(family.block_prefix(index))
        content = stored.block(index, target) if stored is not None and quantized else None
        content = on_base(content, base, index, target) if content is not None else None
        quantizers += _load_block(
            cell, model, family, config, weights, index, content, dtype, target, mode
        )
    for name, buffer in list(model.named_buffers()):
        set_tensor(model, name, buffer.to(where(name)))
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise ModelError(f"{model_folder}: no weights for {', '.join(left[:8])}")

    if offload:
        placement.offload(list(family.blocks(model)), torch.device(device))
    elif len(set(placed.values())) > 1:
        placement.spread(model, placed)

    if (model_folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(model_folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_folder, trust_remote_code=cell.model.trust_remote_code
        )
    except Exception as error:  # each tokenizer class raises errors of its own on odd files
        raise ModelError(
            f"{model_folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())}; copy the files of the same "
            "model's tokenizer into the folder"
        ) from error
    cache = cell.scheme.kv
    static_cache = cache if cache is not None and cache.scales == "static" else None
    if cache is not None and static_cache is None:
        kv_cache.simulate(model, cache)
    static = [quantizer for quantizer in quantizers if not quantizer.scheme.dynamic]
    if static or static_cache:
        _calibrate(cell, model, tokenizer, quantizers, static, static_cache)
    return model.eval(), tokenizer


def _check(cell: Cell, shapes: Shapes) -> None:
    problems = activations.check(cell.scheme, shapes)
    if cell.scheme.kv is not None:
        problems += kv_cache.check(cell.scheme.kv, shapes)
    if problems:
        raise MethodError(f"{cell.title}: " + "; ".join(problems))


def _load_ends(
    model: PreTrainedModel,
    family: DecoderFamily,
    weights: ModelWeights,
    stored: Checkpoint | None,
    dtype: torch.dtype,
    where: Callable[[str], torch.device],
) -> None:
    """Everything outside the blocks. A tied head stays one tensor, unless the checkpoint or the files hold a head of its own."""
    changed = stored.ends() if stored is not None else {}
    own = weights.untied(dtype)
    same = {name: of for name, of in tied(model).items() if name not in own}
    inside = f"{family.blocks_name}."
    outside = [name for name in model.state_dict() if not name.startswith(inside)]
    for name in outside:
        if name in changed:
            set_tensor(model, name, changed[name].to(where(name), dtype))
        elif name not in same:
            set_tensor(model, name, weights.read(name, dtype, where(name)))
    for name, of in same.items():
        if name in outside and name not in changed:
            parent, _, leaf = name.rpartition(".")
            owner, _, owner_leaf = of.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = model.get_submodule(owner)._parameters[
                owner_leaf
            ]
    if own or any(name in changed for name in same):
        model.config.tie_word_embeddings = False


def _load_block(
    cell: Cell,
    model: PreTrainedModel,
    family: DecoderFamily,
    config: PretrainedConfig,
    weights: ModelWeights,
    index: int,
    content: BlockContent | None,
    dtype: torch.dtype,
    device: torch.device,
    mode: str,
) -> list[ActivationQuantizer]:
    """Fill one block; return the quantizers that round its inputs."""
    if content is not None:  # matrices that hold several widths are read at the scheme's
        at = {
            name: weight.at(cell.scheme.weight_for(index, name).bits)
            for name, weight in content.weights.items()
        }
        content = dataclasses.replace(content, weights=at)
    block = family.blocks(model)[index]
    prefix = family.block_prefix(index)
    locations = family.locations(config, index)
    whole = (
        {location.parameter for location in locations if location.is_whole}
        if content is not None
        else set()
    )
    for name in list(block.state_dict()):
        if name not in whole:
            set_tensor(block, name, weights.read(prefix + name, dtype, device))
    if content is not None:
        for name, tensor in content.dense.items():
            set_tensor(
                block,
                name,
                tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype),
            )
        attach_all(block)
    owners: dict[str, list[WeightLocation]] = {}
    for location in locations:
        owners.setdefault(location.parameter.rpartition(".")[0], []).append(location)
    quantizers: list[ActivationQuantizer] = []
    for owner, members in owners.items():
        module = block.get_submodule(owner)
        rounded = _quantizers(cell, index, members)
        quantizers += rounded.values()
        if len(members) == 1 and members[0].is_whole and isinstance(module, nn.Linear):
            location = members[0]
            weight = (
                content.weights[location.name]
                if content is not None
                else DenseWeight(get_tensor(block, location.parameter))
            )
            quantizer = rounded.get(location.name)
            if content is not None or quantizer is not None:
                bias = None if module.bias is None else get_tensor(block, f"{owner}.bias")
                parent, _, leaf = owner.rpartition(".")
                made = QuantizedLinear(
                    weight, bias, dtype, device, quantizer, mode, of_module(module)
                )
                setattr(block.get_submodule(parent), leaf, made)
            continue
        if mode.startswith("native"):
            names = ", ".join(location.name for location in members)
            raise MethodError(
                f"{cell.title}: {names} are one fused matrix, whose codes are not multiplied as such; use mode dense"
            )
        if content is not None:
            for location in members:
                value = content.weights[location.name].dequantize().to(device, dtype)
                if location.is_whole:
                    set_tensor(block, location.parameter, value)
                else:
                    location.view(get_tensor(block, location.parameter)).copy_(value)
        if rounded:
            family.replace_inputs(block, owner, members, functools.partial(_round_inputs, rounded))
    return quantizers


def _quantizers(
    cell: Cell, index: int, members: list[WeightLocation]
) -> dict[str, ActivationQuantizer]:
    """The quantizers for the inputs of a module that holds these matrices, by the first matrix of each input.

    Matrices of one input must have one activation scheme.
    """
    groups: dict[str, list[str]] = {}
    for location in members:
        groups.setdefault(location.group, []).append(location.name)
    found: dict[str, ActivationQuantizer] = {}
    for names in groups.values():
        schemes = {cell.scheme.activation_for(index, name) for name in names}
        if len(schemes) > 1:
            listed = ", ".join(names)
            raise MethodError(
                f"{cell.title}: {listed} of block {index} share a fused parameter: they need one activation scheme"
            )
        (scheme,) = schemes
        if scheme is not None:
            found[names[0]] = ActivationQuantizer(scheme, f"block {index}, {names[0]}")
    return found


def _round_inputs(
    quantizers: Mapping[str, ActivationQuantizer], name: str, inputs: Tensor
) -> Tensor:
    return quantizers[name](inputs) if name in quantizers else inputs


@torch.no_grad()
def _calibrate(
    cell: Cell,
    model: PreTrainedModel,
    tokenizer: Any,
    quantizers: list[ActivationQuantizer],
    static: list[ActivationQuantizer],
    cache: KVScheme | None,
) -> None:
    """Run the calibration windows through the quantized model with no activation rounded, and keep each input's range; with a
    cache of static scales, given here, the cache is not rounded either, and its magnitudes are kept too."""
    if cell.calibration is None:
        dynamic = "use dynamic: true" if static else "use kv.granularity=token_head"
        raise MethodError(
            f"{cell.title}: static scales need calibration data; name a calibration, or {dynamic}"
        )
    if cache is not None:
        kv_cache.observe(model, cache)
    windows = draw_windows(cell.calibration, tokenizer)
    for quantizer in quantizers:
        quantizer.observing = True
    for window in windows:
        model(window[None].to(model.device), use_cache=False)
    for quantizer in quantizers:
        quantizer.observing = False
        if quantizer not in static:
            quantizer.lo = quantizer.hi = None
    if cache is not None:
        try:
            kv_cache.simulate(model, cache)
        except MethodError as error:
            raise MethodError(f"{cell.title}: {error}") from error
