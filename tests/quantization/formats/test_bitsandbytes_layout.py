"""bitsandbytes' 4-bit layout: our weights to the bit, the library's own tensors where it is installed, and what it refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from harness.core.cell import WeightScheme
from harness.quantization.formats import bitsandbytes
from harness.quantization.numerics.block_maxima import BlockMaxima
from harness.quantization.numerics.weights import DenseWeight, ElementWeight, NormalFloatWeight


def blocks(
    format_: str = "nf4", double: bool = False, rows: int = 24, columns: int = 80, block: int = 64
) -> NormalFloatWeight:
    """Random codes and maxima; 24 × 80 with blocks of 64 has blocks that run over the end of a row."""
    generator = torch.Generator().manual_seed(rows + block)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    maxima = torch.rand(-(-rows * columns // block), generator=generator) + 0.1
    held = BlockMaxima.double_quantized(maxima) if double else BlockMaxima(maxima)
    return NormalFloatWeight(codes, held, block, format_)


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_it_means_our_weights(format_: str, double: bool) -> None:
    held = blocks(format_, double)
    layout = bitsandbytes.Layout()
    assert layout.weight_reasons(held, torch.float32) == []
    parts = layout.pack_linear(held, None, torch.float32)
    assert parts["weight"].shape == (24 * 80 // 2, 1)
    assert int(parts["weight"][0, 0]) == int(held.codes[0, 0]) * 16 + int(held.codes[0, 1])
    assert torch.equal(bitsandbytes.unpack_linear(parts).dequantize(), held.dequantize())


def test_groups_within_rows_are_blocks() -> None:
    codes = torch.randint(0, 16, (8, 128), dtype=torch.uint8)
    held = ElementWeight(codes, torch.rand(8, 4) + 0.1, "nf4", "float32")
    parts = bitsandbytes.Layout().pack_linear(held, None, torch.bfloat16)
    assert torch.equal(bitsandbytes.unpack_linear(parts).dequantize(), held.dequantize())
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert (state["blocksize"], state["dtype"], state["shape"]) == (32, "bfloat16", [8, 128])


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_the_library_reads_it(format_: str, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its QuantState from our tensors dequantizes to our weights; and its own tensors of the same matrix are ours."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    functional = pytest.importorskip("bitsandbytes.functional")
    held = blocks(format_, double)
    parts = bitsandbytes.Layout().pack_linear(held, None, torch.float32)
    rest = {name.removeprefix("weight."): part for name, part in parts.items() if name != "weight"}
    state = functional.QuantState.from_dict(dict(rest), device=torch.device("cpu"))
    read = functional.dequantize_4bit(parts["weight"], state)
    assert torch.equal(read, held.dequantize())
    names = functional.quantize_4bit(
        held.dequantize(), blocksize=64, quant_type=format_, compress_statistics=double
    )[1].as_dict(packed=True)
    assert {
        name: (part.shape, part.dtype) for name, part in rest.items() if "state" not in name
    } == {name: (part.shape, part.dtype) for name, part in names.items() if "state" not in name}


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (DenseWeight(torch.ones(64, 128)), "no blocks of NF4"),
        (blocks(columns=96, block=48), "powers of two"),
        (
            ElementWeight(torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2), "mxfp4", "e8m0"),
            "no blocks of NF4",
        ),
        (
            replace(
                ElementWeight(torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2), "nf4"),
                column_group=torch.arange(64) // 32,
            ),
            "act_order",
        ),
    ],
)
def test_it_refuses_what_it_cannot_hold(held: Any, reason: str) -> None:
    assert reason in "; ".join(bitsandbytes.Layout().weight_reasons(held, torch.float32))


def test_it_refuses_other_schemes_and_mixtures() -> None:
    layout = bitsandbytes.Layout()
    assert layout.scheme_reasons(WeightScheme("nf4", 4), None) == []
    assert "scheme=nf4g64" in layout.scheme_reasons(WeightScheme(bits=4), None)[0]
    mixed = {"a": layout.describe(blocks(), None), "b": layout.describe(blocks("fp4"), None)}
    assert "fp4, nf4" in layout.model_reasons(mixed)[0]


def test_a_table_of_its_own_is_refused_when_read() -> None:
    parts = bitsandbytes.Layout().pack_linear(blocks(), None, torch.float32)
    parts["weight.quant_map"] = parts["weight.quant_map"] * 1.5
    with pytest.raises(ValueError, match="quant_map"):
        bitsandbytes.unpack_linear(parts)


@pytest.mark.parametrize("method", ["nf4", "rtn"])
def test_a_whole_folder(method: str, tiny_model: Any, tmp_path: Path) -> None:
    """Every matrix of the folder is the checkpoint's; where bitsandbytes is installed transformers loads it."""
    from harness.config.grid import load_sweep
    from harness.core.cell import cell_key, quantize_key
    from harness.execution import driver
    from harness.quantization.export import export
    from harness.quantization.formats.native import Checkpoint
    from harness.storage.store import Store

    folder = tiny_model("llama", hidden_size=64, intermediate_size=128)
    words = [f"model={folder}", f"method={method}", "baseline=false", "tracking=none"]
    words += ["scheme=nf4g64_double" if method == "nf4" else "scheme=nf4g32"]
    if method == "rtn":
        words += ["scheme.weight.scale_dtype=float32"]
    runs = tmp_path / "runs"
    sweep = load_sweep(
        None, [*words, f"runs={runs}", "device=cpu", "cluster=local", "cluster.workers=1"]
    )
    driver.run(sweep)
    (cell,) = sweep.cells
    store = Store(runs)
    done = export(store, cell_key(cell), "bitsandbytes", tmp_path / "out")
    config = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["load_in_4bit"]
    assert config["bnb_4bit_use_double_quant"] == (method == "nf4")
    assert "lm_head" in config["llm_int8_skip_modules"]
    stored = Checkpoint.open(store.checkpoint_folder(quantize_key(cell)))
    with safe_open(done.folder / "model.safetensors", framework="pt") as file:
        for index in range(2):
            for linear, weight in stored.block(index).weights.items():
                prefix = f"model.layers.{index}.{linear}."
                parts = {
                    name.removeprefix(prefix): file.get_tensor(name)
                    for name in file.keys()
                    if name.startswith(prefix)
                }
                read = bitsandbytes.unpack_linear(parts)
                assert torch.equal(read.dequantize(), weight.dequantize())
