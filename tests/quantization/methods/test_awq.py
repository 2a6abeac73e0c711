"""AWQ: its two searches never lose to doing nothing, and folding scales leaves the block as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence import (
    FakeBlock,
    FakeEvidence,
    correlated_inputs,
    generator,
    layer_error,
    llama_shapes,
    random_weight,
)
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import ConfigError, MethodError
from harness.core.shapes import ScalePair
from harness.quantization.methods import awq
from harness.quantization.methods.folding import fold_scales
from harness.quantization.numerics.weights import UniformWeight

SCHEME = Scheme("w3g16", WeightScheme("int", 3, 16, False, "float32"))


def rewrite(block: FakeBlock, scheme: Scheme = SCHEME, **settings: Any) -> dict[str, Any]:
    return plugins.build("transform", "awq", settings).rewrite_block(block, scheme, generator())


def rounded(
    name: str, weight: Tensor, inputs: Tensor, scheme: WeightScheme = SCHEME.weight, **settings: Any
) -> UniformWeight:
    return plugins.build("rounding", "awq", settings).round_layer(
        name, weight, FakeEvidence(inputs), scheme, generator()
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("settings", [{}, {"scale_grouped_values": True}])
def test_scales_alone_leave_the_block_as_it_was(kv_heads: int, settings: dict[str, Any]) -> None:
    block = FakeBlock(kv_heads=kv_heads)
    before = {
        name: parameter.detach().clone() for name, parameter in block.module.named_parameters()
    }
    with torch.no_grad():
        outputs = [block.run(hidden) for hidden in block.inputs()]
        notes = rewrite(block, **settings)
        for hidden, output in zip(block.inputs(), outputs, strict=True):
            torch.testing.assert_close(
                block.run(hidden), output, rtol=1e-5, atol=1e-5 * float(output.abs().max())
            )
    changed = {
        name
        for name, parameter in block.module.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert "input_layernorm.weight" in changed and "mlp.down_proj.weight" in changed
    grouped = kv_heads == 2 and not settings
    assert notes["left_out"] == (["self_attn.v_proj → self_attn.o_proj"] if grouped else [])
    assert ("self_attn.o_proj.weight" in changed) is not grouped


def test_the_chosen_loss_is_never_above_that_of_no_scaling() -> None:
    for seed in range(4):
        for note in rewrite(FakeBlock(seed=seed))["scales"].values():
            assert note["loss"] <= note["loss_without"]
            assert 0 <= note["exponent"] < 1


def test_exponent_zero_changes_nothing_at_all() -> None:
    block = FakeBlock()
    before = {
        name: parameter.detach().clone() for name, parameter in block.module.named_parameters()
    }
    notes = rewrite(block, exponents=1)
    for name, parameter in block.module.named_parameters():
        assert torch.equal(parameter, before[name])
    assert all(note["loss"] == note["loss_without"] for note in notes["scales"].values())


def test_equal_activations_give_scales_of_one() -> None:
    block = FakeBlock()
    for evidence in block.evidence.values():
        evidence._statistics["abs_mean"] = torch.full_like(evidence["abs_mean"], 0.7)
    before = {
        name: parameter.detach().clone() for name, parameter in block.module.named_parameters()
    }
    rewrite(block)
    for name, parameter in block.module.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-6, atol=0)


def test_the_loss_of_a_single_linear_is_its_mean_output_error() -> None:
    block = FakeBlock(seed=3)
    note = rewrite(block)["scales"]["mlp.up_proj → mlp.down_proj"]
    fresh = FakeBlock(seed=3)
    weight, x = (
        fresh.linear("mlp.down_proj").weight.detach(),
        fresh.evidence["mlp.down_proj"]["inputs"].reshape(-1, 64),
    )
    grid_rounded = awq._nearest(weight, SCHEME.weight, "awq")
    expected = float((x @ (grid_rounded - weight).T).square().mean())
    assert note["loss_without"] == pytest.approx(expected, rel=1e-4)


def test_searches_see_the_unchanged_block() -> None:
    """The scale of up → down is the same whether or not the norm before up was scaled in the same call."""
    whole, single = FakeBlock(seed=5), FakeBlock(seed=5)
    single.shapes = type(single.shapes)(
        **{**single.shapes.__dict__, "pairs": single.shapes.pairs[-1:]}
    )
    last = "mlp.up_proj → mlp.down_proj"
    assert rewrite(whole)["scales"][last] == rewrite(single)["scales"][last]


def test_norms_with_an_offset_and_biases_are_folded() -> None:
    block = FakeBlock()
    norm = block.module.get_submodule("input_layernorm")
    norm.bias = nn.Parameter(torch.ones(32))
    before = (norm.weight.detach().clone(), norm.bias.detach().clone())  # type: ignore[operator, union-attr]
    scales = torch.linspace(0.5, 2, 32)
    with torch.no_grad():
        fold_scales(
            block, ScalePair("input_layernorm", ("self_attn.q_proj",), "norm", offset=1.0), scales
        )
    torch.testing.assert_close(1 + norm.weight, (1 + before[0]) / scales)  # type: ignore[operator]
    torch.testing.assert_close(norm.bias, before[1] / scales)  # type: ignore[arg-type]


def test_rounding_after_scales_beats_rounding_alone() -> None:
    """The point of it all, on the output of the block with all linears at 3 bits."""
    gains = []
    for seed in range(3):
        plain, scaled = FakeBlock(seed=seed), FakeBlock(seed=seed)
        with torch.no_grad():
            rewrite(scaled)
            scaled.observe()
            errors = []
            for block, name in ((plain, "rtn"), (scaled, "awq")):
                method = plugins.build("rounding", name, {})
                for shape in block.shapes.linears:
                    linear = block.linear(shape.name)
                    evidence = block.evidence[shape.name]
                    result = method.round_layer(
                        shape.name, linear.weight.detach(), evidence, SCHEME.weight, generator()
                    )
                    linear.weight.copy_(result.dequantize())
                outputs = zip(block.inputs(), block.references(), strict=True)
                errors.append(sum(float((block.run(x) - y).square().sum()) for x, y in outputs))
        gains.append(errors[1] / errors[0])
    assert sum(gains) / len(gains) < 0.8


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_never_raises_the_error_of_a_group(bits: int) -> None:
    scheme = WeightScheme("int", bits, 16, False, "float32")
    weight, inputs = random_weight(24, 64), correlated_inputs(64)
    x = inputs.reshape(-1, 4, 16)
    errors = []
    for clip in (True, False):
        change = (
            rounded("mlp.up_proj", weight, inputs, scheme, clip=clip).dequantize() - weight
        ).reshape(24, 4, 16)
        errors.append(torch.einsum("ogk,tgk->ogt", change, x).square().mean(-1))
    assert bool((errors[0] <= errors[1] * (1 + 1e-4) + 1e-12).all())
    assert float(errors[0].sum()) < float(errors[1].sum())


def test_queries_keys_and_whole_rows_are_not_clipped() -> None:
    weight, inputs = random_weight(24, 64), correlated_inputs(64)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "attn.Wqkv", "attention.query_key_value"):
        found, plain = rounded(name, weight, inputs), rounded(name, weight, inputs, clip=False)
        assert torch.equal(found.dequantize(), plain.dequantize())
    rows = WeightScheme("int", 3, -1, False, "float32")
    whole = rounded("mlp.up_proj", weight, inputs, rows)
    assert torch.equal(
        whole.dequantize(), rounded("mlp.up_proj", weight, inputs, rows, clip=False).dequantize()
    )
    clipped = rounded("block_sparse_moe.experts.0.w1", weight, inputs).dequantize()
    assert not torch.equal(
        clipped, rounded("block_sparse_moe.experts.0.w1", weight, inputs, clip=False).dequantize()
    )


def test_few_tokens_are_all_used_and_many_are_taken_at_equal_distances() -> None:
    inputs = correlated_inputs(32, sequences=2, length=50)
    tokens = inputs.reshape(-1, 2, 16)
    expected = torch.einsum("tgi,tgj->gij", tokens, tokens) / 100
    torch.testing.assert_close(awq.group_moments(inputs, 16, 512), expected)
    fourth = tokens[::4]
    torch.testing.assert_close(
        awq.group_moments(inputs, 16, 25), torch.einsum("tgi,tgj->gij", fourth, fourth) / 25
    )


def test_without_clipping_it_is_round_to_nearest_on_its_grid() -> None:
    weight, inputs = random_weight(24, 64), correlated_inputs(64)
    plain = plugins.build("rounding", "rtn", {"grid": "awq"}).round_layer(
        "x", weight, None, SCHEME.weight, generator()
    )
    assert torch.equal(
        rounded("mlp.up_proj", weight, inputs, clip=False).dequantize(), plain.dequantize()
    )
    assert layer_error(
        weight, rounded("mlp.up_proj", weight, inputs).dequantize(), inputs
    ) < layer_error(weight, plain.dequantize(), inputs)


def test_what_cannot_run_is_refused_or_fails_by_name() -> None:
    shapes = llama_shapes()
    without = type(shapes)(**{**shapes.__dict__, "pairs": ()})
    method = plugins.build("transform", "awq", {})
    assert method.check(SCHEME, without) == [
        'family "llama" states no place where a scale can be folded'
    ]
    assert (
        "group size 48 does not divide"
        in method.check(Scheme("x", WeightScheme(group_size=48)), shapes)[0]
    )
    weight, inputs = random_weight(24, 64), correlated_inputs(64)
    inputs[0, 0, 0] = torch.inf
    with pytest.raises(
        MethodError, match=r"mlp\.up_proj: the calibration inputs hold NaN or infinity"
    ):
        rounded("mlp.up_proj", weight, inputs)
    block = FakeBlock()
    block.evidence["self_attn.q_proj"]._statistics["abs_mean"] = torch.full((32,), torch.nan)
    with pytest.raises(MethodError, match=r"block 0: no scale for input_layernorm"):
        rewrite(block)
    for kind, settings in (
        ("transform", {"exponents": 0}),
        ("rounding", {"clip_steps": 21}),
        ("rounding", {"clip_tokens": 0}),
    ):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            plugins.build(kind, "awq", settings)
