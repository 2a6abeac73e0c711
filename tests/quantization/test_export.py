"""Exports: transformers loads them and computes our logits; what a layout cannot express is refused before anything is written."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.core import plugins
from harness.core.cell import (
    ActivationScheme,
    Calibration,
    Cell,
    KVScheme,
    Method,
    Model,
    Override,
    Part,
    Scheme,
    WeightScheme,
    freeze,
    quantize_key,
)
from harness.core.errors import ConfigError, PlanError, StoreError
from harness.core.events import Failed
from harness.core.number_formats import FORMATS
from harness.quantization.export import export, layouts, refusals
from harness.quantization.formats.gptq import unpack_linear
from harness.quantization.formats.native import Checkpoint, CheckpointWriter
from harness.quantization.inference.load import load
from harness.quantization.models import family_of, read_config
from harness.quantization.pipeline.passes import run_pass
from harness.storage.store import Store

CALIBRATION = Calibration("tiny", "demo", samples=6, length=40, digest="tiny")
FACTS: dict[str, Any] = {"version": 1, "needs": (), "stochastic": False, "activation_aware": False}


def part(name: str, kind: str = "rounding", **settings: Any) -> Part:
    facts = plugins.facts(kind, name)
    return Part(
        name,
        freeze(settings),
        **{fact: facts.get(fact, default) for fact, default in FACTS.items()},
    )


def windows(samples: int, length: int) -> Tensor:
    return torch.randint(0, 256, (samples, length), generator=torch.Generator().manual_seed(0))


RTN = Method("rtn", rounding=part("rtn"))
AWQ = Method("awq", transform=part("awq", "transform"), rounding=part("awq"))


def gptq(**settings: Any) -> Method:
    return Method("gptq", rounding=part("gptq", **settings))


def scheme(
    format_: str = "int",
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    scale: str = "float16",
) -> Scheme:
    if format_ != "int":
        fixed = FORMATS[format_]
        weight = WeightScheme(
            format_, fixed.bits, fixed.block or group_size, False, fixed.scale_dtype or scale
        )
        return Scheme(format_, weight)
    return Scheme(f"w{bits}g{group_size}", WeightScheme("int", bits, group_size, symmetric, scale))


class Made:
    """Cells of one tiny model, quantized into a store."""

    def __init__(self, folder: Path, root: Path, dtype: str = "float32") -> None:
        self.folder, self.store = folder, Store(root)
        self.model = Model("tiny", str(folder), digest=folder.name, dtype=dtype)

    def cell(self, method: Method, scheme: Scheme, **fields: Any) -> Cell:
        cell = dataclasses.replace(Cell(self.model, method, scheme, CALIBRATION), **fields)
        folder = self.store.checkpoint_folder(quantize_key(cell))
        if not (folder / "manifest.json").exists() and not method.is_baseline:
            writers = {quantize_key(cell): CheckpointWriter(folder, {"key": quantize_key(cell)})}
            failed = [
                event
                for event in run_pass([cell], self.folder, windows(6, 40), writers)
                if isinstance(event, Failed)
            ]
            assert not failed, failed
        self.store.open_cell(cell)
        return cell

    def key(self, cell: Cell) -> str:
        return self.store.open_cell(cell)

    def ours(self, cell: Cell) -> Any:
        return load(cell, self.folder, self.store.checkpoint_folder(quantize_key(cell)))[0]


@pytest.fixture
def made(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Made]:
    def make(family: str = "llama", dtype: str = "float32", **settings: Any) -> Made:
        return Made(tiny_model(family, num_hidden_layers=2, **settings), tmp_path / "runs", dtype)

    return make


@torch.no_grad()
def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    return model(windows(2, 24) if tokens is None else tokens).logits.float()


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def relative(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).norm() / ours.norm())


# --- compressed-tensors --------------------------------------------------------------------------------------------------------


CASES: list[tuple[Method, Scheme, float]] = [
    (RTN, scheme(bits=4, symmetric=True), 1e-5),
    (RTN, scheme(bits=4), 1e-5),
    (gptq(), scheme(bits=4, group_size=-1), 1e-5),
    (gptq(act_order=True, static_groups=True), scheme(bits=3), 1e-5),
    (RTN, scheme(bits=8, group_size=-1, symmetric=True), 1e-5),
    (AWQ, scheme(bits=4), 1e-5),
    (RTN, scheme(bits=2, scale="float8_e4m3"), 1e-5),
    (RTN, scheme("fp8_e4m3", group_size=-1, scale="float32"), 1e-5),
    (RTN, scheme("mxfp4"), 1e-5),
    (gptq(), scheme("mxfp6_e2m3"), 1e-5),
    (RTN, scheme("mxfp8_e4m3"), 1e-5),
    (gptq(), scheme("nvfp4"), 1e-2),
]


@pytest.mark.parametrize(
    ("method", "scheme_", "tolerance"),
    CASES,
    ids=lambda each: getattr(each, "name", None) or str(each),
)
def test_transformers_computes_our_logits(
    made: Any, tmp_path: Path, method: Method, scheme_: Scheme, tolerance: float
) -> None:
    tiny = made()
    cell = tiny.cell(method, scheme_)
    done = export(tiny.store, tiny.key(cell)[:12], "compressed_tensors", tmp_path / "out")
    model = loaded(done.folder)
    assert relative(logits(model), logits(tiny.ours(cell))) <= tolerance
    assert AutoTokenizer.from_pretrained(done.folder)("hello")["input_ids"]


@pytest.mark.parametrize(
    ("weights", "activation"),
    [
        (
            scheme(bits=8, group_size=-1, symmetric=True),
            ActivationScheme("int", 8, grid="compressed"),
        ),
        (scheme("fp8_e4m3", group_size=-1, scale="float32"), ActivationScheme("fp8_e4m3", 8)),
    ],
    ids=["int8", "fp8"],
)
def test_rounded_activations_travel_with_the_weights(
    made: Any, tmp_path: Path, weights: Scheme, activation: ActivationScheme
) -> None:
    tiny = made()
    cell = tiny.cell(RTN, dataclasses.replace(weights, activation=activation))
    model = loaded(
        export(tiny.store, tiny.key(cell), "compressed_tensors", tmp_path / "out").folder
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == (
        "int-quantized" if activation.format == "int" else "float-quantized"
    )
    plain = tiny.cell(RTN, weights)
    theirs, ours = logits(model), logits(tiny.ours(cell))
    # the rounding itself is seen, and is ours
    assert relative(theirs, ours) < 0.2 * relative(logits(tiny.ours(plain)), ours)


@pytest.mark.parametrize("family", ["opt", "qwen2", "phi3", "gpt_neox", "gemma"])
def test_biases_norms_and_fused_parts_of_other_families(
    made: Any, tmp_path: Path, family: str
) -> None:
    tiny = made(family)
    cell = tiny.cell(RTN, scheme(bits=4, symmetric=True))
    model = loaded(
        export(tiny.store, tiny.key(cell), "compressed_tensors", tmp_path / "out").folder
    )
    assert relative(logits(model), logits(tiny.ours(cell))) <= 1e-5


def test_several_schemes_layers_left_alone_and_shards(made: Any, tmp_path: Path) -> None:
    tiny = made()
    mixed = Scheme(
        "mixed",
        WeightScheme("int", 4, 32, True),
        overrides=(Override(("down_proj",), (1,), freeze({"bits": 8})),),
    )
    cell = tiny.cell(RTN, mixed)
    done = export(
        tiny.store, tiny.key(cell), "compressed_tensors", tmp_path / "out", shard_bytes=40_000
    )
    assert done.files > 2 and (tmp_path / "out" / "model.safetensors.index.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sorted(group["weights"]["num_bits"] for group in config["config_groups"].values()) == [
        4,
        8,
    ]
    assert relative(logits(loaded(done.folder)), logits(tiny.ours(cell))) <= 1e-5


def test_bfloat16_models_need_scales_that_bfloat16_holds(made: Any, tmp_path: Path) -> None:
    tiny = made(dtype="bfloat16")
    with pytest.raises(PlanError, match="float16 scales are not exact in the model's bfloat16"):
        export(
            tiny.store,
            tiny.key(tiny.cell(RTN, scheme(bits=4))),
            "compressed_tensors",
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
    cell = tiny.cell(RTN, scheme(bits=4, scale="bfloat16"))
    model = loaded(
        export(tiny.store, tiny.key(cell), "compressed_tensors", tmp_path / "out").folder
    )
    assert model.dtype == torch.bfloat16
    assert relative(logits(model), logits(tiny.ours(cell))) <= 1e-5


def test_bits_per_weight_are_the_bytes_of_the_folder(made: Any, tmp_path: Path) -> None:
    tiny = made(
        dtype="float32",
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    cell = tiny.cell(RTN, scheme(bits=4, group_size=64, symmetric=True, scale="float32"))
    done = export(tiny.store, tiny.key(cell), "compressed_tensors", tmp_path / "out")
    manifest = Checkpoint.open(tiny.store.checkpoint_folder(quantize_key(cell))).manifest
    assert done.bytes == pytest.approx(manifest["stored_bytes"], rel=0.02)
    native = sum(
        path.stat().st_size
        for path in tiny.store.checkpoint_folder(quantize_key(cell)).glob("*.safetensors")
    )
    assert native == pytest.approx(sum(entry["bytes"] for entry in manifest["linears"]), rel=0.02)


# --- GPTQ ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "method", "group_size", "symmetric"),
    [
        (4, gptq(), 32, False),
        (3, gptq(), 32, False),
        (4, gptq(act_order=True), 32, True),
        (2, RTN, -1, True),
        (8, RTN, -1, True),
    ],
)
def test_gptq_tensors_mean_our_weights(
    made: Any, tmp_path: Path, bits: int, method: Method, group_size: int, symmetric: bool
) -> None:
    tiny = made()
    cell = tiny.cell(method, scheme(bits=bits, group_size=group_size, symmetric=symmetric))
    done = export(tiny.store, tiny.key(cell), "gptq", tmp_path / "out")
    described = json.loads((done.folder / "quantize_config.json").read_text())
    assert described == json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert (described["bits"], described["group_size"], described["sym"]) == (
        bits,
        group_size,
        symmetric,
    )
    assert described["desc_act"] == (
        method.rounding is not None and method.rounding.settings == (("act_order", True),)
    )
    stored = Checkpoint.open(tiny.store.checkpoint_folder(quantize_key(cell)))
    with safe_open(done.folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for index in range(2):
            for linear, weight in stored.block(index).weights.items():
                prefix = f"model.layers.{index}.{linear}"
                parts = {
                    name: file.get_tensor(f"{prefix}.{name}")
                    for name in ("qweight", "qzeros", "scales", "g_idx")
                }
                rows, columns = weight.shape
                assert (
                    parts["qweight"].shape == (columns * bits // 32, rows)
                    and parts["qweight"].dtype == torch.int32
                )
                assert parts["qzeros"].shape == (parts["scales"].shape[0], rows * bits // 32)
                assert torch.equal(unpack_linear(parts, bits), weight.dequantize())
                assert f"{prefix}.weight" not in names
        embeddings = file.get_tensor("model.embed_tokens.weight")
    assert torch.equal(embeddings, tiny.ours(cell).get_input_embeddings().weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "symmetric", "ordered"),
    [(32, True, False), (32, False, True), (-1, False, False)],
)
def test_gptqmodel_reads_the_same_weights(
    bits: int, group_size: int, symmetric: bool, ordered: bool
) -> None:
    """Somebody else's reader of the layout, on a CPU, where it is installed."""
    torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    from harness.quantization.formats.gptq import Layout
    from harness.quantization.numerics.grids import Fitting
    from harness.quantization.numerics.weights import on_grid

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits)) * 0.02
    scheme_ = WeightScheme("int", bits, group_size, symmetric)
    groups = weight.reshape(64, -1, 128 if group_size == -1 else group_size)
    grid = Fitting.of(weight, scheme_).fit(groups)
    found = on_grid(grid.quantize(groups), grid, scheme_)
    if ordered:
        order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
        found = dataclasses.replace(found, column_group=order.to(torch.int32) // group_size)
    assert Layout().weight_reasons(found, torch.float16) == []
    module = torch_linear.TorchLinear(
        bits=bits,
        group_size=group_size,
        sym=symmetric,
        desc_act=ordered,
        in_features=128,
        out_features=64,
        bias=False,
        pack_dtype=torch.int32,
        format=FORMAT.GPTQ,
        register_buffers=True,
    )
    module.load_state_dict(Layout().pack_linear(found, None, torch.float16), strict=False)
    convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    assert torch.equal(module.dequantize_weight().T, found.dequantize().half())


def test_a_gptq_word_by_hand() -> None:
    """Codes 1 … 8 of one channel, four bits each: 0x87654321; zero points are stored less one."""
    from harness.quantization.formats.gptq import Layout
    from harness.quantization.numerics.weights import UniformWeight

    codes = (torch.arange(32) % 8 + 1).to(torch.uint8).repeat(32, 1)
    weight = UniformWeight(codes, torch.ones(32, 1), torch.full((32, 1), 5.0), 4)
    parts = Layout().pack_linear(weight, None, torch.float32)
    assert int(parts["qweight"][0, 0]) & 0xFFFFFFFF == 0x87654321
    assert parts["qzeros"][0, 0].item() == 0x44444444
    assert parts["g_idx"].tolist() == [0] * 32 and parts["scales"].dtype == torch.float16


# --- refusals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "scheme_", "part_of"),
    [
        ("gptq", RTN, scheme("mxfp4"), 'holds integers, not "mxfp4"'),
        (
            "compressed_tensors",
            RTN,
            scheme("nf4", scale="double_quantized"),
            'no number format "nf4"',
        ),
        (
            "compressed_tensors",
            RTN,
            Scheme("w4", WeightScheme("int", 4, 32, zero_point="float")),
            "zero_point=integer",
        ),
        (
            "gptq",
            RTN,
            Scheme("w4", WeightScheme("int", 4, 32, zero_point="float")),
            "zero_point=integer",
        ),
        ("gptq", RTN, scheme(bits=5), "codes of 2, 3, 4, 8 bits, not 5"),
        ("compressed_tensors", RTN, scheme("nf4"), 'no number format "nf4"'),
        ("compressed_tensors", RTN, scheme("mxint8"), 'no number format "mxint8"'),
        ("compressed_tensors", gptq(act_order=True), scheme(bits=4), "use static_groups=true"),
        (
            "compressed_tensors",
            RTN,
            dataclasses.replace(scheme(bits=8, symmetric=True), activation=ActivationScheme()),
            "per token",
        ),
        ("gptq", RTN, dataclasses.replace(scheme(bits=4), kv=KVScheme()), "KV cache"),
        ("gptq", Method("none"), Scheme("full"), "nothing is quantized"),
    ],
)
def test_a_plan_knows_what_cannot_be_exported(
    made: Any, name: str, method: Method, scheme_: Scheme, part_of: str
) -> None:
    tiny = made()
    data = read_config(tiny.folder)
    cell = Cell(tiny.model, method, scheme_, CALIBRATION)
    reasons = refusals(cell, family_of(data).shapes(data), name)
    assert len(reasons) == 1 and part_of in reasons[0]


