"""What the families say of a model agrees with the model that transformers builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.core.errors import ModelError
from harness.quantization import models
from harness.quantization.models.protocols import tied

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_agree_with_the_model(tiny_model: Callable[..., Path], family: str) -> None:
    folder = tiny_model(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    shapes = models.shapes(folder)
    block = model.model.layers[0]
    in_block = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {shape.name for shape in shapes.linears} == set(in_block), (
        "every linear of the block is quantizable"
    )
    for shape in shapes.linears:
        linear = in_block[shape.name]
        assert (shape.out_features, shape.in_features, shape.bias) == (
            *linear.weight.shape,
            linear.bias is not None,
        )
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    assert shapes.tied_head == (family == "qwen2") and shapes.blocks == 3
    assert (shapes.heads, shapes.kv_heads, shapes.head_dim) == (4, 2, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_weighs_nothing_and_knows_its_buffers(
    tiny_model: Callable[..., Path], family: str
) -> None:
    folder = tiny_model(family)
    data = models.read_config(folder)
    ours = models.family_of(data)
    skeleton = ours.skeleton(ours.config(data), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert all(parameter.is_meta for parameter in skeleton.parameters()) and not skeleton.training
    buffers = dict(theirs.named_buffers())
    assert buffers.keys() == dict(skeleton.named_buffers()).keys()
    for name, buffer in skeleton.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert bool(tied(skeleton)) == (family == "qwen2")


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_share_their_input_and_pairs_can_be_folded(
    tiny_model: Callable[..., Path], family: str
) -> None:
    """Each group's members see one input; scaling a pair's producer down and its consumers up leaves the logits."""
    folder = tiny_model(family)
    data = models.read_config(folder)
    ours = models.family_of(data)
    config = ours.config(data)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(20)[None]
    locations = ours.locations(config, 0)
    block = model.model.layers[0]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        block.get_submodule(location.name).register_forward_pre_hook(
            lambda _m, args, name=location.name: seen.update({name: args[0]})
        )
        for location in locations
    ]
    watched: dict[str, torch.Tensor] = {}
    with torch.no_grad(), ours.watch(block, locations, lambda group, x: watched.update({group: x})):
        before = model(tokens).logits
    for handle in handles:
        handle.remove()
    assert all(seen[location.name] is watched[location.group] for location in locations)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for pair in ours.pairs(config):
            producer = block.get_submodule(pair.producer)
            scale = 0.5 + torch.rand(producer.weight.shape[0], generator=generator)
            producer.weight.copy_(
                (producer.weight.T / scale).T
                if producer.weight.ndim == 2
                else producer.weight / scale
            )
            if getattr(producer, "bias", None) is not None:
                producer.bias.copy_(producer.bias / scale)
            wide = (
                scale.view(-1, 16).repeat_interleave(pair.repeats, 0).flatten()
                if pair.repeats > 1
                else scale
            )
            for consumer in pair.consumers:
                linear = block.get_submodule(consumer)
                linear.weight.mul_(wide)
        after = model(tokens).logits
    assert torch.allclose(before, after, atol=1e-3)


def test_unknown_architectures_name_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LamaForCausalLM"], "model_type": "llama"})
    )
    known = models.family_of({"architectures": ["LlamaForCausalLM"]})
    assert known.architectures[0] == "LlamaForCausalLM"
    with pytest.raises(ModelError, match="cannot be read"):
        models.read_config(tmp_path / "nowhere")
