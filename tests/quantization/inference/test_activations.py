"""Grids of activations: their oracles, and the rules of the references written out."""

from __future__ import annotations

import pytest
import torch

from harness.core.cell import ActivationScheme
from harness.core.errors import MethodError
from harness.quantization.inference.activations import ActivationQuantizer

GRIDS = ["smoothquant", "compressed", "llama_quant"]


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*(shape or (2, 12, 64)), generator=torch.Generator().manual_seed(seed))
    return x * (1 + 10 * torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(1)) ** 6)


def rounded(x: torch.Tensor, **fields: object) -> torch.Tensor:
    return ActivationQuantizer(ActivationScheme(**fields))(x)  # type: ignore[arg-type]


def test_the_references_rules() -> None:
    x = inputs()
    largest = x.abs().amax(-1, keepdim=True)
    s = largest.clamp(min=1e-5) / 127
    assert torch.equal(rounded(x), torch.round(x / s) * s)
    c = largest / 127.5
    assert torch.equal(rounded(x, grid="compressed"), torch.round(x / c).clamp(-128, 127) * c)
    q = largest.clamp(min=2e-3) / 126
    assert torch.equal(rounded(x, grid="llama_quant"), torch.round(x / q).clamp(-127, 126) * q)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", ["token", "tensor", "group"])
def test_properties(grid: str, bits: int, granularity: str) -> None:
    x = inputs()
    fields = {"grid": grid, "bits": bits, "granularity": granularity, "group_size": 16}
    once = rounded(x, **fields)
    assert once.shape == x.shape and once.dtype == x.dtype
    assert torch.equal(rounded(2 * x, **fields), 2 * once)
    assert torch.equal(rounded(torch.zeros(1, 3, 64), **fields), torch.zeros(1, 3, 64))
    order = torch.randperm(12)
    if granularity != "tensor":
        assert torch.equal(rounded(x[:, order], **fields), once[:, order])
    # an item scores alone as it does in a batch
    assert torch.equal(rounded(x[:1], **fields), once[:1])


def test_more_scales_and_more_bits_round_less() -> None:
    x = inputs()
    errors = [
        float((rounded(x, granularity=g, group_size=16) - x).norm())
        for g in ("tensor", "token", "group")
    ]
    assert errors[0] > errors[1] > errors[2]
    assert float((rounded(x, bits=16) - x).abs().max()) < 1e-3
    whole = rounded(x, granularity="group", group_size=64)
    assert torch.equal(whole, rounded(x, granularity="token"))


def test_asymmetric_grids_hold_one_sided_inputs_better() -> None:
    x = inputs().abs()
    assert (rounded(x, symmetric=False, bits=4) - x).norm() < (rounded(x, bits=4) - x).norm() * 0.7
    s = x.amax(-1, keepdim=True) / 15
    assert ((rounded(x, symmetric=False, bits=4) - x).abs() <= s / 2 * 1.0001).all()


def test_float8() -> None:
    x = inputs()
    e4m3, e5m2 = (rounded(x, format=f"fp8_{kind}") for kind in ("e4m3", "e5m2"))
    assert (e4m3 - x).norm() < (e5m2 - x).norm() < 0.1 * x.norm()
    assert torch.allclose(e4m3.abs().amax(-1), x.abs().amax(-1))


def test_static_scales() -> None:
    quantizer = ActivationQuantizer(
        ActivationScheme(granularity="tensor", dynamic=False), "block 0, q_proj"
    )
    with pytest.raises(MethodError, match="need calibration"):
        quantizer(inputs())
    quantizer.observing = True
    for seed in range(3):
        assert torch.equal(quantizer(inputs(seed=seed)), inputs(seed=seed))
    quantizer.observing = False
    largest = max(float(inputs(seed=seed).abs().max()) for seed in range(3))
    assert torch.allclose(
        quantizer(inputs()), torch.round(inputs() / (largest / 127)) * (largest / 127), atol=1e-5
    )
    assert float(quantizer(100 * inputs()).abs().max()) == pytest.approx(largest * 128 / 127)


def test_impossible_schemes() -> None:
    with pytest.raises(MethodError, match="granularity token needs dynamic"):
        ActivationQuantizer(ActivationScheme(dynamic=False))
    with pytest.raises(MethodError, match="does not divide 64"):
        rounded(inputs(), granularity="group", group_size=24)