@pytest.mark.parametrize(
    ("name", "method", "scheme_", "part_of"),
    [
        (
            "compressed_tensors",
            Method("hqq", rounding=part("hqq")),
            scheme(bits=4),
            "zero points that are not among the codes",
        ),
        (
            "gptq",
            Method("squeezellm", rounding=part("any_precision")),
            scheme(bits=4, group_size=-1),
            'layout "lookup"',
        ),
        ("gptq", RTN, scheme(bits=4, scale="float32"), "float32 scales are not exact in float16"),
        ("gptq", gptq(), scheme(bits=2), "zero points of 0"),
    ],
)
def test_what_only_the_checkpoint_tells_is_refused_before_writing(
    made: Any, tmp_path: Path, name: str, method: Method, scheme_: Scheme, part_of: str
) -> None:
    tiny = made()
    cell = tiny.cell(method, scheme_)
    with pytest.raises(PlanError, match="nothing was written") as error:
        export(tiny.store, tiny.key(cell), name, tmp_path / "out")
    assert part_of in str(error.value) and "block 0 " in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_will_be_exported_refuses_in_its_plan(tmp_path: Path) -> None:
    from harness.config.grid import load_sweep
    from harness.planning.planner import make

    words = [
        "model=demo",
        "method=rtn,gptq",
        "scheme=w4g32,nf4g32",
        "calibration=demo",
        f"runs={tmp_path}",
        "tracking=none",
    ]
    assert not make(load_sweep(None, words), Store(tmp_path)).refused
    refused = make(load_sweep(None, [*words, "export=gptq"]), Store(tmp_path)).refused
    assert [refusal.cell.scheme.name for refusal in refused] == ["nf4g32", "nf4g32"]
    assert 'export gptq: GPTQ\'s layout holds integers, not "nf4"' in refused[0].reasons
    (refusal, *_) = make(load_sweep(None, [*words, "export=gptqq"]), Store(tmp_path)).refused
    assert 'did you mean "gptq"' in refusal.reasons[0]


