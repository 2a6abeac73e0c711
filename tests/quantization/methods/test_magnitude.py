"""Magnitude pruning: limits in which the mask is known, and the refusals of all methods that prune."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from evidence import generator, llama_shapes, random_weight
from pruned import magnitude

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import ConfigError

DENSE = WeightScheme("dense", 16, -1, scale_dtype="float16", sparsity="0.5")


@pytest.mark.parametrize("sparsity", ["0.3", "0.5", "2:4"])
@pytest.mark.parametrize("compare", ["matrix", "row"])
def test_the_mask_follows_sizes_alone(sparsity: str, compare: str) -> None:
    weight = random_weight(12, 32)
    found = magnitude(weight, sparsity, compare=compare)
    assert torch.equal(magnitude(-8 * weight, sparsity, compare=compare).mask, found.mask)
    again = magnitude(found.dequantize(), sparsity, compare=compare)
    assert torch.equal(again.dequantize(), found.dequantize())
    order = torch.randperm(12, generator=generator(5))
    assert torch.equal(magnitude(weight[order], sparsity, compare=compare).mask, found.mask[order])
    assert torch.equal(found.dequantize(), weight * found.mask)


def test_a_larger_share_prunes_what_a_smaller_one_prunes() -> None:
    weight = random_weight(12, 32)
    masks = [magnitude(weight, share).mask for share in ("0.2", "0.5", "0.8")]
    assert bool((masks[0] | ~masks[1]).all()) and bool((masks[1] | ~masks[2]).all())


def test_survivors_go_to_the_nearest_value() -> None:
    weight = random_weight(12, 32)
    found = magnitude(weight, "0.5", bits=4)
    kept = magnitude(weight, "0.5")
    step = (kept.dequantize().amax(1) - kept.dequantize().amin(1)) / 15
    assert torch.equal(found.mask, kept.mask)
    assert bool(((found.dequantize() - kept.dequantize()).abs() <= 0.51 * step[:, None]).all())


REFUSED = {
    "no sparsity": (WeightScheme("int", 4), "no sparsity is stated"),
    "a share above one": (WeightScheme("int", 4, sparsity="1.5"), "neither a share"),
    "a pattern of nothing": (WeightScheme("int", 4, sparsity="4:4"), "n must be at least 1"),
    "an odd pattern": (WeightScheme("int", 4, sparsity="2:7"), "2:7 does not divide the inputs"),
    "groups": (WeightScheme("int", 4, 2, sparsity="2:4"), "group size 2 is no multiple of the 4"),
    "too little": (WeightScheme("int", 4, sparsity="0.01"), "prunes not one weight of a row"),
    "dense groups": (WeightScheme("dense", 16, 16, sparsity="0.5"), "have no groups"),
    "bits": (WeightScheme("int", 17, sparsity="0.5"), "17 bits"),
    "dense bits": (WeightScheme("dense", 4, sparsity="0.5"), "float16 has 16 bits, not 4"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_the_plan_refuses_with_the_reason(name: str, case: str) -> None:
    weight, reason = REFUSED[case]
    reasons = plugins.build("rounding", name, {}).check(Scheme("", weight), llama_shapes())
    assert any(reason in each for each in reasons), reasons


def test_settings_that_contradict_the_scheme_are_refused() -> None:
    pattern = Scheme("", WeightScheme("int", 4, sparsity="2:4"))
    variant = plugins.build("rounding", "wanda", {"variant": True})
    assert "no pattern" in variant.check(pattern, llama_shapes())[0]
    odd = plugins.build("rounding", "sparsegpt", {"block_size": 30})
    assert "block_size 30 is no multiple of the 4" in odd.check(pattern, llama_shapes())[0]
    assert plugins.build("rounding", "sparsegpt", {}).check(Scheme("", DENSE), llama_shapes()) == []


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_scales_of_survivors_are_searched_as_those_of_rtn(name: str) -> None:
    with pytest.raises(ConfigError, match='no scale_search "wide"'):
        plugins.build("rounding", name, {"scale_search": "wide"})
    built = plugins.build("rounding", name, {"scale_search": "neighbours"})
    integers = Scheme("", WeightScheme("int", 4, sparsity="0.5"))
    assert "have none to try; use scale_search=range" in built.check(integers, llama_shapes())[0]


def test_a_searched_scale_is_never_worse() -> None:
    weight, scheme = random_weight(24, 64), WeightScheme("mxfp4", 4, 32, True, "e8m0")
    scheme = dataclasses.replace(scheme, sparsity="0.5")
    plain, searched = (
        plugins.build("rounding", "magnitude", {"scale_search": search})
        .round_layer("q", weight, None, scheme, generator())
        .dequantize()
        for search in ("none", "neighbours")
    )
    errors = [(found - weight * (found != 0)).square().sum() for found in (plain, searched)]
    assert not torch.equal(plain, searched) and errors[1] < errors[0]
