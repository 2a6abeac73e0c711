"""SpQR: GPTQ as its limit, outliers kept, the second level, the bits it really takes."""

from __future__ import annotations

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
from torch import Tensor

from harness.core.cell import Scheme, WeightScheme
from harness.quantization.methods import gptq
from harness.quantization.methods.spqr import (
    BilevelWeight,
    Rounding,
    SecondLevel,
    asymmetric_grid,
    leave_one_out_gain,
)
from harness.quantization.numerics.hessians import damped


def quantize(
    weight: Tensor,
    evidence: FakeEvidence,
    bits: int = 3,
    group_size: int = 16,
    dtype: str = "float16",
    **settings: object,
) -> BilevelWeight:
    method = Rounding(Rounding.Settings(**settings))  # type: ignore[arg-type]
    scheme = WeightScheme("int", bits, group_size, scale_dtype=dtype)
    quantized = method.round_layer("q_proj", weight, evidence, scheme, generator())
    assert isinstance(quantized, BilevelWeight)
    return quantized


PLAIN = {"outlier_threshold": None, "scale_bits": None, "zero_bits": None, "act_order": False}


def share(quantized: BilevelWeight) -> float:
    rows, columns = quantized.shape
    return quantized.outliers.values.numel() / (rows * columns)


def test_without_its_additions_it_is_gptq() -> None:
    evidence, weight = FakeEvidence(correlated_inputs(256, length=128)), random_weight(32, 256)
    ours = quantize(
        weight, evidence, 4, 128, "float32", **PLAIN, round_zero=True, damping_fraction=0.01
    )
    method = gptq.Rounding(gptq.Rounding.Settings())
    theirs = method.round_layer(
        "q_proj", weight, evidence, WeightScheme("int", 4, 128, scale_dtype="float32"), generator()
    )
    assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_threshold_zero_keeps_every_weight() -> None:
    evidence, weight = FakeEvidence(correlated_inputs(64)), random_weight(32, 64)
    quantized = quantize(weight, evidence, dtype="float32", outlier_threshold=0.0)
    torch.testing.assert_close(quantized.dequantize(), weight, rtol=0, atol=0)
    assert share(quantized) > 0.9


def test_one_huge_weight_is_kept_exactly() -> None:
    evidence, weight = (
        FakeEvidence(correlated_inputs(64)),
        0.02 * torch.randn(16, 64, generator=generator()),
    )
    weight[3, 0] = 4.0  # in the first column rounded no update has reached it
    quantized = quantize(weight, evidence, dtype="float32", act_order=False)
    assert float(quantized.dequantize()[3, 0]) == 4.0
    others = torch.ones(64, dtype=torch.bool)
    others[0] = False
    assert float((quantized.dequantize() - weight)[3, others].abs().max()) < 0.2


def test_more_outliers_mean_less_error_at_the_ends() -> None:
    inputs, weight = correlated_inputs(64, length=128), random_weight(48, 64)
    runs = [
        quantize(weight, FakeEvidence(inputs), outlier_threshold=threshold)
        for threshold in (None, 0.5, 0.2, 0.02)
    ]
    shares = [share(run) for run in runs]
    errors = [layer_error(weight, run.dequantize(), inputs) for run in runs]
    assert shares == sorted(shares) and shares[0] == 0 and errors[-1] < errors[0]


def test_the_published_layout_costs_what_the_paper_says() -> None:
    evidence, weight = FakeEvidence(correlated_inputs(256, length=128)), random_weight(256, 256)
    without = quantize(weight, evidence, outlier_threshold=None, act_order=False)
    # and the empty row pointers
    assert without.bits_per_weight == pytest.approx(3.625 + 32 * 257 / 65536)
    kept = quantize(weight, evidence, act_order=False)
    assert kept.bits_per_weight == pytest.approx(
        3.625 + 32 * share(kept) + 32 * 257 / 65536, abs=2e-3
    )
    ordered = quantize(weight, evidence)
    assert ordered.bits_per_weight == pytest.approx(
        3.625 + 32 * share(ordered) + 32 * 257 / 65536 + 16 / 256, abs=2e-3
    )
    whole = quantize(weight, evidence, outlier_threshold=None, act_order=False, round_zero=True)
    assert whole.bits_per_weight == pytest.approx(
        3 + (3 + 3) / 16 + 32 / (16 * 16) + 32 * 257 / 65536
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        PLAIN,
        {"round_zero": True},
        {"scale_bits": None},
        {"zero_bits": None},
        {"outlier_threshold": 0.05},
        {"zero_bits": 2},
    ],
)
def test_packing_is_exact(settings: dict[str, object]) -> None:
    quantized = quantize(random_weight(32, 64), FakeEvidence(correlated_inputs(64)), **settings)
    again = BilevelWeight.unpack(*quantized.pack())
    assert torch.equal(again.dequantize(), quantized.dequantize()) and torch.equal(
        again.codes, quantized.codes
    )