# --- LLM.int8()'s decomposition ------------------------------------------------------------------------------------------------


def test_a_threshold_that_nothing_reaches_changes_nothing() -> None:
    x = inputs()
    assert torch.equal(rounded(x, outlier_threshold=float(x.abs().max()) + 1), rounded(x))


def test_a_tiny_threshold_keeps_every_channel() -> None:
    x = inputs().clamp(min=0.1)
    assert torch.equal(rounded(x, outlier_threshold=1e-6), x)


def test_outlier_channels_stay_and_their_small_values_still_count_for_the_scale() -> None:
    x = torch.tensor([[[1.0, 0.3, 0.2], [0.5, 9.0, 0.1], [0.1, 2.0, 0.4]]])
    found = rounded(x, outlier_threshold=6.0)
    assert torch.equal(found[..., 1], x[..., 1])
    scales = torch.tensor([1.0, 0.5, 2.0]) / 127  # 9.0 is left out, 2.0 of the same channel is not
    expected = torch.round(x[0, :, 2] / scales) * scales
    assert torch.allclose(found[0, :, 2], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_beside_outliers_are_computed_in_float32(dtype: torch.dtype) -> None:
    """bitsandbytes' rule, written out: codes round(x · (127 / a)) in float32, a the largest |x| below the threshold."""
    x = inputs(3, 20, 64).to(dtype)
    outliers = x.abs() >= 6
    small = x.masked_fill(outliers, 0).float()
    largest = small.abs().amax(-1, keepdim=True)
    codes = torch.round(small * (127.0 / largest))
    expected = torch.where(outliers.any(1, keepdim=True), x, (codes * (largest / 127)).to(dtype))
    found = rounded(x, outlier_threshold=6.0)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert 0 < int(outliers.any(1).sum()) < outliers.any(1).numel()


def test_tokens_of_zeros_and_of_the_smallest_numbers_stay_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        least = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-45], dtype=dtype)
        x = least[:, None].expand(3, 8)
        found = rounded(x, outlier_threshold=6.0)
        assert bool((found[0] == 0).all()) and bool(torch.isfinite(found).all())
        assert bool((found.float() - x.float()).abs().max() <= 1e-30)


def test_outliers_of_one_sequence_are_not_those_of_its_batch_mates() -> None:
    x = inputs(2, 5, 16).clamp(-5, 5)
    x[1, 3, 7] = 50.0
    together = rounded(x, outlier_threshold=6.0)
    for index in range(2):
        assert torch.equal(
            together[index : index + 1], rounded(x[index : index + 1], outlier_threshold=6.0)
        )


def test_permuting_channels_permutes_the_result() -> None:
    x = inputs()
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(5))
    assert torch.equal(
        rounded(x[..., order], outlier_threshold=6.0), rounded(x, outlier_threshold=6.0)[..., order]
    )


def test_decomposition_needs_dynamic_integer_tokens() -> None:
    for fields in ({"granularity": "tensor"}, {"format": "fp8_e4m3"}, {"outlier_threshold": -1.0}):
        with pytest.raises(MethodError, match="outlier"):
            rounded(inputs(), **{"outlier_threshold": 6.0, **fields})


# --- floats of 8 bits ----------------------------------------------------------------------------------------------------------


def test_fp8_keeps_what_it_can_say_and_is_relative() -> None:
    x = inputs()
    once = rounded(x, format="fp8_e4m3")
    assert torch.allclose(rounded(once, format="fp8_e4m3"), once, rtol=1e-6)
    assert torch.equal(rounded(8 * x, format="fp8_e4m3"), 8 * once)
    scale = x.abs().amax(-1, keepdim=True) / 448
    normal = (x / scale).abs() >= 2.0**-6
    assert bool((((once - x) / x).abs()[normal] <= 2.0**-4 + 1e-6).all())
    codes = torch.tensor(
        [448.0, -13.0, 0.40625, 2.0**-9, 0.0]
    )  # all of E4M3, the last but one subnormal
    assert torch.equal(rounded(codes[None] * 0.5, format="fp8_e4m3"), codes[None] * 0.5)
