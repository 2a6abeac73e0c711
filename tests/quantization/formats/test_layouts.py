"""AWQ's GEMM layout and GPTQ's second version: words by hand, our weights to the bit, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from harness.core.cell import WeightScheme
from harness.quantization.export import layouts
from harness.quantization.formats import awq, compressed_tensors, gptq, gptq_v2
from harness.quantization.numerics.weights import DenseWeight, UniformWeight


def uniform(
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    rows: int = 64,
    columns: int = 128,
    lowest_zero: int = 0,
) -> UniformWeight:
    generator = torch.Generator().manual_seed(bits + group)
    size = columns if group == -1 else group
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, columns // size, generator=generator) - 0.5).half().float()
    zero = torch.randint(lowest_zero, 2**bits, scale.shape, generator=generator).float()
    return UniformWeight(codes, scale, None if symmetric else zero, bits)


def awq_word(values: list[int]) -> int:
    """Eight values of 4 bits as AWQ's kernels read them back: outputs 0 2 4 6 in the low half of the pairs, 1 3 5 7 above."""
    word = 0
    for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        word |= values[output] << (4 * nibble)
    return word


def test_an_awq_word_by_hand() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 32) + 3  # outputs 3 … 10
    parts = awq.Layout().pack_linear(
        UniformWeight(codes, torch.ones(8, 1), torch.arange(8.0)[:, None], 4), None, torch.float16
    )
    assert parts["qweight"].shape == (32, 1) and parts["qzeros"].shape == (1, 1)
    assert int(parts["qweight"][0, 0]) & 0xFFFFFFFF == awq_word(list(range(3, 11)))
    assert int(parts["qzeros"][0, 0]) & 0xFFFFFFFF == awq_word(list(range(8)))
    assert parts["qweight"].dtype == torch.int32 and parts["scales"].dtype == torch.float16


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_means_our_weights(group: int, symmetric: bool) -> None:
    held = uniform(group=group, symmetric=symmetric)
    layout = awq.Layout()
    assert layout.weight_reasons(held, torch.float16) == []
    parts = layout.pack_linear(held, None, torch.float16)
    rows, columns = held.shape
    groups = held.scale.shape[1]
    assert parts["qweight"].shape == (columns, rows // 8)
    assert parts["qzeros"].shape == (groups, rows // 8) and parts["scales"].shape == (groups, rows)
    assert torch.equal(awq.unpack_linear(parts), held.dequantize())


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (uniform(rows=60), "60 × 128"),
        (uniform(columns=48, group=-1), "64 × 48"),
        (replace(uniform(), column_group=torch.arange(128)), "act_order"),
        (replace(uniform(), zero=uniform().scale + 0.5), "zero points"),
        (replace(uniform(), scale=torch.full((64, 4), 1 / 3)), "not exact in float16"),
        (DenseWeight(torch.ones(64, 128)), "no grid of integers"),
    ],
)
def test_awq_refuses_what_it_cannot_hold(held: Any, reason: str) -> None:
    assert reason in "; ".join(awq.Layout().weight_reasons(held, torch.float16))


def test_awq_refuses_other_schemes() -> None:
    reasons = awq.Layout().scheme_reasons
    assert reasons(WeightScheme(bits=4), None) == []
    assert "4 bits, not 3" in reasons(WeightScheme(bits=3), None)[0]
    assert "nf4" in reasons(WeightScheme("nf4", 4), None)[0]
    assert "zero_point=integer" in reasons(WeightScheme(bits=4, zero_point="float"), None)[0]


@pytest.mark.parametrize("layout", [awq, gptq, compressed_tensors])
def test_no_layout_takes_scales_below_zero(layout: Any) -> None:
    signed = WeightScheme(bits=4, group_size=128, symmetric=True, signed_scales=True)
    (reason,) = layout.Layout().scheme_reasons(signed, None)
    assert "scales below 0" in reason
    assert layout.Layout().scheme_reasons(replace(signed, signed_scales=False), None) == []


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq_v2_holds_zero_points_of_zero(bits: int, group: int) -> None:
    held = uniform(bits, group)
    assert held.zero is not None and bool((held.zero == 0).any() | torch.tensor(bits == 8))
    assert gptq_v2.Layout().weight_reasons(held, torch.float16) == []
    parts = gptq_v2.Layout().pack_linear(held, None, torch.float16)
    assert torch.equal(gptq.unpack_linear(parts, bits, added=0), held.dequantize())


def test_the_versions_differ_in_zero_points_alone() -> None:
    held = uniform(lowest_zero=1)
    first, second = (
        layout.pack_linear(held, None, torch.float16)
        for layout in (gptq.Layout(), gptq_v2.Layout())
    )
    for name in ("qweight", "scales", "g_idx"):
        assert torch.equal(first[name], second[name])
    assert not torch.equal(first["qzeros"], second["qzeros"])
    described = {"q": gptq.Layout().describe(held, None)}
    versions = [
        layout.quantization_config(described, (), torch.float16)["checkpoint_format"]
        for layout in (gptq.Layout(), gptq_v2.Layout())
    ]
    assert versions == ["gptq", "gptq_v2"]
    assert "-f gptq_v2" in gptq.Layout().weight_reasons(uniform(2), torch.float16)[0]


@pytest.mark.parametrize("name", ["awq", "gptq_v2"])
def test_a_whole_folder(name: str, tiny_model: Any, tmp_path: Path) -> None:
    from harness.config.grid import load_sweep
    from harness.core.cell import cell_key, quantize_key
    from harness.execution import driver
    from harness.quantization.export import export
    from harness.quantization.formats.native import Checkpoint
    from harness.storage.store import Store

    folder = tiny_model("llama", hidden_size=64, intermediate_size=128)
    words = [f"model={folder}", "method=rtn", "scheme=w4g32", "baseline=false", "tracking=none"]
    sweep = load_sweep(
        None,
        [*words, f"runs={tmp_path / 'runs'}", "device=cpu", "cluster=local", "cluster.workers=1"],
    )
    driver.run(sweep)
    (cell,) = sweep.cells
    store = Store(tmp_path / "runs")
    done = export(store, cell_key(cell), name, tmp_path / "out")
    described = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    stored = Checkpoint.open(store.checkpoint_folder(quantize_key(cell)))

    def read(parts: dict[str, Tensor]) -> Tensor:
        if name == "awq":
            return awq.unpack_linear(parts)
        return gptq.unpack_linear(parts, 4, added=0)

    with safe_open(done.folder / "model.safetensors", framework="pt") as file:
        names = ("qweight", "qzeros", "scales") + (("g_idx",) if name == "gptq_v2" else ())
        for index in range(2):
            for linear, weight in stored.block(index).weights.items():
                prefix = f"model.layers.{index}.{linear}"
                parts = {each: file.get_tensor(f"{prefix}.{each}") for each in names}
                assert torch.equal(read(parts), weight.dequantize())
    if name == "awq":
        assert described["quant_method"] == "awq" and described["version"] == "gemm"
        assert described["group_size"] == 32 and "lm_head" in described["modules_to_not_convert"]
    else:
        assert described["checkpoint_format"] == "gptq_v2"


def test_they_are_layouts() -> None:
    assert {"awq", "gptq", "gptq_v2", "compressed_tensors", "peft"} <= set(layouts())
