"""SliM-LLM+: SliM-LLM's widths, OmniQuant's training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence import FakeBlock, generator, llama_shapes

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import ConfigError
from harness.quantization.methods.slim_llm_plus import Rounding
from harness.quantization.numerics.grids import from_range
from harness.quantization.numerics.mixed_width import MixedWidthWeight, binarize
from harness.quantization.numerics.weights import QuantizedWeight

NEEDS = ("hessian", "inputs", "reference")


def scheme(bits: int, group_size: int = 8) -> Scheme:
    return Scheme("test", WeightScheme("int", bits, group_size, False, "float32"))


def rounded(
    block: FakeBlock, bits: int, group_size: int = 8, **settings: Any
) -> dict[str, MixedWidthWeight]:
    return plugins.build("rounding", "slim_llm_plus", settings).round_block(
        block, scheme(bits, group_size), generator()
    )


@pytest.mark.parametrize("bits", [2, 3])
def test_untrained_groups_have_their_width_and_a_range_shrunk_a_little(bits: int) -> None:
    block = FakeBlock(needs=NEEDS)
    shrink = torch.sigmoid(torch.tensor(4.0))
    for name, found in rounded(block, bits, epochs=0).items():
        assert sum(found.bits) == bits * len(found.bits) and len(set(found.bits)) > 1
        groups = block.linear(name).weight.detach().reshape(found.shape[0], -1, 8)
        values = found.dequantize().reshape(groups.shape)
        for group, width in enumerate(found.bits):
            w = groups[:, group]
            if width == 1:
                codes, scale, mean = binarize(w, "float32")
                expected = mean + scale * (2 * codes.float() - 1)
            else:
                lo, hi = w.amin(1, keepdim=True) * shrink, w.amax(1, keepdim=True) * shrink
                expected = from_range(lo, hi, width, False, "omniquant").nearest(w)
            assert torch.equal(values[:, group], expected)


def test_the_widths_are_slim_llms() -> None:
    """Both rank groups by the same salience where the Hessian is far from singular; here on the same block."""
    block = FakeBlock(needs=NEEDS)
    plus = rounded(block, 3, epochs=0)
    slim = plugins.build("rounding", "slim_llm", {})
    same = 0
    for name, found in plus.items():
        weight = block.linear(name).weight.detach()
        same += (
            found.bits
            == slim.round_layer(
                name, weight, block.evidence[name], scheme(3).weight, generator()
            ).bits
        )
    assert same >= 5


@pytest.mark.parametrize("bits", [2, 3])
def test_training_lowers_the_loss_and_the_block_error(bits: int) -> None:
    block = FakeBlock(needs=NEEDS)
    errors = []
    for epochs in (0, 15):
        weights = {
            f"{name}.weight": weight.dequantize()
            for name, weight in rounded(block, bits, epochs=epochs).items()
        }
        with torch.no_grad():
            pairs = zip(block.inputs(), block.references(), strict=True)
            errors.append(sum(float((block.run(x, weights) - y).square().mean()) for x, y in pairs))
    losses = block.notes["slim_llm_plus"]["loss"]
    assert losses[-1] < losses[0] and errors[1] < errors[0]


def test_zero_points_outside_the_codes_are_stored_exactly() -> None:
    block = FakeBlock(needs=NEEDS)
    with torch.no_grad():
        block.linear("self_attn.q_proj").weight.abs_()  # groups of one sign: ranges without zero
    block.observe()
    found = rounded(block, 3, epochs=0)["self_attn.q_proj"]
    assert bool((found.offset < 0).any())
    again = QuantizedWeight.kinds["mixed_width"].unpack(*found.pack())
    assert torch.equal(again.dequantize(), found.dequantize())


@pytest.mark.parametrize(
    "weight",
    [WeightScheme("int", 3, -1), WeightScheme("int", 3, 8, True), WeightScheme("int", 6, 8)],
)
def test_what_cannot_run_is_refused(weight: WeightScheme) -> None:
    assert Rounding(Rounding.Settings()).check(Scheme("test", weight), llama_shapes())


@pytest.mark.parametrize(
    "settings", [{"epochs": -1}, {"clip_rate": 0.0}, {"damping_fraction": 0.0}]
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plugins.build("rounding", "slim_llm_plus", settings)
