"""SliM-LLM: widths that keep their mean, GPTQ underneath, ranges that are never worse by their own measure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
from harness.core.cell import Scheme, WeightScheme
from harness.core.errors import ConfigError, MethodError
from harness.quantization.methods import slim_llm
from harness.quantization.numerics.mixed_width import MixedWidthWeight, nearest_at, search_moved
from harness.quantization.numerics.weights import QuantizedWeight


def w(bits: int, group_size: int = 16, scale_dtype: str = "float32") -> WeightScheme:
    return WeightScheme("int", bits, group_size, False, scale_dtype)


def rounded(
    weight: Tensor, evidence: Any, scheme: WeightScheme, **settings: Any
) -> MixedWidthWeight:
    return plugins.build("rounding", "slim_llm", settings).round_layer(
        "self_attn.q_proj", weight, evidence, scheme, generator()
    )


def evidence_of(width: int, **fields: Any) -> FakeEvidence:
    return FakeEvidence(correlated_inputs(width, **fields), needs=("hessian", "inputs"))


class DiagonalEvidence(FakeEvidence):
    """Inputs whose channels never meet: a Hessian with nothing off its diagonal."""

    def __init__(self, width: int) -> None:
        super().__init__(correlated_inputs(width), needs=("hessian", "inputs"))
        self._statistics["hessian"] = torch.diag(torch.rand(width, generator=generator(3)) + 0.5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [64, 80, 128])
def test_the_mean_width_is_the_base(bits: int, columns: int) -> None:
    found = rounded(random_weight(24, columns), evidence_of(columns), w(bits))
    assert sum(found.bits) == bits * len(found.bits)
    assert set(found.bits) == {bits - 1, bits, bits + 1} or set(found.bits) == {bits - 1, bits + 1}


def test_uniform_widths_and_plain_ranges_are_gptq() -> None:
    """Bit for bit, given the same Hessian in the authors' unit: nothing is added to its diagonal without a search."""
    weight, inputs = random_weight(24, 96), correlated_inputs(96)
    inputs[..., 21] = 0  # a dead column
    evidence, scaled = (FakeEvidence(inputs, needs=("hessian", "inputs")) for _ in range(2))
    scaled._statistics["hessian"] = evidence["hessian"] * 2 * inputs.shape[1]
    gptq = plugins.build("rounding", "gptq", {"block_size": 16})
    expected = gptq.round_layer("self_attn.q_proj", weight, scaled, w(3), generator())
    found = rounded(weight, evidence, w(3), search_widths=False, range_steps=0)
    assert torch.equal(found.dequantize(), expected.dequantize())