def test_what_is_stored_is_what_was_rounded() -> None:
    """The matrix read back is the one whose errors were fed back: with a diagonal Hessian, each weight is at its nearest value."""
    weight = random_weight(32, 64)
    quantized = quantize(weight, HessianEvidence(torch.eye(64)), outlier_threshold=None)
    assert isinstance(quantized.scale, SecondLevel)
    error = (quantized.dequantize() - weight).abs().reshape(32, 4, 16)
    scale, zero = (
        quantized.scale.read(),
        quantized.zero.read() if isinstance(quantized.zero, SecondLevel) else quantized.zero,
    )
    lo, hi = (scale * (0 - zero)).unsqueeze(-1), (scale * (7 - zero)).unsqueeze(-1)
    inside = (weight.reshape(32, 4, 16) >= lo) & (weight.reshape(32, 4, 16) <= hi)
    assert (
        bool((error <= scale.unsqueeze(-1) / 2 + 1e-6)[inside].all())
        and float(inside.float().mean()) > 0.7
    )


def test_leave_one_out_is_a_refit_without_the_weight() -> None:
    group, diagonal = random_weight(5, 8), torch.rand(8, generator=generator(1)) + 0.5
    gains = leave_one_out_gain(group, diagonal, 3)

    def error(values: Tensor, d: Tensor) -> float:
        scale, zero = asymmetric_grid(values.min(), values.max(), 3)
        codes = torch.round(values / scale + zero).clamp(0, 7)
        return float((((scale * (codes - zero)) - values) / d).square().sum())

    for row in range(5):
        for k in range(8):
            others = torch.arange(8) != k
            expected = error(group[row], diagonal) - error(group[row, others], diagonal[others])
            assert float(gains[row, k]) == pytest.approx(expected, abs=1e-6)


def test_equal_weights_are_exact_on_their_grid() -> None:
    for value in (0.3, -0.3, 0.0):
        scale, zero = asymmetric_grid(torch.tensor([value]), torch.tensor([value]), 3)
        assert float(
            scale * (torch.round(value / scale.clamp(min=1e-9) + zero).clamp(0, 7) - zero)
        ) == pytest.approx(value)


def test_damping_comes_before_dead_columns() -> None:
    hessian = torch.diag(torch.tensor([4.0, 0.0, 2.0]))
    ready, dead = damped(hessian, 1.0, dead_last=True)
    assert ready.diagonal().tolist() == [6, 1, 4] and dead.tolist() == [False, True, False]


def test_the_block_size_changes_nothing() -> None:
    evidence, weight = FakeEvidence(correlated_inputs(64)), random_weight(32, 64)
    one, other = (
        quantize(weight, evidence, block_size=16),
        quantize(weight, evidence, block_size=64),
    )
    torch.testing.assert_close(one.dequantize(), other.dequantize(), atol=0.05, rtol=0)
    assert float((one.codes != other.codes).float().mean()) < 0.02


def test_one_factorisation_per_input() -> None:
    evidence = FakeEvidence(correlated_inputs(64), needs=("hessian",))
    for bits in (2, 3, 4):
        quantize(random_weight(32, 64), evidence, bits)
    assert list(evidence.computed.values()) == [1]


def test_check_lists_what_cannot_run() -> None:
    method = Rounding(Rounding.Settings())
    assert method.check(Scheme("w3g16", WeightScheme("int", 3, 16)), llama_shapes()) == []
    reasons = method.check(
        Scheme("w3sym", WeightScheme("int", 3, -1, symmetric=True)), llama_shapes(width=40)
    )
    assert (
        len(reasons) == 3
        and "self_attn.q_proj [40 × 40]" in reasons[-1]
        and "mlp.gate_proj" not in reasons[-1]
    )


def test_integer_zeros_beyond_float16_are_stored_as_they_are_used() -> None:
    # zero points of several thousand
    weight = 1 + 1e-4 * torch.randn(16, 32, generator=generator())
    quantized = quantize(
        weight, FakeEvidence(correlated_inputs(32)), 3, 16, **PLAIN, round_zero=True
    )
    assert isinstance(quantized.zero, Tensor) and float(quantized.zero.abs().max()) > 2048
    again = BilevelWeight.unpack(*quantized.pack())
    assert torch.equal(again.dequantize(), quantized.dequantize())
