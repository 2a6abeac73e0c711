"""Models that are too large for one device: where their parts stand, and that they compute the same there.

No card is needed: tensors without data stand on devices that do not exist, and every operation on two of them is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import RTN, cell, quantize
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.core.cell import Method
from harness.evaluation import prefix_scoring
from harness.quantization.inference import placement
from harness.quantization.inference.load import load
from harness.quantization.models import family_of, read_config
from harness.quantization.models.protocols import set_tensor, tied

FAMILIES = [
    "llama",
    "qwen2",
    "opt",
    "gpt_neox",
    "falcon_7b",
    "mixtral",
    "gemma2",
    "phi3",
    "llava_next",
    "gpt2",
]
DEVICES = ("cpu:1", "cpu:2", "cpu:3")


def skeleton(folder: Path) -> tuple[Any, Any]:
    data = read_config(folder)
    family = family_of(data)
    return family, family.skeleton(family.config(data), torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_spread_in_order_and_evenly(tiny_model: Callable[..., Path], name: str) -> None:
    family, model = skeleton(tiny_model(name, num_hidden_layers=12, vocab_size=259))
    placed = placement.device_map(model, family, DEVICES)
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    # KeyError: one has no place
    where = {each: placement.device_of(placed, family, each) for each in tensors}
    blocks = [
        {str(where[each]) for each in where if each.startswith(family.block_prefix(i))}
        for i in range(12)
    ]
    assert all(len(stands) == 1 for stands in blocks)
    order = [stands.pop() for stands in blocks]
    assert order == sorted(order) and set(order) == set(DEVICES)
    assert all(where[each] == where[other] for each, other in tied(model).items())
    bytes_of = {
        each: tensor.numel() * tensor.element_size()
        for each, tensor in tensors.items()
        if each not in tied(model)
    }
    held = [
        sum(size for each, size in bytes_of.items() if str(where[each]) == device)
        for device in DEVICES
    ]
    largest = max(
        sum(size for each, size in bytes_of.items() if each.startswith(family.block_prefix(i)))
        for i in range(12)
    )
    assert max(held) <= sum(held) / 3 + largest


# which looks at values to route
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixtral"])
def test_no_operation_mixes_devices(tiny_model: Callable[..., Path], name: str) -> None:
    family, model = skeleton(tiny_model(name))
    placed = placement.device_map(model, family, DEVICES)
    with FakeTensorMode():
        for each, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(),
        ]:  # untied
            set_tensor(
                model,
                each,
                torch.empty(
                    tensor.shape,
                    dtype=tensor.dtype,
                    device=placement.device_of(placed, family, each),
                ),
            )
        placement.spread(model, placed)
        ids = torch.zeros(1, 8, dtype=torch.int64, device=DEVICES[0])
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False).logits
            sees = torch.ones(1, 8, 8, dtype=torch.bool, device=DEVICES[0])
            picked = prefix_scoring._logits_at(
                model, ids, ids, sees, torch.zeros(3, dtype=torch.int64, device=DEVICES[0])
            )
    assert str(picked.device) == DEVICES[0] and picked.shape[0] == 3
    assert str(found.device) == DEVICES[0] and found.shape[:2] == (1, 8)


@pytest.mark.parametrize("method", [Method("none"), RTN], ids=["none", "rtn"])
def test_blocks_in_main_memory_compute_the_same(
    tiny_model: Callable[..., Path], tmp_path: Path, method: Method
) -> None:
    folder = tiny_model("llama")
    wanted = cell(folder, method)
    if method is RTN:
        quantize([wanted], folder, tmp_path / "store")
    checkpoint = None if method is not RTN else next((tmp_path / "store").iterdir())
    ids = torch.arange(12)[None]
    plain, _ = load(wanted, folder, checkpoint)
    moved, _ = load(wanted, folder, checkpoint, offload=True)
    assert all(hasattr(block, "_hf_hook") for block in moved.model.layers)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, moved(ids).logits)
        assert torch.equal(plain(ids, use_cache=True).logits, moved(ids, use_cache=True).logits)