def by_the_description(weight: Tensor, inputs: Tensor, bits: int, size: int) -> Tensor:
    """SliM-LLM's steps written out, column by column, with a search of widths: what the weights become, [out, in]."""
    x = inputs.reshape(-1, weight.shape[1])
    hessian = 2 * (x.T @ x) / len(inputs)  # over sequences, of the sum over tokens

    def upper(matrix: Tensor) -> Tensor:
        return torch.linalg.cholesky(torch.linalg.inv(matrix.double()), upper=True).float()

    def salience(factor: Tensor) -> Tensor:
        return (weight / factor.diagonal()).square().sum(0).reshape(-1, size).sum(1)

    def widths(order: list[int], k: int) -> list[int]:
        return [
            bits - 1 if g in order[:k] else bits + 1 if g in order[len(order) - k :] else bits
            for g in range(len(order))
        ]

    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += 0.01  # and it stays: no diagonal is 0 when dead columns are looked for again
    order = torch.argsort(salience(upper(hessian))).tolist()
    groups = [weight[:, start : start + size] for start in range(0, weight.shape[1], size)]
    losses = []
    for k in range(1, len(groups) // 2):
        pairs = zip(groups, widths(order, k), strict=True)
        candidate = torch.cat([nearest_at(g, width, "float32") for g, width in pairs], dim=1)
        p = torch.softmax(inputs @ candidate.T, -1).clamp(min=1e-6)
        o = torch.softmax(inputs @ weight.T, -1).clamp(min=1e-6)
        losses.append(float((p * (p.log() - o.log())).sum(-1).mean()))
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = upper(hessian)
    final = widths(torch.argsort(salience(factor)).tolist(), losses.index(min(losses)) + 1)
    left, result = weight.clone(), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        width, start = final[column // size], column // size * size
        if column == start:
            group = left[:, start : start + size]
            mean, magnitude = group.mean(1), group.abs().mean(1)
            lo, hi = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            lowest = torch.full_like(lo, torch.inf)
            scale, zero = torch.empty_like(lo), torch.empty_like(lo)
            for step in [0, *range(1, 51), *range(-1, -51, -1)] if width > 1 else []:
                factor_of_range = 1 + 0.002 * step
                s = factor_of_range * (hi - lo) / (2**width - 1)
                z = torch.round(-factor_of_range * lo / s)
                q = (torch.round(group / s[:, None]) + z[:, None]).clamp(0, 2**width - 1)
                error = ((q - z[:, None]) * s[:, None] - group).abs().pow(2.4).sum(1)
                better = error < lowest
                lowest, scale = torch.where(better, error, lowest), torch.where(better, s, scale)
                zero = torch.where(better, z, zero)
        values = left[:, column].clone()
        if width == 1:
            rounded_values = mean + magnitude * torch.where(values >= mean, 1.0, -1.0)
        else:
            codes = (torch.round(values / scale) + zero).clamp(0, 2**width - 1)
            rounded_values = scale * (codes - zero)
        result[:, column] = rounded_values
        error = (values - rounded_values) / factor[column, column]
        left[:, column:] -= error[:, None] * factor[column, column:]
    return result


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("dead", [(), (21,), (3, 40, 41)])
def test_with_a_search_weights_of_dead_columns_stay(bits: int, dead: tuple[int, ...]) -> None:
    """As in the authors' code, whose 0.01 of the search leaves no diagonal at 0."""
    weight, inputs = random_weight(24, 96), correlated_inputs(96)
    inputs[..., list(dead)] = 0
    found = rounded(weight, FakeEvidence(inputs, needs=("hessian", "inputs")), w(bits)).dequantize()
    expected = by_the_description(weight, inputs, bits, 16)
    equal = (found - expected).abs() <= 1e-5 * weight.abs().max()
    assert float(equal.float().mean()) > 0.999
    assert not dead or bool((found[:, list(dead)] != 0).any(0).all())


def test_a_weight_of_one_leaves_salient_entries_like_the_others() -> None:
    weight, evidence = random_weight(24, 96), evidence_of(96)
    one, other = (
        rounded(weight, evidence, w(3), salient_weight=value).dequantize()
        for value in (1.0, 1.0000001)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, rounded(weight, evidence, w(3), salient_weight=20.0).dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_searched_range_is_never_worse_than_the_plain_one(bits: int) -> None:
    values, diagonal = random_weight(32, 16, seed=9), torch.ones(16)
    errors = []
    for steps in (0, 50):
        method = slim_llm.Rounding(slim_llm.Rounding.Settings(range_steps=steps))
        scale, zero = method._fit(values, diagonal, bits, "float32")
        codes = (torch.round(values / scale) + zero).clamp(0, 2**bits - 1)
        errors.append((scale * (codes - zero) - values).abs().pow(2.4).sum(-1))
    assert bool((errors[1] <= errors[0]).all()) and bool((errors[1] < errors[0]).any())


def test_a_diagonal_hessian_leaves_round_to_nearest_with_the_range_search() -> None:
    weight, evidence = random_weight(16, 64), DiagonalEvidence(64)
    found = rounded(weight, evidence, w(3), search_widths=False).dequantize()
    method = slim_llm.Rounding(slim_llm.Rounding.Settings())
    expected = torch.empty_like(weight)
    for start in range(0, 64, 16):
        values = weight[:, start : start + 16]
        scale, zero = method._fit(values, torch.ones(16), 3, "float32")
        expected[:, start : start + 16] = scale * (
            (torch.round(values / scale) + zero).clamp(0, 7) - zero
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_layout_is_exact_and_its_size_honest(bits: int, scale_dtype: str) -> None:
    found = rounded(random_weight(24, 128), evidence_of(128), w(bits, 16, scale_dtype))
    tensors, meta = found.pack()
    again = QuantizedWeight.kinds["mixed_width"].unpack(tensors, meta)
    assert torch.equal(again.dequantize(), found.dequantize()) and again.bits == found.bits  # type: ignore[attr-defined]
    scale_bits = 16 if scale_dtype == "float16" else 32
    nominal = bits + scale_bits / 16
    assert nominal < found.bits_per_weight < nominal + (scale_bits + bits + 1) / 16


def test_a_layer_of_few_groups_keeps_its_width() -> None:
    found = rounded(random_weight(16, 48), evidence_of(48), w(3))
    assert found.bits == (3, 3, 3)


def test_moved_widths_help_where_salience_is_uneven() -> None:
    weight, inputs = random_weight(48, 128), correlated_inputs(128, outliers=0)
    inputs[..., :16] *= 8
    evidence = FakeEvidence(inputs, needs=("hessian", "inputs"))
    x = inputs.reshape(-1, 128)

    def error(found: MixedWidthWeight) -> float:
        return float((x @ (found.dequantize() - weight).T).square().sum())

    searched, uniform = (
        rounded(weight, evidence, w(2)),
        rounded(weight, evidence, w(2), search_widths=False),
    )
    assert searched.bits[0] == 3
    assert error(searched) < error(uniform)


def test_dead_columns_become_nearly_nothing() -> None:
    inputs = correlated_inputs(64)
    inputs[..., [3, 40]] = 0
    found = rounded(
        random_weight(16, 64),
        FakeEvidence(inputs, needs=("hessian", "inputs")),
        w(3),
        search_widths=False,
    )
    assert bool((found.dequantize()[:, [3, 40]] == 0).all())


def test_linears_of_one_input_share_their_factors() -> None:
    block = FakeBlock(needs=("hessian", "inputs"))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        rounded(block.linear(name).weight.detach(), block.evidence[name], w(3, 8))
    assert set(block.evidence["self_attn.q_proj"].computed.values()) == {1}


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (WeightScheme("int", 3, -1), "group_size"),
        (WeightScheme("int", 3, 16, symmetric=True), "symmetric=false"),
        (WeightScheme("int", 6, 8), "2 to 4"),
        (WeightScheme("int", 3, 32), "four groups"),
    ],
)
def test_what_cannot_run_is_refused(scheme: WeightScheme, reason: str) -> None:
    found = plugins.build("rounding", "slim_llm", {}).check(Scheme("test", scheme), llama_shapes())
    assert any(reason in each for each in found)


@pytest.mark.parametrize(
    "settings", [{"damping_fraction": 0.0}, {"range_steps": 500}, {"salient_weight": -1.0}]
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plugins.build("rounding", "slim_llm", settings)


def test_broken_numbers_fail_the_cell() -> None:
    weight = random_weight(16, 64)
    weight[2, 3] = float("nan")
    with pytest.raises(MethodError, match="NaN"):
        rounded(weight, evidence_of(64), w(3))
    huge = [torch.full((4, 64), 1e38)]
    with pytest.raises(MethodError, match="divergence"):
        search_moved(torch.full((16, 64), 1e30), huge, torch.ones(4), 2, 16, "float32")
