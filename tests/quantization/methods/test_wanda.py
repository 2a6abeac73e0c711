"""Wanda: limits in which the mask is known."""

from __future__ import annotations

import torch
from evidence import correlated_inputs, generator, layer_error, random_weight
from pruned import magnitude, wanda

from harness.quantization.methods.wanda import by_share_of_sum


def test_inputs_of_equal_norms_leave_magnitude_by_row() -> None:
    weight = random_weight(12, 32)
    signs = torch.randint(0, 2, (2, 16, 32), generator=generator(1)) * 2.0 - 1
    for sparsity in ("0.5", "2:4", "4:8"):
        assert torch.equal(
            wanda(weight, signs, sparsity).mask, magnitude(weight, sparsity, compare="row").mask
        )


def test_the_mask_follows_the_products_alone() -> None:
    weight, inputs = random_weight(12, 32), correlated_inputs(32)
    mask = wanda(weight, inputs).mask
    assert torch.equal(wanda(weight, 4 * inputs).mask, mask)
    scale = 2.0 ** torch.randint(-3, 4, (32,), generator=generator(2))
    assert torch.equal(wanda(weight / scale, inputs * scale).mask, mask)


def test_every_row_loses_the_same_number_and_dead_inputs_go_first() -> None:
    weight, inputs = random_weight(12, 32), correlated_inputs(32)
    inputs[..., [3, 17]] = 0
    mask = wanda(weight, inputs, "0.4").mask
    assert bool(((~mask).sum(1) == 12).all())  # floor(32 · 0.4)
    assert not bool(mask[:, [3, 17]].any())
    more = wanda(weight, inputs, "0.7").mask
    assert bool((mask | ~more).all())  # the kept sets are nested


def test_an_outlying_channel_is_kept_whatever_its_weights() -> None:
    weight, inputs = random_weight(64, 32), correlated_inputs(32, outliers=0)
    inputs[..., 5] *= 20
    assert float(wanda(weight, inputs).mask[:, 5].float().mean()) > 0.9
    assert float(magnitude(weight).mask[:, 5].float().mean()) < 0.7


def test_it_loses_less_of_the_output_than_magnitude() -> None:
    better = 0
    for seed in range(20):
        weight, inputs = random_weight(32, 64, seed), correlated_inputs(64, seed=seed)
        own, theirs = wanda(weight, inputs), magnitude(weight, compare="row")
        better += layer_error(weight, own.dequantize(), inputs) <= layer_error(
            weight, theirs.dequantize(), inputs
        )
    assert better >= 19


def test_zero_rows_stay_zero() -> None:
    weight = random_weight(4, 32)
    weight[1] = 0
    found = wanda(weight, correlated_inputs(32), variant=True)
    assert not bool(found.dequantize()[1].any())


def test_the_variant_prunes_a_share_of_every_rows_sum() -> None:
    scores = torch.rand(200, 64, generator=generator(3)) ** 2
    pruned = by_share_of_sum(scores, 0.5)
    assert abs(float(pruned.float().mean()) - 0.5) <= 0.01
    lost = (scores * pruned).sum(1) / scores.sum(1)
    assert (
        float(lost.max() - lost.min()) < 0.06
    )  # one share of the sum in every row, up to one score
    assert len(set(pruned.sum(1).tolist())) > 1  # so the rows lose different numbers of weights
