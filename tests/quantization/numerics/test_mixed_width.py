"""Widths per group: how many groups move, which of them, and the grids at every width."""

from __future__ import annotations

import pytest
import torch
from evidence import correlated_inputs, generator, random_weight

from harness.quantization.numerics.grids import fit
from harness.quantization.numerics.mixed_width import (
    binarize,
    group_salience,
    nearest_at,
    search_moved,
    widths_of,
)


def test_incremental_divergences_are_those_of_whole_products() -> None:
    """Every candidate computed by itself picks the same number of moved groups."""
    for seed in range(3):
        weight, inputs = random_weight(20, 128, seed), list(correlated_inputs(128, seed=seed))
        salience = torch.rand(8, generator=generator(seed))
        losses = []
        for moved in range(1, 4):
            widths = widths_of(salience, 2, moved)
            groups = weight.reshape(20, 8, 16)
            candidate = torch.cat(
                [nearest_at(groups[:, g], width, "float32") for g, width in enumerate(widths)],
                dim=1,
            )
            total = 0.0
            for x in inputs:
                p = torch.softmax(x @ candidate.T, -1).clamp(min=1e-6)
                o = torch.softmax(x @ weight.T, -1).clamp(min=1e-6)
                total += float((p * (p.log() - o.log())).sum(-1).mean())
            losses.append(total)
        assert (
            search_moved(weight, inputs, salience, 2, 16, "float32")
            == losses.index(min(losses)) + 1
        )


def test_the_least_salient_groups_lose_and_the_most_salient_win() -> None:
    assert widths_of(torch.tensor([5.0, 1.0, 3.0, 9.0, 2.0]), 3, 2) == (4, 2, 3, 4, 2)
    assert widths_of(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2, 1) == (1, 2, 2, 3)
    weight, factor = random_weight(4, 8), torch.triu(torch.rand(8, 8, generator=generator(1)) + 0.5)
    by_hand = [
        float(((weight[:, a : a + 4] / factor.diagonal()[a : a + 4]) ** 2).sum()) for a in (0, 4)
    ]
    assert group_salience(weight, factor, 4).tolist() == pytest.approx(by_hand)


def test_one_bit_is_the_mean_and_the_mean_magnitude() -> None:
    values = random_weight(8, 16) + 0.02
    codes, scale, mean = binarize(values, "float32")
    assert torch.allclose(mean, values.mean(1, keepdim=True)) and torch.allclose(
        scale, values.abs().mean(1, keepdim=True)
    )
    expected = mean + scale * torch.sign(values - mean)
    assert torch.allclose(mean + scale * (2 * codes.float() - 1), expected)


def test_wide_groups_use_gptqs_grid() -> None:
    groups = random_weight(8, 32).reshape(8, 2, 16)
    assert torch.equal(
        nearest_at(groups, 3, "float32"), fit(groups, 3, False, "gptq").nearest(groups)
    )
