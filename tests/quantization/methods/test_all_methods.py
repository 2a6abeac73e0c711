"""What holds for every transform, rounding and tuning, whoever wrote it: new method files are covered without a change here."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evidence import (
    FakeBlock,
    FakeEvidence,
    correlated_inputs,
    generator,
    llama_shapes,
    random_weight,
)
from torch import Tensor

from harness.core import plugins
from harness.core.cell import BASE_WEIGHT, Scheme, WeightScheme
from harness.core.errors import ConfigError, MethodError
from harness.quantization.methods.protocols import STATISTICS
from harness.quantization.numerics.deltas import DeltaWeight
from harness.quantization.numerics.weights import QuantizedWeight

CONF = Path(__file__).parents[3] / "conf"
KINDS = ("transform", "rounding", "tuning")
PLUGINS = [(kind, name) for kind in KINDS for name in plugins.find(kind)]
CONFIGURED = [*PLUGINS, *(("reduction", name) for name in plugins.find("reduction"))]
ROUNDINGS = list(plugins.find("rounding"))
FORMATS = ("int", "delta", "sign", "nf4", "dense", "fp4", "fp8", "fp8_e4m3", "mx", "any")
WIDTHS: tuple[float, ...] = (4, 8, 2, 3, 1, 16, 1.08, 1.7, 2.7)


# Settings for matrices of 32 × 32 where a method's published defaults are sized for billions of weights, or train for seconds.
SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("rounding", "vptq"): {"vector_length": 4, "index_bits": 6},
    ("rounding", "eora"): {"rank": 4},
    ("rounding", "svdquant"): {"rank": 4},
    ("rounding", "autoround"): {"iterations": 6},
    ("rounding", "delta_come"): {"groups": [[8, 1], [2, 0]]},
    ("transform", "block_hadamard"): {"size": 16},
}


def built(kind: str, name: str) -> Any:
    return plugins.build(kind, name, SMALL.get((kind, name), {}))


def facts_of(kind: str, name: str) -> plugins.Facts:
    return plugins.facts(kind, name)


def conf_of(kind: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / kind / f"{name}.yaml").read_text(encoding="utf-8"))


def accepted_scheme(method: Any, shapes: Any) -> Scheme:
    """The first of some usual schemes that the method accepts, tried from the most common on."""
    refused = {}
    sparsity = "0.5" if getattr(method, "prunes", False) else ""
    for format_, bits in itertools.product(FORMATS, WIDTHS):
        for group_size, symmetric in itertools.product((16, -1, 32), (False, True)):
            weight = WeightScheme(format_, bits, group_size, symmetric, sparsity=sparsity)
            scheme = Scheme("test", weight)
            reasons = method.check(scheme, shapes)
            if not reasons:
                return scheme
            refused[weight] = reasons
    pytest.fail(
        f"accepts none of {len(refused)} schemes; the first: {next(iter(refused.values()))}"
    )


def quantized(
    name: str, block: FakeBlock, scheme: Scheme, seed: int = 0
) -> dict[str, QuantizedWeight]:
    """Every linear of a block, rounded as a pass would: layer by layer, or the block at once."""
    method = built("rounding", name)
    needs = facts_of("rounding", name).get("needs", ())
    if hasattr(method, "round_block"):
        return method.round_block(block, scheme, generator(seed))
    weights = {}
    for shape in block.shapes.linears:
        evidence = block.evidence[shape.name] if needs else None
        weight = block.linear(shape.name).weight.detach()
        weights[shape.name] = method.round_layer(
            shape.name, weight, evidence, scheme.weight_for(0, shape.name), generator(seed)
        )
    return weights


def block_for(kind: str, name: str) -> FakeBlock:
    return FakeBlock(needs=facts_of(kind, name).get("needs", ()))


@pytest.mark.parametrize(("kind", "name"), CONFIGURED)
def test_yaml_states_every_setting_with_its_default(kind: str, name: str) -> None:
    settings = plugins.load(kind, name).Settings()
    expected = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    expected = json.loads(json.dumps(expected))  # tuples become lists
    written = conf_of(kind, name)
    assert written.pop("name", name) == name
    assert written == expected
    assert {key: type(value) for key, value in written.items()} == {
        key: type(value) for key, value in expected.items()
    }


@pytest.mark.parametrize(("kind", "name"), CONFIGURED)
def test_yaml_explains_itself(kind: str, name: str) -> None:
    text = (CONF / kind / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# "), "the file opens with one line saying what it is"
    for key in conf_of(kind, name):
        line = next(line for line in text.splitlines() if line.startswith(f"{key}:"))
        above = text.splitlines()[text.splitlines().index(line) - 1]
        assert key == "name" or "#" in line or above.startswith("#"), f"{key} has no comment"


@pytest.mark.parametrize(("kind", "name"), CONFIGURED)
def test_facts_read_from_the_source_are_the_class_attributes(kind: str, name: str) -> None:
    facts, plugin = facts_of(kind, name), plugins.load(kind, name)
    assert facts.get("version", 0) == plugin.version >= 1
    assert tuple(facts.get("needs", ())) == tuple(plugin.needs)
    assert set(plugin.needs) <= set(STATISTICS)
    for fact in ("stochastic", "activation_aware", "prunes", "keeps_zeros"):
        assert facts.get(fact, False) is getattr(plugin, fact, False)
    assert facts.title and not facts.title.startswith(name + ".py")


@pytest.mark.parametrize(("kind", "name"), CONFIGURED)
def test_settings_are_frozen_and_typos_get_the_nearest_name(kind: str, name: str) -> None:
    settings = plugins.load(kind, name).Settings()
    fields = dataclasses.fields(settings)
    if fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, fields[0].name, None)
    known = fields[0].name if fields else "setting"
    with pytest.raises(ConfigError, match=known if fields else "no setting"):
        plugins.build(kind, name, {known + "s": 1})


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_check_returns_reasons_and_never_raises(kind: str, name: str) -> None:
    method, shapes = built(kind, name), llama_shapes()
    for format_ in ("int", "nf4", "unheard-of"):
        for bits in (0, 1, 1.5, 4, 17):
            for group_size in (-1, 0, 7, 16, 10_000):
                reasons = method.check(
                    Scheme("odd", WeightScheme(format_, bits, group_size)), shapes
                )
                assert isinstance(reasons, list) and all(
                    isinstance(reason, str) and reason for reason in reasons
                )
                assert len(reasons) == len(set(reasons))


@pytest.mark.parametrize("name", ROUNDINGS)
def test_impossible_schemes_are_refused(name: str) -> None:
    method, shapes = built("rounding", name), llama_shapes()
    assert method.check(Scheme("odd", WeightScheme("unheard-of")), shapes)
    assert method.check(Scheme("odd", WeightScheme("int", bits=17)), shapes)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_scheme_that_is_accepted_quantizes_every_linear(name: str) -> None:
    block = block_for("rounding", name)
    scheme = accepted_scheme(built("rounding", name), block.shapes)
    weights = quantized(name, block, scheme)
    assert set(weights) == {shape.name for shape in block.shapes.linears}
    for shape in block.shapes.linears:
        result, weight = weights[shape.name], block.linear(shape.name).weight.detach()
        assert result.shape == (shape.out_features, shape.in_features)
        values = result.dequantize()
        assert values.dtype == torch.float32 and values.shape == weight.shape
        assert bool(torch.isfinite(values).all())
        assert not torch.equal(values, torch.zeros_like(values))
        # Even one bit keeps more of a random matrix than it loses.
        assert float((values - weight).square().sum() / weight.square().sum()) < 1


@pytest.mark.parametrize("name", ROUNDINGS)
def test_packing_is_exact_and_sizes_are_honest(name: str) -> None:
    block = block_for("rounding", name)
    scheme = accepted_scheme(built("rounding", name), block.shapes)
    beside: list[int] = []
    for result in quantized(name, block, scheme).values():
        tensors, meta = result.pack()
        assert all(
            tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values()
        )
        again = QuantizedWeight.kinds[result.kind].unpack(
            {k: v.clone() for k, v in tensors.items()}, json_round_trip(meta)
        )
        if isinstance(again, DeltaWeight) and isinstance(result, DeltaWeight):
            assert again.base is None and result.base is not None, "the base is not stored"
            again = again.with_base(result.base)
        assert torch.equal(again.dequantize(), result.dequantize())
        assert again.shape == result.shape
        assert result.stored_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
        rows, columns = result.shape
        assert result.bits_per_weight == pytest.approx(8 * result.stored_bytes / (rows * columns))
        assert 0.5 < result.bits_per_weight < 33
        beside.append(len(json.dumps(meta)))
    # values beside the tensors are not counted in the size, so they must not grow with the matrix
    assert max(beside) < 500 and max(beside) - min(beside) < 32


def json_round_trip(meta: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(meta, allow_nan=False))


@pytest.mark.parametrize("name", ROUNDINGS)
def test_the_same_inputs_give_the_same_bits_whatever_the_global_state(name: str) -> None:
    scheme = accepted_scheme(built("rounding", name), llama_shapes())
    runs: list[dict[str, Tensor]] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results = quantized(name, block_for("rounding", name), scheme)
        runs.append({linear: result.dequantize() for linear, result in results.items()})
    for linear, values in runs[0].items():
        assert torch.equal(values, runs[1][linear]), linear


@pytest.mark.parametrize("name", ROUNDINGS)
def test_only_a_stochastic_method_depends_on_its_seed(name: str) -> None:
    if facts_of("rounding", name).get("stochastic", False):
        pytest.skip("draws from its seed")
    scheme = accepted_scheme(built("rounding", name), llama_shapes())
    first, second = (quantized(name, block_for("rounding", name), scheme, seed) for seed in (1, 2))
    for linear, result in first.items():
        assert torch.equal(result.dequantize(), second[linear].dequantize()), linear


@pytest.mark.parametrize(
    "name", [name for name in ROUNDINGS if hasattr(plugins.load("rounding", name), "round_layer")]
)
def test_weights_and_evidence_are_not_written_to(name: str) -> None:
    method = built("rounding", name)
    needs = facts_of("rounding", name).get("needs", ())
    scheme = accepted_scheme(method, llama_shapes())
    weight, inputs = random_weight(32, 32), correlated_inputs(32)
    gradients = torch.randn(4, 32, 32, generator=generator(3))
    evidence = FakeEvidence(
        inputs, needs=needs, gradients=gradients, reference=inputs, base=random_weight(32, 32, 1)
    )
    kept = weight.clone()
    before = {statistic: evidence[statistic].clone() for statistic in needs}
    method.round_layer(
        "self_attn.v_proj", weight, evidence if needs else None, scheme.weight, generator()
    )
    assert torch.equal(weight, kept)
    for statistic, value in before.items():
        assert torch.equal(evidence[statistic], value), statistic


@pytest.mark.parametrize(
    "name", [name for name in ROUNDINGS if hasattr(plugins.load("rounding", name), "round_layer")]
)
def test_a_layer_alone_equals_the_layer_in_company(name: str) -> None:
    """What `once` keeps from an earlier linear with the same input must not change a later one."""
    scheme = accepted_scheme(built("rounding", name), llama_shapes())
    together = quantized(name, block_for("rounding", name), scheme)
    block = block_for("rounding", name)
    method = built("rounding", name)
    evidence = (
        block.evidence["self_attn.v_proj"] if facts_of("rounding", name).get("needs", ()) else None
    )
    weight = block.linear("self_attn.v_proj").weight.detach()
    alone = method.round_layer("self_attn.v_proj", weight, evidence, scheme.weight, generator())
    assert torch.equal(alone.dequantize(), together["self_attn.v_proj"].dequantize())


def odd(block: FakeBlock) -> None:
    """Dead inputs of every kind of linear, groups and a matrix of zeros, constant rows."""
    for norm in ("input_layernorm", "post_attention_layernorm"):
        block.module.get_submodule(norm).get_parameter("weight")[[3, 7]] = 0
    for shape in block.shapes.linears:
        weight = block.linear(shape.name).weight
        weight[:4, :16] = 0
        weight[5], weight[6], weight[7] = 0.3, -0.2, 0
    block.linear("mlp.up_proj").weight.zero_()


def one_direction(block: FakeBlock) -> None:
    """One token over and over: Hessians of rank one."""
    block.calibration[:] = block.calibration[:1, :1]


def poison(value: float, where: str) -> Callable[[FakeBlock], None]:
    def change(block: FakeBlock) -> None:
        if where == "inputs":
            block.calibration[0, 3, 5] = value
        else:
            block.linear(where).weight[1, 1] = value

    return change


ODD: dict[str, Callable[[FakeBlock], None]] = {
    "dead columns, zeros and constant rows": odd,
    "a Hessian of rank one": one_direction,
    "NaN inputs": poison(float("nan"), "inputs"),
    "infinite inputs": poison(float("inf"), "inputs"),
    "a NaN weight": poison(float("nan"), "self_attn.k_proj"),
    "an infinite weight": poison(float("inf"), "mlp.down_proj"),
}
LEARNS_OF_THE_MODEL = [
    name for name in plugins.find("transform") if hasattr(plugins.load("transform", name), "learn")
]


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize(
    ("kind", "name"), [(s, n) for s, n in PLUGINS if s != "tuning" and n not in LEARNS_OF_THE_MODEL]
)
def test_odd_inputs_end_in_numbers_or_in_a_reason(kind: str, name: str, case: str) -> None:
    block, method = block_for(kind, name), built(kind, name)
    scheme = accepted_scheme(method, block.shapes)
    block.change(ODD[case])
    try:
        if kind == "transform":
            with torch.no_grad():
                method.rewrite_block(block, scheme, generator())
            # rounded as the pass goes on: what a transform made of NaN is refused then
            weights = quantized("rtn", block, Scheme("test", WeightScheme("int", 8, -1, True)))
        else:
            weights = quantized(name, block, scheme)
    except MethodError as error:
        assert case != "dead columns, zeros and constant rows" and len(str(error)) > 20
        return
    assert "weight" not in case, "a damaged weight passed in silence"
    if "inputs" in case and set(facts_of(kind, name).get("needs", ())) - {BASE_WEIGHT}:
        # no reason, so the damage must be where the pass sees it and fails the cell: a bias that was corrected with it
        assert not all(
            bool(torch.isfinite(parameter).all()) for parameter in block.module.parameters()
        )
    for linear, result in weights.items():
        for part, tensor in result.pack()[0].items():
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all()), (
                f"{linear}:{part}"
            )
        assert bool(torch.isfinite(result.dequantize()).all()), linear


@pytest.mark.parametrize("name", list(plugins.find("transform")))
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_transform_leaves_the_function_of_the_block(name: str, kv_heads: int) -> None:
    method = built("transform", name)
    block = FakeBlock(needs=facts_of("transform", name).get("needs", ()), kv_heads=kv_heads)
    if name.startswith(("quarot", "spinquant", "hadamard", "rotation")):
        pytest.skip("rotates the residual stream of the whole model, of which a block is a part")
    scheme = accepted_scheme(method, block.shapes)
    hidden = block.inputs()[0]
    with torch.no_grad():
        before = block.run(hidden)
        notes = method.rewrite_block(block, scheme, generator())
        after = block.run(hidden)
    assert json_round_trip(notes) is not None, "notes are JSON values"
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


def test_every_method_names_parts_that_exist() -> None:
    for path in sorted((CONF / "method").glob("*.yaml")):
        method = yaml.safe_load(path.read_text(encoding="utf-8"))
        for kind in KINDS:
            if method.get(kind):
                settings = method.get(f"{kind}_settings") or {}
                plugins.build(kind, method[kind], settings)
            else:
                assert not method.get(f"{kind}_settings"), (
                    f"{path.name}: settings of a part that the method does not have"
                )


def test_every_conf_file_of_a_slot_has_its_plugin() -> None:
    for kind in KINDS:
        for path in sorted((CONF / kind).glob("*.yaml")):
            assert path.stem in plugins.find(kind), (
                f"conf/{kind}/{path.name} has no harness/methods/{path.stem}.py"
            )
