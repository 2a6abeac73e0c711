"""VPTQ: exact and scalar limits, assignment without feedback, residuals, what comes back from disk."""

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
from harness.quantization.methods.vptq import Rounding, VectorWeight, assign, prepare
from harness.quantization.numerics.codebooks import cluster_vectors, nearest_vectors
from harness.quantization.numerics.error_feedback import feed_forward
from harness.quantization.numerics.hessians import factored

SMALL = {"vector_length": 4, "index_bits": 6, "iterations": 20}


def quantize(
    weight: Tensor,
    evidence: FakeEvidence,
    bits: float = 2,
    seed: int = 0,
    dtype: str = "float32",
    **settings: object,
) -> VectorWeight:
    method = Rounding(Rounding.Settings(**{**SMALL, **settings}))  # type: ignore[arg-type]
    scheme = WeightScheme("int", bits, -1, scale_dtype=dtype)
    quantized = method.round_layer("q_proj", weight, evidence, scheme, generator(seed))
    assert isinstance(quantized, VectorWeight)
    return quantized


def test_a_codebook_of_all_vectors_is_exact() -> None:
    entries = torch.randn(16, 4, generator=generator())
    index = torch.randint(0, 16, (5, 24), generator=generator(1))
    weight = entries[index].transpose(1, 2).flatten(0, 1)
    upper = factored(FakeEvidence(correlated_inputs(24))["hessian"], 0.01).upper
    indices, left = assign(weight, upper, [entries], 8)
    assert torch.equal(indices[0], index) and float(left.abs().max()) < 1e-5


def test_scalars_from_a_uniform_codebook_are_gptq_on_that_grid() -> None:
    weight = random_weight(16, 32)
    upper = factored(FakeEvidence(correlated_inputs(32))["hessian"], 0.01).upper
    grid = torch.linspace(-0.2, 0.2, 16)

    def nearest(j: int, view: object) -> Tensor:
        return grid[(view[j].unsqueeze(1) - grid).abs().argmin(1)]  # type: ignore[index]

    expected = feed_forward(weight, upper, nearest)
    indices, _ = assign(weight, upper, [grid.unsqueeze(1)], 128)
    torch.testing.assert_close(grid[indices[0]], expected, rtol=0, atol=0)


def test_a_diagonal_hessian_takes_the_nearest_centroid_of_each_vector() -> None:
    weight, entries = random_weight(16, 32), 0.05 * torch.randn(8, 4, generator=generator())
    upper = factored(torch.diag(torch.rand(32, generator=generator()) + 0.1), 0.01).upper
    indices, left = assign(weight, upper, [entries], 128)
    vectors = weight.reshape(4, 4, 32).transpose(1, 2)
    expected = (vectors.unsqueeze(2) - entries).square().sum(-1).argmin(-1)
    assert torch.equal(indices[0], expected)
    torch.testing.assert_close(left, weight - entries[expected].transpose(1, 2).flatten(0, 1))


def test_a_residual_codebook_with_zero_never_hurts() -> None:
    weight, entries = random_weight(16, 32), 0.05 * torch.randn(8, 4, generator=generator())
    residual = 0.02 * torch.randn(8, 4, generator=generator(1))
    residual[3] = 0
    upper = torch.eye(32)
    _, once = assign(weight, upper, [entries], 128)
    _, twice = assign(weight, upper, [entries, residual], 128)
    assert bool(
        (
            twice.reshape(4, 4, 32).square().sum(1) <= once.reshape(4, 4, 32).square().sum(1) + 1e-9
        ).all()
    )


def test_order_and_normalisation_undo_themselves() -> None:
    """Three times the same matrix, up to codebooks: enough entries bring every variant close to the weight."""
    weight, inputs = random_weight(16, 32), correlated_inputs(32)
    weight[:, 3] = 0.7  # a constant column: its scale would be 0
    for settings in ({}, {"normalize": False}, {"act_order": False}):
        back = quantize(weight, FakeEvidence(inputs), 3.5, index_bits=7, **settings).dequantize()
        assert float((back - weight).square().sum() / weight.square().sum()) < 0.05
    torch.testing.assert_close(back[:, 3], weight[:, 3])


@pytest.mark.parametrize("bits", [1, 1.5, 2, 3])
def test_the_error_falls_with_the_bits_and_nominal_bits_are_right(bits: float) -> None:
    inputs, weight = correlated_inputs(64, length=128), random_weight(64, 64)
    quantized = quantize(weight, FakeEvidence(inputs), bits)
    coarser = quantize(weight, FakeEvidence(inputs), bits - 0.5)
    assert quantized.nominal_bits == bits
    assert layer_error(weight, quantized.dequantize(), inputs) < layer_error(
        weight, coarser.dequantize(), inputs
    )


def test_everything_stored_is_counted() -> None:
    quantized = quantize(
        random_weight(64, 64), FakeEvidence(correlated_inputs(64)), 2, dtype="float16"
    )
    # 6 bits and 2 residual bits for vectors of 4
    indices, books = 2.0, (64 * 4 + 4 * 4) * 16 / 4096
    assert quantized.bits_per_weight == pytest.approx(indices + books + 2 * 16 / 64)


@pytest.mark.parametrize(("bits", "rows"), [(1, 16), (2, 17), (3, 30)])
def test_packing_is_exact(bits: float, rows: int) -> None:
    quantized = quantize(
        random_weight(rows, 48), FakeEvidence(correlated_inputs(48)), bits, dtype="float16"
    )
    again = VectorWeight.unpack(*quantized.pack())
    assert quantized.shape == again.shape == (rows, 48)
    assert torch.equal(again.dequantize(), quantized.dequantize())


