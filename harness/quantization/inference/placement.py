"""Placement of a model that one device cannot hold: spread over several devices, or with its blocks on the CPU between uses.

Blocks are never split. The hooks of accelerate move hidden states from one device to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.quantization.models.protocols import DecoderFamily, tied


def device_map(
    model: PreTrainedModel, family: DecoderFamily, devices: Sequence[str]
) -> dict[str, str]:
    """The device of every part: consecutive blocks in shares of about equal bytes, to within one block.

    model: its tensors may be on the meta device. What comes before the blocks, and a head that is tied to it, stand on the first
    device, the final norm and the head on the last.
    """
    same, root = tied(model), tuple(family.blocks_name.split("."))
    sizes: dict[str, int] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        part = _part(name, root)
        sizes[part] = sizes.get(part, 0) + (
            0 if name in same else tensor.numel() * tensor.element_size()
        )
    inside = f"{family.blocks_name}."
    blocks = [name for name in sizes if name.startswith(inside)]
    pinned = {_part(name, root) for name in same}
    last = [name for name in sizes if name in family.after and name not in pinned]
    first = [name for name in sizes if name not in {*blocks, *last}]
    total, before = max(1, sum(sizes.values())), sum(sizes[name] for name in first)
    placed = dict.fromkeys(first, devices[0])
    for name in blocks:
        middle = before + sizes[name] / 2
        placed[name] = devices[min(len(devices) - 1, int(middle * len(devices) / total))]
        before += sizes[name]
    return placed | dict.fromkeys(last, devices[-1])


def device_of(placed: dict[str, str], family: DecoderFamily, name: str) -> torch.device:
    """The device of the tensor or module with this name."""
    return torch.device(placed[_part(name, tuple(family.blocks_name.split(".")))])


def spread(model: nn.Module, placed: dict[str, str]) -> None:
    """Make a model run whose parts are placed: inputs go to the first device, and logits come back there."""
    from accelerate import dispatch_model

    dispatch_model(
        model, device_map=placed, skip_keys=getattr(model, "_skip_keys_device_placement", None)
    )


def offload(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Keep blocks in main memory: each goes to the device for its forward pass, and back when the next one comes."""
    from accelerate import cpu_offload_with_hook

    hook: Any = None
    for block in blocks:
        _, hook = cpu_offload_with_hook(block, device, hook)


def _part(name: str, root: tuple[str, ...]) -> str:
    """The modules that are placed as one: each block, and each child of the modules that hold the blocks."""
    parts = name.split(".")
    common = 0
    while common < min(len(root), len(parts)) and parts[common] == root[common]:
        common += 1
    return ".".join(parts[: common + 1])