def test_the_command_writes_the_folder_and_says_so(made: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from harness.cli.commands import app

    tiny = made()
    key = tiny.key(tiny.cell(RTN, scheme(bits=4, symmetric=True)))
    words = [
        "export",
        key[:12],
        "--format",
        "gptq",
        "--output",
        str(tmp_path / "out"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    before = os.umask(0o027)
    try:
        result = CliRunner().invoke(app, words)
    finally:
        os.umask(before)
    assert result.exit_code == 0 and "as gptq, 1 weight file" in result.output
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes  # a group reads it, as the umask says
    assert {"config.json", "quantize_config.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_names_and_folders_are_checked_first(made: Any, tmp_path: Path) -> None:
    tiny = made()
    assert layouts() == [
        "awq",
        "bitsandbytes",
        "compressed_tensors",
        "gptq",
        "gptq_v2",
        "peft",
        "transformers",
    ]
    unfinished = Cell(tiny.model, RTN, scheme(bits=4, symmetric=True), CALIBRATION)
    key = tiny.key(unfinished)
    with pytest.raises(ConfigError, match='did you mean "gptq"'):
        export(tiny.store, key, "gptqq", tmp_path / "out")
    with pytest.raises(StoreError, match="is not quantized yet"):
        export(tiny.store, key, "gptq", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(tiny.store, key, "gptq", tmp_path / "full")
