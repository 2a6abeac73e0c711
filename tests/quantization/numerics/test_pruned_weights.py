"""A pruned matrix is stored as its mask and its survivors, exactly, and its size is what the formula says."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evidence import generator, random_weight

from harness.core.cell import WeightScheme
from harness.quantization.numerics.pruned_weights import SparseWeight
from harness.quantization.numerics.pruning import round_survivors

DENSE = {"format": "dense", "bits": 16, "scale_dtype": "float16", "group_size": -1}
SCHEMES = {
    **{f"w{bits}": {"bits": bits, "group_size": -1} for bits in (2, 3, 4, 8)},
    "w4g4": {"bits": 4, "group_size": 4},
    "w3g4sym": {"bits": 3, "group_size": 4, "symmetric": True},
    "w3 float zeros": {"bits": 3, "group_size": 4, "zero_point": "float"},
    "nf4": {"format": "nf4", "bits": 4, "group_size": 4, "scale_dtype": "float32"},
    "nf4 twice": {"format": "nf4", "group_size": 4, "scale_dtype": "double_quantized"},
    "float8 scales": {"bits": 4, "group_size": 4, "scale_dtype": "float8_e4m3"},
    "w16": DENSE,
    "w16 bfloat16": {**DENSE, "scale_dtype": "bfloat16"},
}


def scheme_of(name: str, sparsity: str = "0.5") -> WeightScheme:
    return WeightScheme(**SCHEMES[name], sparsity=sparsity)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(3, 12), (7, 20), (1, 4)])
def test_reading_back_is_exact(name: str, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape, seed=1)
    pruned = torch.rand(shape, generator=generator(2)) < 0.6
    pruned[0] = shape[0] > 1  # a row of which nothing is left, unless it is the only one
    pruned[-1] = False  # and one that is kept whole
    stored = round_survivors(weight, pruned, scheme_of(name), "gptq", "none")
    tensors, meta = stored.pack()
    again = SparseWeight.unpack(
        {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(json.dumps(meta))
    )
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert torch.equal(again.mask, ~pruned) and again.shape == shape
    assert not bool(stored.dequantize()[pruned].any())
    repeated = again.pack()[0]
    assert all(torch.equal(repeated[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_bits_are_one_for_the_mask_and_those_of_the_survivors(bits: int) -> None:
    rows, columns, size = 24, 64, 16
    weight = random_weight(rows, columns)
    pruned = torch.rand(rows, columns, generator=generator(4)) < 0.3
    weight_scheme = (
        WeightScheme("dense", 16, -1, scale_dtype="float16", sparsity="0.3")
        if bits == 16
        else WeightScheme("int", bits, size, sparsity="0.3")
    )
    stored = round_survivors(weight, pruned, weight_scheme, "gptq", "none")
    share = float((~pruned).float().mean())
    overhead = 0.0 if bits == 16 else (16 + bits) / size  # a scale and a zero point of each group
    whole_bytes = (
        3 * 8 * 8 / (rows * columns)
    )  # mask, codes and zero points end in whole runs of bytes
    assert stored.bits_per_weight == pytest.approx(1 + share * bits + overhead, abs=whole_bytes)
    assert stored.density == pytest.approx(share)


def test_a_kept_weight_that_rounds_to_zero_stays_kept() -> None:
    weight = torch.tensor([[1.0, 0.01, -1.0, 0.5]])
    pruned = torch.tensor([[False, False, False, True]])
    stored = round_survivors(weight, pruned, scheme_of("w2"), "gptq", "none")
    assert float(stored.dequantize()[0, 1]) == 0 and bool(stored.mask[0, 1])


def test_a_pattern_that_the_mask_breaks_is_not_stored() -> None:
    weight, pruned = random_weight(2, 8), torch.zeros(2, 8, dtype=torch.bool)
    pruned[:, ::2] = True
    kept = round_survivors(weight, pruned, scheme_of("w4", "2:4"), "gptq", "none")
    assert kept.pack()[1]["pattern"] == "2:4"
    pruned[0, 1] = True
    broken = round_survivors(weight, pruned, scheme_of("w4", "2:4"), "gptq", "none")
    with pytest.raises(AssertionError, match="2:4"):
        broken.pack()


def test_the_grid_is_fitted_with_zeros_at_pruned_places() -> None:
    weight = torch.tensor([[3.0, 0.4, -0.3, 0.2]])
    pruned = torch.tensor([[True, False, False, False]])
    scale = round_survivors(weight, pruned, scheme_of("w4"), "gptq", "none").survivors
    assert math.isclose(float(getattr(scale, "scale")), 0.7 / 15, rel_tol=1e-3)  # noqa: B009
