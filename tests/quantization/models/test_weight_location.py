"""A location shows a matrix in its parameter's memory."""

from __future__ import annotations

import torch

from harness.quantization.models.protocols import WeightLocation


def test_locations_are_views() -> None:
    fused = torch.arange(24.0).reshape(6, 4)
    part = WeightLocation("k", "qkv", "qkv.weight", rows=(2, 4))
    part.view(fused).zero_()
    assert fused[2:4].eq(0).all() and fused.count_nonzero() == 15
    turned = WeightLocation("c", "c", "c.weight", transposed=True)
    turned.view(fused)[0] = -1
    assert fused[:, 0].eq(-1).all()
    experts = torch.zeros(3, 4, 5)
    WeightLocation("e", "e", "experts", expert=1, rows=(2, 4)).view(experts).fill_(1)
    assert experts.sum() == 10 and experts[1, 2:].eq(1).all()
