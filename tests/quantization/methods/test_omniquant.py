"""OmniQuant: learned ranges start from RTN's and improve on them; learned scales leave the function as it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import FakeBlock, generator, llama_shapes, random_weight
from small import cell, failures, part, quantize, windows
from torch import Tensor, nn

from harness.core import plugins
from harness.core.cell import ActivationScheme, Method, Scheme, WeightScheme, quantize_key
from harness.core.errors import ConfigError, MethodError
from harness.quantization.formats.native import Checkpoint
from harness.quantization.methods import omniquant
from harness.quantization.numerics.grids import Grid, fit, from_range
from harness.quantization.numerics.training import clipped_grid, nearest_through, train
from harness.quantization.numerics.weights import QuantizedWeight
from harness.quantization.pipeline.blocks import Blocks, StreamedBlock


def w(bits: int, group_size: int = 16, activation: ActivationScheme | None = None) -> Scheme:
    return Scheme("test", WeightScheme("int", bits, group_size, False, "float32"), activation)


def rounded(block: FakeBlock, scheme: Scheme, **settings: Any) -> dict[str, QuantizedWeight]:
    return plugins.build("rounding", "omniquant", settings).round_block(block, scheme, generator())


def block_error(block: FakeBlock, weights: dict[str, QuantizedWeight]) -> float:
    """Mean squared distance of the block's output to its references with these weights in place."""
    placed = {f"{name}.weight": weight.dequantize() for name, weight in weights.items()}
    with torch.no_grad():
        pairs = zip(block.inputs(), block.references(), strict=True)
        return sum(float((block.run(x, placed) - y).square().mean()) for x, y in pairs)


@pytest.mark.parametrize("group_size", [16, -1])
def test_without_clipping_it_is_round_to_nearest_on_its_grid(group_size: int) -> None:
    block, scheme = FakeBlock(), w(3, group_size)
    rtn = plugins.build("rounding", "rtn", {"grid": "omniquant"})
    for name, found in rounded(block, scheme, clip=False).items():
        weight = block.linear(name).weight.detach()
        assert torch.equal(
            found.dequantize(),
            rtn.round_layer(name, weight, None, scheme.weight, generator()).dequantize(),
        )