def test_feedback_lowers_the_layer_error() -> None:
    inputs, weight = correlated_inputs(64, length=128), random_weight(64, 64)
    upper, vectors = (
        prepare(FakeEvidence(inputs)["hessian"], 0.01, False).upper,
        weight.T.reshape(-1, 4),
    )
    entries = cluster_vectors(vectors, torch.ones(vectors.shape[0]), 64, generator())
    back = []
    for factor in (upper, torch.eye(64)):
        indices, _ = assign(weight, factor, [entries], 128)
        back.append(entries[indices[0]].transpose(1, 2).flatten(0, 1))
    assert layer_error(weight, back[0], inputs) < layer_error(weight, back[1], inputs)


def test_seeds_decide_and_repeat() -> None:
    evidence, weight = FakeEvidence(correlated_inputs(48)), random_weight(32, 48)
    one, same, other = (quantize(weight, evidence, 1, seed).dequantize() for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_clustering_finds_separate_clouds_and_respects_weights() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vectors = centres.repeat_interleave(50, 0) + 0.01 * torch.randn(150, 2, generator=generator())
    found = cluster_vectors(vectors, torch.ones(150), 12, generator())
    assert float((vectors - found[nearest_vectors(vectors, found)]).square().sum(1).max()) < 0.05
    mean = cluster_vectors(torch.tensor([[0.0], [1.0]]), torch.tensor([3.0, 1.0]), 1, generator())
    torch.testing.assert_close(mean, torch.tensor([[0.25]]))


def test_dead_columns_are_harmless() -> None:
    hessian = FakeEvidence(correlated_inputs(32))["hessian"].clone()
    hessian[4], hessian[:, 4] = 0, 0
    assert bool(
        torch.isfinite(
            quantize(random_weight(16, 32), HessianEvidence(hessian), 1).dequantize()
        ).all()
    )


@pytest.mark.parametrize(
    ("bits", "length", "expected"),
    [
        (2, 8, (16, 0)),
        (3, 8, (16, 8)),
        (4, 8, (16, 16)),
        (1.5, 8, (12, 0)),
        (1.63, 16, (16, 10)),
        (2.33, 12, (16, 12)),
    ],
)
def test_published_points(bits: float, length: int, expected: tuple[int, int]) -> None:
    assert Rounding(Rounding.Settings(vector_length=length)).index_bits(bits) == expected


def test_check() -> None:
    shapes = llama_shapes()
    assert (
        Rounding(Rounding.Settings(vector_length=4, index_bits=6)).check(
            Scheme("w2", WeightScheme("int", 2)), shapes
        )
        == []
    )
    (reason,) = Rounding(Rounding.Settings()).check(Scheme("w2", WeightScheme("int", 2)), shapes)
    assert "65536 entries" in reason and "down_proj" in reason
    reasons = Rounding(Rounding.Settings(vector_length=4)).check(
        Scheme("w2.3g32", WeightScheme("nf4", 2.3, 32)), shapes
    )
    assert len(reasons) == 3


OUTLIERS = {"outlier_share": 0.25, "outlier_vector_length": 2, "outlier_index_bits": 7}


def test_outlier_columns_have_a_codebook_of_their_own() -> None:
    inputs = correlated_inputs(64, sequences=8, outliers=16)
    weight, evidence = random_weight(48, 64), FakeEvidence(inputs)
    largest = set(evidence["hessian"].diagonal().argsort(descending=True)[:16].tolist())
    for settings in ({}, {"act_order": False}, {"normalize": False}):
        plain = quantize(weight, evidence, **settings)
        found = quantize(weight, evidence, **settings, **OUTLIERS)
        assert found.outliers is not None and found.shape == (48, 64)
        book, places = found.outliers
        assert set(places.tolist()) == largest and book.entries.shape == (128, 2)
        assert book.indices.shape == (24, 16) and found.codebooks[0].indices.shape == (12, 48)
        again = VectorWeight.unpack(*found.pack())
        assert torch.equal(again.dequantize(), found.dequantize())
        # 3.5 index bits per weight where inputs are largest, 2 elsewhere
        assert layer_error(weight, found.dequantize(), inputs) < 0.9 * layer_error(
            weight, plain.dequantize(), inputs
        )
    assert plain.outliers is None and "outlier_columns" not in plain.pack()[0]


def test_outlier_vectors_that_are_all_in_the_codebook_are_exact() -> None:
    values = torch.tensor([-0.3, -0.1, 0.2, 0.4])
    weight = values[torch.randint(0, 4, (21, 32), generator=generator())]
    diagonal = torch.arange(1.0, 33.0)
    found = quantize(
        weight,
        HessianEvidence(torch.diag(diagonal)),
        normalize=False,
        outlier_share=0.25,
        outlier_vector_length=1,
        outlier_index_bits=7,  # so many drawn vectors that each of the four values is among them
    )
    torch.testing.assert_close(found.dequantize()[:, 24:], weight[:, 24:], rtol=1e-6, atol=1e-7)
    assert float((found.dequantize()[:, :24] - weight[:, :24]).abs().max()) > 1e-3


def test_outlier_settings_are_refused_where_a_matrix_is_too_small() -> None:
    scheme = Scheme("w2", WeightScheme("int", 2, -1))
    for settings, word in (
        ({"outlier_share": 0.01}, "not one column"),
        ({"outlier_share": 0.1}, "outlier codebook of 4096"),
    ):
        method = Rounding(Rounding.Settings(**{**SMALL, **settings}))  # type: ignore[arg-type]
        assert any(word in reason for reason in method.check(scheme, llama_shapes()))
    with pytest.raises(ValueError, match="outlier_share"):
        Rounding.Settings(outlier_share=1.0)
