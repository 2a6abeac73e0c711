"""EoRA: no low-rank part leaves less of a rounding's output error, and a cell of it is its base with two matrices beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import (
    FakeEvidence,
    HessianEvidence,
    correlated_inputs,
    generator,
    layer_error,
    llama_shapes,
    random_weight,
)
from small import cell, content, failures, part, quantize, windows
from torch import Tensor

from harness.core import plugins
from harness.core.cell import (
    ActivationScheme,
    Cell,
    Method,
    Scheme,
    WeightScheme,
    make_part,
    quantize_key,
)
from harness.core.errors import ConfigError, MethodError
from harness.core.shapes import Shapes
from harness.data.demo.tiny import build
from harness.quantization.formats.native import Checkpoint
from harness.quantization.models import shapes as shapes_of
from harness.quantization.numerics.adapters import AdaptedWeight
from harness.quantization.numerics.weights import QuantizedWeight
from harness.quantization.pipeline.blocks import Blocks

W3 = WeightScheme("int", 3, 32, False, "float32")
W2 = WeightScheme("int", 2, 32, False, "float32")


def usual_layer() -> tuple[Tensor, Tensor]:
    return random_weight(64, 96), correlated_inputs(96, sequences=8, length=64)


def edge_layer() -> tuple[Tensor, Tensor]:
    """A dead input, a large one, one direction twice, a row of zeros, rows of one sign."""
    weight, inputs = random_weight(64, 96, seed=1), correlated_inputs(96, sequences=8, seed=1)
    inputs[..., 5] = 0
    inputs[..., 7] *= 20
    inputs[..., 9] = inputs[..., 8]
    weight[3] = 0
    weight[4:8] = weight[4:8].abs()
    return weight, inputs


LAYERS = {"usual": usual_layer, "edge": edge_layer}


def rounded(
    weight: Tensor, evidence: FakeEvidence, scheme: WeightScheme = W3, **settings: Any
) -> QuantizedWeight:
    own = {"base": "gptq", "adapter_dtype": "float32", **settings}
    method = plugins.build("rounding", "eora", own)
    return method.round_layer("self_attn.q_proj", weight, evidence, scheme, generator())


def base_of(name: str, weight: Tensor, evidence: FakeEvidence, scheme: WeightScheme) -> Tensor:
    method = plugins.build("rounding", name, {})
    return method.round_layer("q", weight, evidence, scheme, generator()).dequantize()


def nearest_of_rank(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).float()


def test_with_independent_inputs_it_is_the_plain_decomposition_of_the_error() -> None:
    weight, _ = usual_layer()
    evidence = HessianEvidence(torch.eye(96))
    base = base_of("rtn", weight, evidence, W3)
    found = rounded(weight, evidence, base="rtn", rank=6).dequantize()
    assert torch.allclose(found - base, nearest_of_rank(weight - base, 6), atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("base", "scheme"), [("rtn", W2), ("gptq", W3)])
def test_output_error_falls_with_the_rank_and_is_below_the_plain_decompositions(
    layer: str, base: str, scheme: WeightScheme
) -> None:
    weight, inputs = LAYERS[layer]()
    evidence = FakeEvidence(inputs)
    start = base_of(base, weight, evidence, scheme)
    errors = [layer_error(weight, start, inputs)]
    for rank in (1, 4, 16, 48):
        found = rounded(weight, evidence, scheme, base=base, rank=rank).dequantize()
        errors.append(layer_error(weight, found, inputs))
        plain = layer_error(weight, start + nearest_of_rank(weight - start, rank), inputs)
        assert errors[-1] <= plain * (1 + 1e-5)
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 4


@pytest.mark.parametrize("layer", LAYERS)
def test_what_remains_is_the_sum_of_the_other_singular_values(layer: str) -> None:
    weight, inputs = LAYERS[layer]()
    evidence = FakeEvidence(inputs)
    hessian = evidence["hessian"].double()
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors * values.clamp(min=0).sqrt()
    error = weight - base_of("gptq", weight, evidence, W3)
    singular = torch.linalg.svdvals(error.double() @ root)
    left = (weight - rounded(weight, evidence, rank=10).dequantize()).double()
    remains = float(((left @ hessian) * left).sum())
    assert remains == pytest.approx(float(singular[10:].square().sum()), rel=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_at_full_rank_the_output_is_exact(layer: str) -> None:
    weight, inputs = LAYERS[layer]()
    found = rounded(weight, FakeEvidence(inputs), W2, base="rtn", rank=64)
    assert layer_error(weight, found.dequantize(), inputs) < 1e-9
    if layer == "usual":  # inputs in every direction: the matrix itself
        assert float((found.dequantize() - weight).norm() / weight.norm()) < 1e-4


def test_rank_0_and_linears_without_a_part_are_the_base() -> None:
    weight, inputs = usual_layer()
    evidence = FakeEvidence(inputs)
    plain = base_of("gptq", weight, evidence, W3)
    for settings in ({"rank": 0}, {"linears": ("k_proj",)}):
        found = rounded(weight, evidence, **settings)
        assert found.kind == "uniform" and torch.equal(found.dequantize(), plain)


def test_stored_factors_are_balanced_and_counted() -> None:
    weight, inputs = usual_layer()
    found = rounded(weight, FakeEvidence(inputs), rank=8, adapter_dtype="bfloat16")
    assert isinstance(found, AdaptedWeight)
    assert found.down.shape == (8, 96) and found.up.shape == (64, 8)
    extra = 16 * 8 * (64 + 96) / (64 * 96)
    assert found.bits_per_weight == pytest.approx(found.base.bits_per_weight + extra)
    exact = rounded(weight, FakeEvidence(inputs), rank=8)
    difference = found.dequantize() - exact.dequantize()
    assert float(difference.norm() / (weight - found.base.dequantize()).norm()) < 0.01


def test_a_moment_of_one_direction_gets_one_direction() -> None:
    weight, inputs = random_weight(32, 32), torch.zeros(1, 1, 32)
    inputs[..., 9] = 1
    found = rounded(weight, FakeEvidence(inputs), base="rtn", rank=4)
    assert isinstance(found, AdaptedWeight) and found.down.shape[0] == 1
    assert torch.equal(found.down[0].nonzero().flatten(), torch.tensor([9]))
    assert layer_error(weight, found.dequantize(), inputs) < 1e-10


def test_the_roots_and_the_bases_factors_are_computed_once_per_input() -> None:
    weight, inputs = usual_layer()
    evidence = FakeEvidence(inputs, needs=("hessian",))
    for rank in (4, 8):
        rounded(weight, evidence, rank=rank)
    assert sorted(evidence.computed.values()) == [1, 1]


def test_a_moment_that_is_not_finite_is_an_error() -> None:
    broken = HessianEvidence(torch.full((96, 96), torch.inf))
    with pytest.raises(MethodError, match="second moment"):
        rounded(usual_layer()[0], broken, base="rtn")


def test_the_plan_refuses_what_cannot_be_corrected(tmp_path: Path) -> None:
    shapes = llama_shapes()

    def reasons(scheme: Scheme, of: Shapes = shapes, **settings: Any) -> str:
        return "; ".join(plugins.build("rounding", "eora", settings).check(scheme, of))

    assert reasons(Scheme("a", W3)) == ""
    assert "works on whole blocks" in reasons(Scheme("a", W3), base="omniquant")
    assert "the difference from another model" in reasons(Scheme("a", W3), base="delta_rtn")
    nested: dict[str, Any] = {"base": "any_precision", "base_settings": {"parent_bits": 8}}
    assert "one matrix of all widths" in reasons(Scheme("a", WeightScheme("int", 3)), **nested)
    assert "base gptq: group size 48" in reasons(Scheme("a", WeightScheme("int", 3, 48)))
    assert 'no linear "q_prj"' in reasons(Scheme("a", W3), linears=("q_prj",))
    build("phi3", tmp_path / "phi3", num_hidden_layers=2)
    fused, rounding_inputs = shapes_of(tmp_path / "phi3"), Scheme("b", W3, ActivationScheme())
    assert "are parts of fused layers" in reasons(rounding_inputs, fused)
    assert reasons(rounding_inputs) == reasons(rounding_inputs, fused, rank=0) == ""
    assert reasons(Scheme("a", W3), fused) == ""


def test_a_rank_that_spans_a_matrix_is_worth_a_warning(tmp_path: Path) -> None:
    shapes = llama_shapes(kv_heads=2)  # keys and values 16 × 32

    def warnings(rank: int) -> list[str]:
        method = plugins.build("rounding", "eora", {"rank": rank})
        return method.warnings(cell(tmp_path, Method("eora")), shapes)

    assert not warnings(15)
    (warning,) = warnings(16)
    assert "rank 16 spans self_attn.k_proj, self_attn.v_proj:" in warning
    assert "up to 24 bits per weight" in warning


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"cutoff": 1.0}, "cutoff is 1"),
        ({"adapter_dtype": "int8"}, 'no adapter_dtype "int8"'),
        ({"base": "gptqq"}, 'no rounding "gptqq"'),
        ({"base_settings": {"dampin": 1}}, "damping_fraction"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plugins.build("rounding", "eora", settings)


# ---- in a pass -------------------------------------------------------------------------------------------------------


def eora_cell(folder: Path, base: str, inputs: str, **settings: Any) -> Cell:
    settings = {"base": base, "base_settings": {}, "rank": 4, **settings}
    method = Method(f"{base}_eora", rounding=make_part("rounding", "eora", settings))
    return cell(folder, method, bits=3, group_size=32, inputs=inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("llama", path, num_hidden_layers=2)
    return path


def test_on_full_precision_inputs_the_base_is_the_bases_own_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    corrected = eora_cell(folder, "gptq", "full_precision")
    plain = cell(
        folder,
        Method("gptq", rounding=part("gptq")),
        bits=3,
        group_size=32,
        inputs="full_precision",
    )
    assert not failures(quantize([corrected, plain], folder, tmp_path))
    both = [Checkpoint.open(tmp_path / quantize_key(each)) for each in (corrected, plain)]
    for index in range(2):
        ours, theirs = (checkpoint.block(index).weights for checkpoint in both)
        for name, weight in ours.items():
            assert isinstance(weight, AdaptedWeight)
            assert torch.equal(weight.base.dequantize(), theirs[name].dequantize())


def test_a_cell_alone_has_the_bytes_that_it_has_in_company(folder: Path, tmp_path: Path) -> None:
    own = eora_cell(folder, "gptq", "quantized")
    others = [
        eora_cell(folder, "gptq", "quantized", rank=8),
        cell(folder, Method("gptq", rounding=part("gptq")), bits=3, group_size=32),
    ]
    assert not failures(quantize([own], folder, tmp_path / "alone"))
    assert not failures(quantize([*others, own], folder, tmp_path / "company"))
    key = quantize_key(own)
    assert content(tmp_path / "alone" / key) == content(tmp_path / "company" / key)


def test_experts_with_few_tokens_are_rounded_by_the_base_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mixtral"
    build("mixtral", folder, num_hidden_layers=1)
    wanted = eora_cell(folder, "rtn", "quantized", base_settings={"range_search": True})
    assert not failures(quantize([wanted], folder, tmp_path / "runs", windows(2, 24)))
    found = Checkpoint.open(tmp_path / "runs" / quantize_key(wanted)).block(0).weights
    experts = {name: weight for name, weight in found.items() if "expert" in name}
    unseen = [name for name, weight in experts.items() if weight.kind == "uniform"]
    assert unseen, "48 tokens are too few for some expert of 64 inputs"
    blocks = Blocks(folder, "float32", "cpu")
    tensors = blocks.tensors(0)
    rtn = plugins.build("rounding", "rtn", {"range_search": True})
    for location in blocks.locations(0):
        if location.name == unseen[0]:
            weight = location.view(tensors[location.parameter]).float().contiguous()
            expected = rtn.round_layer("", weight, None, wanted.scheme.weight, generator())
            assert torch.equal(found[unseen[0]].dequantize(), expected.dequantize())
