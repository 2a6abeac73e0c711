"""Any-Precision: nested widths, errors that fall with the bits, exact rows, invariances."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import FakeEvidence, correlated_inputs, generator, llama_shapes, random_weight
from small import cell, failures, part, windows
from small import quantize as run
from torch import Tensor

from harness.core.cell import (
    Cell,
    Method,
    Override,
    Scheme,
    WeightScheme,
    cell_key,
    freeze,
    quantize_key,
    to_json,
)
from harness.core.errors import MethodError
from harness.quantization.inference.load import load
from harness.quantization.methods.any_precision import Rounding
from harness.quantization.numerics.codebooks import LookupWeight, NestedWeight
from harness.storage.record import Record


def evidence_of(gradients: Tensor) -> FakeEvidence:
    return FakeEvidence(
        correlated_inputs(gradients.shape[-1]), gradients=gradients, needs=("squared_gradient",)
    )


def gradients_for(weight: Tensor, seed: int = 5) -> Tensor:
    return torch.randn(3, *weight.shape, generator=generator(seed)) * torch.rand(
        weight.shape[1], generator=generator(seed + 1)
    )


def quantize(
    weight: Tensor,
    gradients: Tensor,
    bits: int,
    dtype: str = "float32",
    seed: int = 0,
    **settings: int,
) -> LookupWeight:
    scheme = WeightScheme("int", bits, -1, scale_dtype=dtype)
    method = Rounding(Rounding.Settings(**settings))
    quantized = method.round_layer(
        "q_proj", weight, evidence_of(gradients), scheme, generator(seed)
    )
    assert isinstance(quantized, LookupWeight)
    return quantized


def test_the_weighted_error_never_grows_with_the_bits() -> None:
    weight = random_weight(24, 300)
    gradients = gradients_for(weight)
    importance = gradients.square().sum(0).double()
    errors = []
    for bits in range(3, 9):
        back = quantize(weight, gradients, bits).dequantize()
        errors.append((importance * (back - weight).double().square()).sum(1))
    for coarse, fine in itertools.pairwise(errors):
        assert bool((fine <= coarse * (1 + 1e-6) + 1e-12).all())
    assert float(errors[-1].sum()) < 0.01 * float(errors[0].sum())


def test_codes_are_prefixes_of_finer_codes() -> None:
    weight = random_weight(16, 300)
    gradients = gradients_for(weight)
    parent = quantize(weight, gradients, 8).codes
    for bits in range(3, 8):
        assert torch.equal(quantize(weight, gradients, bits).codes, parent >> (8 - bits))


def test_all_widths_are_made_together_and_equal_those_made_alone() -> None:
    weight = random_weight(8, 300)
    gradients = gradients_for(weight)
    evidence, method = evidence_of(gradients), Rounding(Rounding.Settings())
    for bits in (4, 8, 3):
        together = method.round_layer("q", weight, evidence, WeightScheme("int", bits), generator())
        alone = quantize(weight, gradients, bits, "float16")
        assert torch.equal(together.dequantize(), alone.dequantize())
    assert list(evidence.computed.values()) == [1]


def test_rows_of_few_values_are_exact() -> None:
    levels = torch.randn(16, 8, generator=generator())
    weight = levels.gather(1, torch.randint(0, 8, (16, 300), generator=generator(1)))
    torch.testing.assert_close(
        quantize(weight, torch.ones(1, 16, 300), 6).dequantize(), weight, rtol=1e-6, atol=1e-6
    )


def test_entries_are_means_of_their_members_when_all_weights_count_alike() -> None:
    weight = random_weight(8, 300)
    quantized = quantize(weight, torch.ones(1, 8, 300), 5)
    for code in range(32):
        member = quantized.codes == code
        mean = (weight.double() * member).sum(1) / member.sum(1)
        filled = member.any(1)
        torch.testing.assert_close(
            quantized.table[filled, code].double(), mean[filled], rtol=1e-5, atol=1e-6
        )


def test_scaling_the_sensitivity_changes_nothing() -> None:
    weight = random_weight(8, 200)
    gradients = gradients_for(weight)
    assert torch.equal(
        quantize(weight, gradients, 4).dequantize(),
        quantize(weight, gradients * 16, 4).dequantize(),
    )


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_tables_ascend(bits: int) -> None:
    weight = random_weight(16, 300)
    assert bool((quantize(weight, gradients_for(weight), bits).table.diff(dim=1) >= 0).all())


def test_rows_without_gradient_are_clustered_alike() -> None:
    weight = random_weight(8, 200)
    gradients = gradients_for(weight)
    gradients[:, 3] = 0
    row, without, alike = weight[3:4], gradients[:, 3:4], torch.ones(1, 1, 200)
    assert torch.equal(quantize(row, without, 4).dequantize(), quantize(row, alike, 4).dequantize())
    assert bool(torch.isfinite(quantize(weight, gradients, 4).dequantize()).all())


def test_sensitive_weights_are_served_better() -> None:
    weight, gradients = random_weight(16, 300), torch.full((1, 16, 300), 0.01)
    gradients[:, :, :30] = 1
    error = (quantize(weight, gradients, 3).dequantize() - weight).square().mean(0)
    assert float(error[:30].mean()) < 0.5 * float(error[30:].mean())


def test_bits_of_the_served_width() -> None:
    weight = random_weight(8, 1024)
    gradients = gradients_for(weight)
    for bits in (3, 4, 8):
        assert (
            quantize(weight, gradients, bits, "float16").bits_per_weight
            == bits + 16 * 2**bits / 1024
        )


def test_packing_is_exact() -> None:
    weight = random_weight(8, 300)
    quantized = quantize(weight, gradients_for(weight), 5, "float16")
    assert torch.equal(LookupWeight.unpack(*quantized.pack()).dequantize(), quantized.dequantize())


def test_broken_gradients_fail_the_cell() -> None:
    gradients = torch.ones(1, 4, 64)
    gradients[0, 0, 0] = torch.inf
    with pytest.raises(MethodError, match="squared gradients hold NaN"):
        quantize(random_weight(4, 64), gradients, 3)


def test_check() -> None:
    method, shapes = Rounding(Rounding.Settings()), llama_shapes()
    assert method.check(Scheme("w4", WeightScheme("int", 4)), shapes) == []
    assert len(method.check(Scheme("w2g32", WeightScheme("int", 2, 32)), shapes)) == 2
    (reason,) = method.check(Scheme("w6", WeightScheme("int", 6)), shapes)
    assert "self_attn.q_proj" in reason and "down_proj" not in reason


# --- all widths in one checkpoint -----------------------------------------------------------------------------------------------


def of_width(folder: Path, bits: int, parent_bits: int = 0, *overrides: Override) -> Cell:
    method = Method("any_precision", rounding=part("any_precision", parent_bits=parent_bits))
    own = cell(folder, method)
    scheme = Scheme(f"w{bits}", WeightScheme(bits=bits, group_size=-1), overrides=overrides)
    return dataclasses.replace(own, scheme=scheme)


@pytest.mark.parametrize("parent_bits", [4, 8])
def test_a_parent_holds_every_width_to_the_bit(parent_bits: int) -> None:
    weight = random_weight(8, 300)
    gradients = gradients_for(weight)
    method = Rounding(Rounding.Settings(parent_bits=parent_bits))
    scheme = WeightScheme("int", 3)
    parent = method.round_layer("q", weight, evidence_of(gradients), scheme, generator())
    assert isinstance(parent, NestedWeight) and parent.widths == tuple(range(3, parent_bits + 1))
    again = NestedWeight.unpack(*parent.pack())
    for bits in parent.widths:
        alone = quantize(weight, gradients, bits, "float16")
        for one, other in zip(alone.pack(), again.at(bits).pack(), strict=True):
            assert str(one) == str(other) and list(one) == list(other)
        assert torch.equal(again.at(bits).dequantize(), alone.dequantize())
    tables = sum(16 * 2**bits for bits in parent.widths)
    assert parent.bits_per_weight == pytest.approx(parent_bits + tables / 300, rel=1e-3)


def test_rows_shorter_than_a_table_have_the_widths_that_they_can_have() -> None:
    weight = random_weight(8, 100)
    method = Rounding(Rounding.Settings(parent_bits=8))
    evidence = evidence_of(gradients_for(weight))
    assert method.round_layer("q", weight, evidence, WeightScheme(), generator()).widths == (
        3,
        4,
        5,
        6,
    )
    assert method.check(Scheme("w5", WeightScheme("int", 5)), llama_shapes()) == []
    (reason,) = method.check(Scheme("w6", WeightScheme("int", 6)), llama_shapes())
    assert "a table of 64 values" in reason
    narrow = Rounding(Rounding.Settings(parent_bits=4))
    assert narrow.check(Scheme("w5", WeightScheme("int", 5)), llama_shapes())
    for wrong in ({"parent_bits": 2}, {"parent_bits": 9}):
        with pytest.raises(ValueError, match="parent_bits"):
            Rounding.Settings(**wrong)


def test_widths_share_a_checkpoint_and_not_a_cell() -> None:
    folder = Path("model")
    nested = [of_width(folder, bits, 8) for bits in (3, 4, 5)]
    assert len({quantize_key(each) for each in nested}) == 1
    assert len({cell_key(each) for each in nested}) == 3
    wider = Override(("down_proj",), weight=freeze({"bits": 5}))
    mixed = of_width(folder, 3, 8, wider)
    assert quantize_key(mixed) == quantize_key(nested[0])
    assert cell_key(mixed) not in {cell_key(each) for each in nested}
    own = [of_width(folder, bits) for bits in (3, 4)]
    assert len({quantize_key(each) for each in own}) == 2
    assert quantize_key(own[0]) != quantize_key(nested[0])
    # cells from before the setting keep their keys
    rounding = own[0].method.rounding
    assert rounding is not None
    older = {
        name: value
        for name, value in to_json(rounding)["settings"].items()
        if name != "parent_bits"
    }
    before = dataclasses.replace(rounding, settings=freeze(older))
    method = dataclasses.replace(own[0].method, rounding=before)
    assert quantize_key(dataclasses.replace(own[0], method=method)) == quantize_key(own[0])


def test_one_pass_makes_one_checkpoint_from_which_each_cell_reads_its_width(
    tiny_model: Any, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    wider = Override(("down_proj",), weight=freeze({"bits": 5}))
    nested = [of_width(folder, 3, 8), of_width(folder, 4, 8), of_width(folder, 3, 8, wider)]
    own = [of_width(folder, 3), of_width(folder, 4), of_width(folder, 3, 0, wider)]
    store = tmp_path / "store"
    assert not failures(run([*nested, *own], folder, store))
    assert len(list(store.iterdir())) == 4
    for one, alone in zip(nested, own, strict=True):
        records, logits = [], []
        for each in (one, alone):
            checkpoint = store / quantize_key(each)
            model, _ = load(each, folder, checkpoint)
            with torch.no_grad():
                logits.append(model(windows(2)).logits)
            manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
            records.append(Record(each, quantize_key(each), cell_key(each), manifest))
        assert torch.equal(*logits)
        assert records[0].layer_errors == records[1].layer_errors
        sizes = [
            {
                name: value
                for name, value in record.metrics().items()
                if name.startswith("checkpoint")
            }
            for record in records
        ]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-9)
        assert records[0].manifest is not None
        assert records[0].manifest["bits_per_weight"] > 1.5 * sizes[0]["checkpoint/bits_per_weight"]
