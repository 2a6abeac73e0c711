"""GPTAQ: GPTQ where the two models' inputs agree, and closer to the full-precision output where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evidence import FakeEvidence, correlated_inputs, generator, random_weight
from torch import Tensor

from harness.core import plugins
from harness.core.cell import WeightScheme
from harness.core.errors import ConfigError, MethodError
from harness.quantization.methods.gptaq import correction_matrix
from harness.quantization.numerics import grids
from harness.quantization.numerics.hessians import factored
from harness.quantization.numerics.weights import QuantizedWeight

NEEDS = ("hessian", "cross")


def two_streams(width: int = 64, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Inputs in the full-precision model and behind rounded blocks, [sequences, length, width] each."""
    full = correlated_inputs(width, sequences=8)
    drift = noise * torch.randn(full.shape, generator=generator(7)) * full.std()
    mixed = full @ (torch.eye(width) + 0.1 * torch.randn(width, width, generator=generator(8)))
    return full, 0.5 * (full + mixed) + 0.1 * drift


def evidence_of(full: Tensor, rounded: Tensor) -> FakeEvidence:
    return FakeEvidence(rounded, original=full, needs=NEEDS)


def rounded(
    method: str, weight: Tensor, evidence: Any, bits: int = 3, group_size: int = -1, **settings: Any
) -> Tensor:
    scheme = WeightScheme("int", bits, group_size, False, "float32")
    found: QuantizedWeight = plugins.build("rounding", method, settings).round_layer(
        "mlp.up_proj", weight, evidence, scheme, generator()
    )
    return found.dequantize()


def two_stream_error(weight: Tensor, found: Tensor, full: Tensor, behind: Tensor) -> float:
    x, y = (each.reshape(-1, weight.shape[1]).double() for each in (full, behind))
    target = x @ weight.double().T
    return float((y @ found.double().T - target).square().sum() / target.square().sum())


@pytest.mark.parametrize(
    "settings",
    [{}, {"act_order": True}, {"act_order": True, "static_groups": True}, {"block_size": 24}],
)
@pytest.mark.parametrize("group_size", [-1, 16])
def test_without_a_difference_or_without_strength_it_is_gptq(
    settings: dict[str, Any], group_size: int
) -> None:
    full, behind = two_streams()
    weight = random_weight(24, 64)
    expected = rounded("gptq", weight, evidence_of(full, behind), group_size=group_size, **settings)
    same = evidence_of(behind, behind)
    for strength in (0.25, 1.0):
        found = rounded("gptaq", weight, same, group_size=group_size, strength=strength, **settings)
        assert torch.equal(found, expected)
    found = rounded(
        "gptaq", weight, evidence_of(full, behind), group_size=group_size, strength=0.0, **settings
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("correction", ["as_published", "column"])
@pytest.mark.parametrize("block_size", [16, 128])
def test_it_equals_the_described_loop(correction: str, block_size: int) -> None:
    full, behind = two_streams()
    weight, evidence = random_weight(24, 64), evidence_of(full, behind)
    hessian, cross = evidence["hessian"], evidence["cross"]
    upper = factored(hessian, 0.01).upper
    added = 0.25 * ((cross - hessian) @ upper.T).triu(1) @ upper
    grid = grids.fit(weight, 3, False)
    w, expected = weight.clone(), torch.empty_like(weight)
    for start in range(0, 64, block_size):
        end = min(64, start + block_size)
        before = w[:, start:end].clone()
        for j in range(start, end):
            before[:, j - start] = w[:, j]
            expected[:, j] = grid.nearest(w[:, j, None])[:, 0]
            error = (w[:, j] - expected[:, j]) / upper[j, j]
            inside = slice(j + 1, end)
            w[:, inside] += w[:, j, None] * added[j, inside] - error[:, None] * upper[j, inside]
            carried = expected[:, j] if correction == "as_published" else w[:, j]
            behind_block = slice(end, 64)
            w[:, behind_block] += (
                carried[:, None] * added[j, behind_block] - error[:, None] * upper[j, behind_block]
            )
    found = rounded("gptaq", weight, evidence, correction=correction, block_size=block_size)
    close = (found - expected).abs() <= 1e-5 * expected.abs().max()
    assert float(close.float().mean()) > 0.99


def test_powers_of_two_in_the_statistics_change_nothing() -> None:
    full, behind = two_streams()
    weight = random_weight(24, 64)
    first = rounded("gptaq", weight, evidence_of(full, behind), group_size=16)
    other = rounded("gptaq", weight, evidence_of(full * 8, behind * 8), group_size=16)
    assert torch.equal(first, other)


def test_with_whole_columns_the_block_size_is_only_speed() -> None:
    full, behind = two_streams()
    weight = random_weight(24, 64)
    small, large, published = (
        rounded("gptaq", weight, evidence_of(full, behind), **settings)
        for settings in (
            {"correction": "column", "block_size": 1},
            {"correction": "column", "block_size": 128},
            {"block_size": 1},
        )
    )
    assert float((small != large).float().mean()) < 0.01
    assert float((published != large).float().mean()) > float((small != large).float().mean())


def test_it_comes_closer_to_the_full_precision_output() -> None:
    full, behind = two_streams()
    weight = random_weight(64, 64)
    errors = {
        method: two_stream_error(
            weight, rounded(method, weight, evidence_of(full, behind)), full, behind
        )
        for method in ("gptq", "gptaq", "qronos")
    }
    assert errors["qronos"] < errors["gptaq"] < errors["gptq"]


def test_dead_columns_are_exactly_zero() -> None:
    full, behind = two_streams()
    behind[..., [3, 40]] = 0
    for settings in ({}, {"act_order": True}):
        found = rounded(
            "gptaq", random_weight(24, 64), evidence_of(full, behind), group_size=16, **settings
        )
        assert not found[:, [3, 40]].any()


def test_streams_that_have_nothing_in_common_are_refused() -> None:
    full, behind = two_streams()
    with pytest.raises(MethodError, match="little to do with each other"):
        rounded("gptaq", random_weight(8, 64), evidence_of(full * 1000, behind))
    with pytest.raises(MethodError, match="NaN or infinity"):
        rounded("gptaq", random_weight(8, 64), evidence_of(full / 0, behind))


def test_q_k_and_v_share_one_correction() -> None:
    full, behind = two_streams()
    evidence = evidence_of(full, behind)
    for seed in range(3):
        rounded("gptaq", random_weight(8, 64, seed), evidence)
    assert all(count == 1 for count in evidence.computed.values()) and len(evidence.computed) == 2


def test_the_correction_is_strictly_upper_triangular() -> None:
    full, behind = two_streams()
    evidence = evidence_of(full, behind)
    factor = factored(evidence["hessian"], 0.01, act_order=True)
    matrix = correction_matrix(evidence["cross"], evidence["hessian"], factor, 1.0)
    assert torch.equal(matrix, matrix.triu(1)) and 0 < float(matrix.abs().max()) < 10


def test_settings_are_checked() -> None:
    for settings, word in (
        ({"strength": -1.0}, "strength"),
        ({"correction": "paper"}, "as_published, column"),
        ({"damping_fraction": 0.0}, "above 0"),
    ):
        with pytest.raises(ConfigError, match=word):
            plugins.build("rounding", "gptaq", settings)
