"""SmoothQuant and bi-smoothing: what they leave alone, their limits, and what they do to outliers of either side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import FakeBlock, generator, llama_shapes
from small import cell, content, failures, part, quantize, windows
from torch import Tensor

from harness.core import plugins
from harness.core.cell import ActivationScheme, Scheme, WeightScheme
from harness.core.shapes import ScalePair
from harness.quantization.methods.bi_smoothing import Transform as BiSmoothing
from harness.quantization.methods.smoothquant import Transform as SmoothQuant
from harness.quantization.methods.smoothquant import smoothing_scales
from harness.quantization.numerics.activations import round_dynamic
from harness.quantization.numerics.grids import fit
from harness.quantization.numerics.inputs import of_module

SCHEME = Scheme("w8", WeightScheme(bits=8))
NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def rewritten(block: FakeBlock, name: str = "smoothquant", **settings: Any) -> dict[str, Any]:
    return plugins.build("transform", name, settings).rewrite_block(block, SCHEME, generator())


def largest_weights(block: FakeBlock, names: tuple[str, ...]) -> Tensor:
    return torch.stack([block.linear(name).weight.detach().abs().amax(0) for name in names]).amax(0)


def parameters(block: FakeBlock) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in block.module.named_parameters()}


def plant(block: FakeBlock, factor: float, channels: slice = slice(8, 12)) -> None:
    """Norm ÷ factor and columns × factor on some channels of both pairs: the function stays, the maxima move."""
    with torch.no_grad():
        for norm, consumers in NORMS.items():
            block.module.get_submodule(norm).weight[channels] /= factor  # type: ignore[index, operator]
            for name in consumers:
                block.linear(name).weight[:, channels] *= factor
    block.observe()


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": alpha, "down": down, "run_time": run_time, "direction": direction}
        for alpha in (0.0, 0.5, 0.85, 1.0)
        for down in (False, True)
        for run_time in (False, True)
        for direction in ("both", "activation_to_weight")
    ],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_function_stays_for_every_alpha(settings: dict[str, Any], kv_heads: int) -> None:
    block = FakeBlock(kv_heads=kv_heads)
    hidden = block.inputs()[0]
    with torch.no_grad():
        before = block.run(hidden)
        rewritten(block, **settings)
        after = block.run(hidden)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


def test_alpha_0_equalises_weights_and_alpha_1_activations() -> None:
    for alpha in (0.0, 1.0):
        block = FakeBlock()
        rewritten(block, alpha=alpha)
        block.observe()
        for consumers in NORMS.values():
            found = (
                block.evidence[consumers[0]]["abs_max"]
                if alpha
                else largest_weights(block, consumers)
            )
            assert torch.allclose(found, torch.ones_like(found), rtol=1e-5)


def test_alpha_one_half_shares_evenly() -> None:
    block = FakeBlock()
    rewritten(block, alpha=0.5)
    block.observe()
    for consumers in NORMS.values():
        assert torch.allclose(
            block.evidence[consumers[0]]["abs_max"], largest_weights(block, consumers), rtol=1e-4
        )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("factor", [1 / 64, 256])
def test_a_planted_model_is_smoothed_into_the_same_model(alpha: float, factor: float) -> None:
    plain, planted = FakeBlock(), FakeBlock()
    plant(planted, factor)
    rewritten(plain, alpha=alpha)
    rewritten(planted, alpha=alpha)
    for name, value in parameters(plain).items():
        assert torch.allclose(value, parameters(planted)[name], rtol=1e-5, atol=1e-7), name


def test_a_clamp_to_one_direction_cannot_repair_weight_outliers() -> None:
    one_way, both = FakeBlock(), FakeBlock()
    for block, direction in ((one_way, "activation_to_weight"), (both, "both")):
        plant(block, 256)
        rewritten(block, direction=direction)
    names = NORMS["input_layernorm"]
    spread = [
        float(largest_weights(block, names).max() / largest_weights(block, names).median())
        for block in (one_way, both)
    ]
    assert spread[0] > 10 * spread[1]


def test_only_norm_pairs_are_smoothed_unless_asked() -> None:
    block = FakeBlock()
    kept = parameters(block)
    rewritten(block)
    changed = {
        name for name, value in parameters(block).items() if not torch.equal(value, kept[name])
    }
    assert changed == {
        f"{name}.weight" for norm, consumers in NORMS.items() for name in (norm, *consumers)
    }
    other = FakeBlock()
    rewritten(other, down=True)
    assert not torch.equal(parameters(other)["mlp.down_proj.weight"], kept["mlp.down_proj.weight"])
    assert torch.equal(
        parameters(other)["self_attn.o_proj.weight"], kept["self_attn.o_proj.weight"]
    )


def test_biases_and_norm_offsets_are_carried() -> None:
    block = FakeBlock()
    norm = block.module.get_submodule("input_layernorm")
    pair = ScalePair("input_layernorm", ("self_attn.q_proj",), "norm", offset=1.0)
    block.shapes = llama_shapes()
    object.__setattr__(block.shapes, "pairs", (pair,))
    weight = norm.weight.detach().clone()  # type: ignore[operator, union-attr]
    column = block.linear("self_attn.q_proj").weight.detach().abs().amax(0)
    rewritten(block, alpha=0.0)
    assert torch.allclose(norm.weight, (weight + 1) * column - 1, rtol=1e-4, atol=1e-5)


def test_a_family_without_norms_to_fold_is_refused_in_the_plan() -> None:
    shapes = llama_shapes()
    object.__setattr__(shapes, "pairs", ())
    assert SmoothQuant(SmoothQuant.Settings()).check(SCHEME, shapes)
    assert BiSmoothing(BiSmoothing.Settings(fold=True)).check(SCHEME, shapes)
    assert not BiSmoothing(BiSmoothing.Settings()).check(SCHEME, shapes)


def test_fused_matrices_refuse_inputs_of_their_own() -> None:
    import dataclasses

    shapes = llama_shapes()
    fused = dataclasses.replace(
        shapes, linears=tuple(dataclasses.replace(each, fused=True) for each in shapes.linears)
    )
    for reasons in (
        BiSmoothing(BiSmoothing.Settings()).check(SCHEME, fused),
        SmoothQuant(SmoothQuant.Settings(run_time=True)).check(SCHEME, fused),
    ):
        assert reasons and "fused" in reasons[0] and "mlp.up_proj" in reasons[0]
    assert not SmoothQuant(SmoothQuant.Settings()).check(SCHEME, fused)


@pytest.mark.parametrize(
    ("settings", "problem"), [({"alpha": 1.5}, "0 to 1"), ({"direction": "bot"}, "both")]
)
def test_settings_out_of_range_say_so(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        plugins.build("transform", "smoothquant", settings)


# --- bi-smoothing --------------------------------------------------------------------------------------------------------------


def test_every_linear_shares_evenly_at_run_time() -> None:
    block = FakeBlock()
    expected: dict[str, Tensor] = {}
    for linear in block.shapes.linears:
        activations = block.evidence[linear.name]["abs_max_per_sequence"].median(0).values
        weights = block.linear(linear.name).weight.detach().abs().amax(0)
        expected[linear.name] = (activations * weights).sqrt()
    rewritten(block, "bi_smoothing")
    for name, magnitude in expected.items():
        assert torch.allclose(
            block.linear(name).weight.detach().abs().amax(0), magnitude, rtol=1e-4
        )
        assert set(of_module(block.linear(name))) == {"input_scale"}


def test_a_larger_divisor_presses_the_weights_down() -> None:
    one, ten = FakeBlock(), FakeBlock()
    rewritten(one, "bi_smoothing")
    rewritten(ten, "bi_smoothing", divisor=10.0)
    for linear in one.shapes.linears:
        assert torch.allclose(
            one.linear(linear.name).weight, 10 * ten.linear(linear.name).weight, rtol=1e-5
        )


def test_max_max_takes_the_largest_sequence() -> None:
    med, largest = FakeBlock(), FakeBlock()
    rewritten(med, "bi_smoothing")
    rewritten(largest, "bi_smoothing", statistic="max_max")
    name = "mlp.down_proj"
    assert bool(
        (largest.linear(name).weight.abs() >= med.linear(name).weight.abs() * (1 - 1e-5)).all()
    )


def test_named_blocks_alone_are_smoothed() -> None:
    block = FakeBlock(index=2)
    kept = parameters(block)
    rewritten(block, "bi_smoothing", blocks=[0, 1])
    assert all(torch.equal(value, kept[name]) for name, value in parameters(block).items())
    reasons = BiSmoothing(BiSmoothing.Settings(blocks=(0, 7))).check(SCHEME, llama_shapes(blocks=2))
    assert reasons == ["the model has 2 blocks, so none of index 7"]


def test_folded_bi_smoothing_is_smoothquant_at_one_half() -> None:
    bi, smooth = FakeBlock(sequences=1), FakeBlock(sequences=1)
    rewritten(bi, "bi_smoothing", fold=True)
    rewritten(smooth)
    for name, value in parameters(bi).items():
        assert torch.allclose(value, parameters(smooth)[name], rtol=1e-4, atol=1e-7), name


# --- in a pass and in a loaded model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["bi_smoothing", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_smoothed_unrounded_model_keeps_its_logits(
    transform: str, family: str, tiny_model: Any, tmp_path: Path
) -> None:
    """Through pass, checkpoint and loading; with no rounding, what is left is the transform alone."""
    from harness.core.cell import Method, baseline_of, quantize_key
    from harness.quantization.inference.load import load

    folder = tiny_model(family)
    settings = {"run_time": True} if transform == "smoothquant" else {}
    smoothed = cell(folder, Method("smoothed", transform=part(transform, "transform", **settings)))
    assert not failures(quantize([smoothed], folder, tmp_path / "store"))
    full, _ = load(baseline_of(smoothed), folder, None)
    found, _ = load(smoothed, folder, tmp_path / "store" / quantize_key(smoothed))
    tokens = windows(2)
    with torch.no_grad():
        expected, logits = full(tokens).logits, found(tokens).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4


def test_hessians_are_of_the_divided_inputs(tiny_model: Any, tmp_path: Path) -> None:
    """Queries, keys and values are divided by scales of their own, so GPTQ behind it gets a Hessian for each: with 8 bits,
    in company or alone, the checkpoint is close to the model and the same to the byte."""
    from harness.core.cell import Method, quantize_key

    folder = tiny_model("llama")
    method = Method("bi_gptq", part("bi_smoothing", "transform"), part("gptq", sequential=True))
    one, other = cell(folder, method, bits=8), cell(folder, method, bits=4)
    assert not failures(quantize([one], folder, tmp_path / "alone"))
    assert not failures(quantize([other, one], folder, tmp_path / "company"))
    key = quantize_key(one)
    alone, company = content(tmp_path / "alone" / key), content(tmp_path / "company" / key)
    assert alone == company
    errors = [entry["output_error"] for entry in alone["manifest.json"]["layer_errors"]]
    assert len(errors) == 3 * 7 and max(errors) < 1e-3


# --- what the authors' code (mit-han-lab/smoothquant @ c61476d, smooth.py and fake_quant.py) gives on fixed tensors ---------------

THEIRS = {  # alpha -> s; codes of the queries' smoothed rows; the first two tokens' W8A8 outputs
    0.5: (
        [0.7071068, 0.7337994, 0.781736, 0.1825742, 0.7977241, 3.038218, 0.7071068, 0.7687061],
        [
            [-23, -5, 15, -127, 2, 85, -10, 9],
            [-20, 17, -47, -51, 33, -127, 7, 46],
            [5, 37, -15, 127, -37, -12, 27, -24],
            [12, -10, 4, 127, -5, 35, -13, 0],
            [-23, 0, 26, -114, 10, -127, -6, 18],
            [-15, 41, -54, 38, 67, -127, 25, -70],
        ],
        [
            [-21.71191, 1.976403, 10.79401, 18.33342, -4.535774, 5.242987],
            [9.130313, -6.143113, -1.822762, 1.257962, -6.205603, -4.101105],
        ],
    ),
    0.85: (
        [0.8208261, 0.8300015, 0.714511, 0.5468112, 0.8510625, 9.290725, 0.7793308, 0.7991062],
        [
            [-9, -2, 4, -127, 1, 86, -4, 3],
            [-7, 6, -14, -50, 12, -127, 2, 16],
            [2, 14, -5, 127, -13, -12, 10, -8],
            [5, -4, 1, 127, -2, 36, -5, 0],
            [-9, 0, 8, -112, 3, -127, -2, 6],
            [-6, 15, -16, 37, 23, -127, 9, -24],
        ],
        [
            [-21.68648, 1.964536, 10.80316, 18.20525, -4.511732, 5.242564],
            [9.115749, -6.165242, -1.880802, 1.252317, -6.141449, -4.104451],
        ],
    ),
}


def fixed(rows: int, columns: int, down: int, across: int) -> Tensor:
    """Sixteenths that every machine makes alike."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return ((row * down + column * across) % 29 - 14).float() / 16


@pytest.mark.parametrize("alpha", list(THEIRS))
def test_scales_codes_and_outputs_are_the_authors(alpha: float) -> None:
    queries, keys, x = fixed(6, 8, 37, 11), fixed(4, 8, 5, 17) * 2, fixed(5, 8, 13, 19)
    queries[:, 3] *= 30
    x[:, 5] *= 20
    scales, codes, outputs = THEIRS[alpha]
    found = smoothing_scales(x.abs().amax(0), torch.cat((queries, keys)).abs().amax(0), alpha)
    torch.testing.assert_close(found, torch.tensor(scales), rtol=1e-6, atol=0)
    grid = fit(queries * found, 8, symmetric=True, convention="awq")
    rounded = grid.quantize(queries * found)
    assert torch.equal(rounded - grid.zero, torch.tensor(codes).float())
    y = round_dynamic(x / found, ActivationScheme()) @ grid.dequantize(rounded).T
    torch.testing.assert_close(y[:2], torch.tensor(outputs), rtol=1e-5, atol=1e-5)