def test_untrained_ranges_are_shrunk_a_little() -> None:
    block, scheme = FakeBlock(), w(4)
    shrink = torch.sigmoid(torch.tensor(4.0))
    for name, found in rounded(block, scheme, epochs=0).items():
        groups = block.linear(name).weight.detach().reshape(-1, 16)
        lo, hi = groups.amin(1, keepdim=True) * shrink, groups.amax(1, keepdim=True) * shrink
        expected = from_range(lo, hi, 4, False, "omniquant").nearest(groups)
        assert torch.equal(found.dequantize().reshape(-1, 16), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_large_strengths_leave_the_range(symmetric: bool) -> None:
    groups = random_weight(16, 64).reshape(16, 4, 16)
    strength = torch.full((16, 4, 1), 30.0)
    found = clipped_grid(groups, strength, strength, 3, symmetric, "omniquant", "float32")
    plain = fit(groups, 3, symmetric, "omniquant")
    assert torch.equal(found.scale, plain.scale) and torch.equal(found.zero, plain.zero)


@pytest.mark.parametrize("side", ["upper", "lower"])
def test_gradients_of_the_strengths_are_those_of_the_smooth_part(side: str) -> None:
    """Finite differences with codes held fixed: what is inside the grid moves with w / s, clipped codes with s alone."""
    groups = random_weight(6, 32, seed=3).double().reshape(6, 2, 16)
    target = random_weight(6, 32, seed=4).double().reshape(6, 2, 16)
    strengths = {
        name: torch.full((6, 2, 1), 1.0, dtype=torch.float64, requires_grad=True)
        for name in ("upper", "lower")
    }

    def grid_of() -> Grid:
        return clipped_grid(
            groups, strengths["upper"], strengths["lower"], 3, False, "omniquant", "float32"
        )

    grid = grid_of()
    loss = (nearest_through(groups, grid) - target).square().sum()
    (gradient,) = torch.autograd.grad(loss, strengths[side])

    with torch.no_grad():
        raw = torch.round(groups / grid.scale) + grid.zero
        inside = (raw >= 0) & (raw <= grid.top)
        residue = torch.round(groups / grid.scale) - groups / grid.scale

        def smooth() -> Tensor:
            scale = grid_of().scale
            codes = torch.where(
                inside, groups / scale + residue + grid.zero, raw.clamp(0, grid.top)
            )
            return (scale * (codes - grid.zero) - target).square().sum((1, 2))

        step = 1e-6
        for group in (0, 1):
            strengths[side][:, group] += step
            above = smooth()
            strengths[side][:, group] -= 2 * step
            below = smooth()
            strengths[side][:, group] += step
            assert torch.allclose(
                (above - below) / (2 * step), gradient[:, group, 0], rtol=1e-4, atol=1e-9
            )


@pytest.mark.parametrize("bits", [2, 3])
def test_training_lowers_the_loss_and_the_block_error(bits: int) -> None:
    block, scheme = FakeBlock(), w(bits)
    untrained = block_error(block, rounded(block, scheme, epochs=0))
    trained = block_error(block, rounded(block, scheme, epochs=15))
    losses = block.notes["omniquant"]["loss"]
    assert len(losses) == 15 and losses[-1] <= losses[0]
    assert trained < 0.95 * untrained


def test_the_augmented_loss_is_another_objective() -> None:
    block = FakeBlock()
    plain, more = (rounded(block, w(2), epochs=3, augmented_loss=flag) for flag in (False, True))
    # references are of the same inputs here, so the added term doubles the loss and Adam's steps hardly change
    assert block.notes["omniquant"]["loss"][0] > 0
    assert all(plain[name].shape == more[name].shape for name in plain)


def test_more_epochs_start_alike() -> None:
    losses = []
    for epochs in (2, 4):
        block = FakeBlock()
        rounded(block, w(3), epochs=epochs)
        losses.append(block.notes["omniquant"]["loss"])
    assert losses[0] == losses[1][:2]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_learned_scales_leave_the_function(kv_heads: int) -> None:
    block = FakeBlock(kv_heads=kv_heads)
    before = [block.run(x).detach() for x in block.inputs()]
    weights = rounded(block, w(4), epochs=3, transform=True, grouped_heads=True)
    norm = "input_layernorm.weight"
    assert not torch.equal(block.module.get_parameter(norm), FakeBlock().module.get_parameter(norm))
    for x, y in zip(block.inputs(), before, strict=True):
        assert float((block.run(x) - y).abs().max().detach() / y.abs().max()) < 1e-5
    for name, weight in weights.items():
        error = (weight.dequantize() - block.linear(name).weight).square().sum() / block.linear(
            name
        ).weight.square().sum()
        assert float(error.detach()) < 0.05, (
            "codes are of the scaled weights, which the block holds now"
        )


def streamed(folder: Path, tokens: Tensor) -> StreamedBlock:
    blocks = Blocks(folder, "float32", "cpu")
    hidden = blocks.start(tokens)
    original = blocks.tensors(0)
    module = blocks.build(0, {name: tensor.clone() for name, tensor in original.items()})
    return StreamedBlock(blocks, 0, module, original, {}, hidden, None)


def random_scales(block: StreamedBlock) -> tuple[omniquant._Linears, omniquant._Scales]:
    """The transformation of a block with every scale far from 1."""
    settings = omniquant.Rounding.Settings(transform=True)
    linears, scales = omniquant._Linears(block, w(4), settings), omniquant._Scales(block, settings)
    rng = generator(5)
    with torch.no_grad():
        for parameter in scales.parameters():
            parameter.copy_(torch.exp(0.5 * torch.randn(parameter.shape, generator=rng)))
    return linears, scales


def transformable() -> list[str]:
    """The tiny models of every family that states where queries and keys can be scaled."""
    return [
        "llama",
        "mistral",
        "qwen2",
        "opt",
        "phi3",
        "falcon_7b",
        "gemma",
        "gemma2",
        "mixtral",
        "qwen2_moe",
    ]


@pytest.mark.parametrize("family", transformable())
def test_any_scales_leave_a_real_block_as_it_is(
    tiny_model: Callable[..., Path], family: str
) -> None:
    """Rotary positions mix the halves of a head, so queries and keys have tied scales; biases are scaled with their rows."""
    block = streamed(tiny_model(family), windows(2))
    linears, scales = random_scales(block)
    with torch.no_grad():
        for hidden in block.inputs():
            plain = block.run(hidden)
            scaled = block.run(hidden, linears.cast(scales.apply(linears.originals)))
            assert float((scaled - plain).abs().max() / plain.abs().max()) < 2e-5


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_untied_scales_of_keys_would_change_it(
    tiny_model: Callable[..., Path], kv_heads: int
) -> None:
    block = streamed(tiny_model("llama", num_key_value_heads=kv_heads), windows(2))
    linears, scales = random_scales(block)
    with torch.no_grad():
        plain = block.run(block.inputs()[0])
        tied = dict(scales.apply(linears.originals))
        assert (
            float((block.run(block.inputs()[0], tied) - plain).abs().max() / plain.abs().max())
            < 2e-5
        )
        factor = torch.exp(
            torch.randn(tied["self_attn.k_proj.weight"].shape[0], 1, generator=generator(6))
        )
        tied["self_attn.k_proj.weight"] = tied["self_attn.k_proj.weight"] * factor
        assert float((block.run(block.inputs()[0], tied) - plain).abs().max()) > 1e-3


class BiasedBlock(FakeBlock):
    """LayerNorms and biases everywhere, as in OPT."""

    def __init__(self) -> None:
        super().__init__()
        rng = generator(7)
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = nn.LayerNorm(32)
            norm.weight.data = 1 + 0.3 * torch.randn(32, generator=rng)
            norm.bias.data = 2 * torch.randn(32, generator=rng)
            setattr(self.module, name, norm)
        for shape in self.shapes.linears:
            self.linear(shape.name).bias = nn.Parameter(
                0.3 * torch.randn(shape.out_features, generator=rng)
            )
        linears = tuple(dataclasses.replace(shape, bias=True) for shape in self.shapes.linears)
        self.shapes = dataclasses.replace(self.shapes, linears=linears)
        with torch.no_grad():
            self._references = [self.module(x[None]) for x in self.calibration]


def test_learned_shifts_leave_the_function() -> None:
    """y = (W s) ((x - d) / s) + W d + b, with the shift taken from the middle of the inputs at first."""
    block = BiasedBlock()
    before = [block.run(x).detach() for x in block.inputs()]
    bias = block.module.get_parameter("input_layernorm.bias").detach().clone()
    values = block.module.get_parameter("self_attn.v_proj.bias").detach().clone()
    rounded(block, w(4), epochs=2, transform=True, shift=True)
    assert not torch.equal(block.module.get_parameter("input_layernorm.bias"), bias)
    assert not torch.equal(block.module.get_parameter("self_attn.v_proj.bias"), values)
    for x, y in zip(block.inputs(), before, strict=True):
        assert float((block.run(x).detach() - y).abs().max() / y.abs().max()) < 1e-5


def test_shifts_centre_the_inputs() -> None:
    block = BiasedBlock()
    centres = []
    for _ in range(2):
        middle: list[Tensor] = []

        def receive(name: str, x: Tensor, seen: list[Tensor] = middle) -> Tensor:
            if name == "self_attn.q_proj":
                seen.append((x.amax((0, 1)) + x.amin((0, 1))) / 2)
            return x

        block.run(block.inputs()[0], None, receive)
        centres.append(float(middle[0].abs().mean()))
        rounded(block, w(4), epochs=0, transform=True, shift=True, exponent=0.0)
    assert centres[1] < 0.3 * centres[0]


W4A4 = ActivationScheme("int", 4, symmetric=False, grid="omniquant")


def test_activations_are_rounded_while_training() -> None:
    block = FakeBlock()
    plain = rounded(block, w(4), epochs=3)
    quiet = block.notes["omniquant"]["loss"][0]
    found = rounded(block, w(4, activation=W4A4), epochs=3)
    assert block.notes["omniquant"]["loss"][0] > 2 * quiet, "the loss feels the rounded activations"
    assert any(
        not torch.equal(found[name].dequantize(), plain[name].dequantize()) for name in plain
    )
    untouched = rounded(FakeBlock(), w(4, activation=W4A4), epochs=0, clip=False)
    rtn = plugins.build("rounding", "rtn", {"grid": "omniquant"})
    for name, weight in untouched.items():
        expected = rtn.round_layer(
            name, FakeBlock().linear(name).weight.detach(), None, w(4).weight, generator()
        )
        assert torch.equal(weight.dequantize(), expected.dequantize())


def test_scales_help_where_activations_have_outliers() -> None:
    errors = {}
    for transform in (False, True):
        block = FakeBlock()
        with torch.no_grad():
            block.module.get_parameter("input_layernorm.weight")[3] *= 30
            block.module.get_parameter("post_attention_layernorm.weight")[5] *= 30
            block._references = [block.module(x[None]) for x in block.calibration]
        rounded(block, w(4, activation=W4A4), epochs=10, transform=transform)
        errors[transform] = block.notes["omniquant"]["loss"][-1]
    assert errors[True] < errors[False]


def test_many_bits_change_little() -> None:
    block = FakeBlock()
    before = [block.run(x).detach() for x in block.inputs()]
    scheme = w(8, activation=ActivationScheme("int", 16, symmetric=False, grid="omniquant"))
    weights = rounded(block, scheme, epochs=0, transform=True, clip=False)
    placed = {f"{name}.weight": weight.dequantize() for name, weight in weights.items()}
    for x, y in zip(block.inputs(), before, strict=True):
        assert float((block.run(x, placed) - y).abs().max() / y.abs().max()) < 0.05


def test_a_scale_never_reaches_zero() -> None:
    settings = omniquant.Rounding.Settings(transform=True)
    scales = omniquant._Scales(FakeBlock(), settings)
    with torch.no_grad():
        scales.scales[0][:5] = torch.tensor([-3.0, -0.001, 0.0, 0.004, 2.0])
    scales.keep_from_zero()
    assert scales.scales[0][:5].tolist() == pytest.approx([-3.0, -0.01, 0.01, 0.01, 2.0])


@pytest.mark.parametrize(
    ("settings", "shapes", "reason"),
    [
        ({"transform": True}, llama_shapes(kv_heads=2), "grouped_heads=true"),
        (
            {"transform": True},
            dataclasses.replace(llama_shapes(), query_key=None),
            "transform=false",
        ),
        ({"transform": True}, dataclasses.replace(llama_shapes(), pairs=()), "transform=false"),
        ({"transform": True, "shift": True}, llama_shapes(), "shift=false"),
    ],
)
def test_what_a_family_does_not_allow_is_refused(
    settings: dict[str, Any], shapes: Any, reason: str
) -> None:
    (found,) = plugins.build("rounding", "omniquant", settings).check(w(4), shapes)
    assert reason in found
    assert not plugins.build("rounding", "omniquant", {}).check(w(4), shapes), (
        "clipping alone runs everywhere"
    )


def test_activations_that_cannot_be_trained_against_are_refused() -> None:
    method = plugins.build("rounding", "omniquant", {})
    static = dataclasses.replace(W4A4, dynamic=False, granularity="tensor")
    assert "static" in method.check(w(4, activation=static), llama_shapes())[0]
    assert (
        "float8"
        in method.check(w(4, activation=ActivationScheme("float8_e4m3")), llama_shapes())[0]
    )


@pytest.mark.parametrize(
    "settings",
    [{"epochs": -1}, {"exponent": 1.5}, {"clip_rate": 0.0}, {"grid": "omni"}, {"shift": True}],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plugins.build("rounding", "omniquant", settings)


def test_broken_numbers_fail_the_cell() -> None:
    block = FakeBlock()
    block.linear("mlp.up_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(MethodError, match=r"mlp\.up_proj"):
        rounded(block, w(4))
    with pytest.raises(MethodError, match="learning rate"):
        start = nn.Parameter(torch.ones(1))
        train(lambda _sample: start.sum() * math.nan, 2, [{"params": [start], "lr": 1.0}], 3)


def test_a_pass_trains_against_the_full_precision_chain(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    trained = Method("omniquant", rounding=part("omniquant", epochs=4))
    scaled = Method(
        "omniquant_wa", rounding=part("omniquant", epochs=2, transform=True, grouped_heads=True)
    )
    cells = [cell(folder, trained, 3), cell(folder, scaled, 4)]
    assert not failures(quantize(cells, folder, tmp_path))
    checkpoint = Checkpoint.open(tmp_path / quantize_key(cells[0]))
    for index in range(3):
        losses = checkpoint.manifest["notes"][str(index)]["omniquant"]["loss"]
        assert len(losses) == 4 and min(losses[1:]) < losses[0]
        assert not checkpoint.block(index).dense
    rewritten = Checkpoint.open(tmp_path / quantize_key(cells[1]))
    assert set(rewritten.block(1).dense) == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    errors = [entry["weight_error"] for entry in rewritten.manifest["layer_errors"]]
    assert max(errors) < 0.1, "errors are against the scaled weights, not the model's"
