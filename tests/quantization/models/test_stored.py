"""Files against the architecture: no false alarms on any family, and one reading with transformers on folders of odd shapes."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import cell
from torch import Tensor

from harness.core.cell import Method
from harness.core.errors import HarnessError, ModelError
from harness.data.demo.tiny import TINY, build
from harness.data.model_folders import model_folder
from harness.quantization import models
from harness.quantization.formats.weight_files import ModelWeights
from harness.quantization.inference.load import load
from harness.quantization.models.stored import StoredNames
from harness.quantization.pipeline.blocks import Blocks

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, {"format": "pt"})


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    write(folder / SINGLE, tensors)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def skeleton(folder: Path) -> transformers.PreTrainedModel:
    data = models.read_config(folder)
    family = models.family_of(data)
    return family.skeleton(family.config(data), torch.float32)


def theirs(folder: Path) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """transformers' own reading of a folder, and what it says of it."""
    family = models.family_of(models.read_config(folder))
    model, told = family.auto_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    return model.eval(), told


def assert_read_alike(folder: Path) -> None:
    model, told = theirs(folder)
    assert not told["missing_keys"] and not told["mismatched_keys"]
    weights = ModelWeights(folder, skeleton(folder))
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.read(name, torch.float32), tensor), name


@pytest.mark.parametrize("family", TINY)
def test_no_family_gives_a_false_alarm(tiny_model: Callable[..., Path], family: str) -> None:
    folder = tiny_model(family, shards=2)
    found = models.examine(folder)
    assert found.faults == () and found.notes == () and found.shapes is not None
    assert_read_alike(folder)


@pytest.mark.parametrize("source", ["demo", "demo:weight_outliers", "demo:activation_outliers"])
def test_the_demo_model_gives_no_false_alarm(source: str) -> None:
    from harness.core.cell import Model

    found = models.examine(model_folder(Model("demo", source)))
    assert found.faults == () and found.notes == ()


@pytest.mark.parametrize("name", ["babyllama-105", "stories260K"])
def test_models_of_others_give_no_false_alarm(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    found = models.examine(folder)
    assert found.faults == ()
    assert_read_alike(folder)


def test_published_names_are_found_by_the_rules_of_transformers(
    tiny_model: Callable[..., Path],
) -> None:
    """Names that no save_pretrained of today writes: heads and towers before they were renamed, buffers that left the files."""

    def old_head(tensors: dict[str, Tensor]) -> None:
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.rand(8)

    neox = tiny_model("gpt_neox")
    if "lm_head.weight" in load_file(neox / SINGLE):
        change(neox, old_head)
    headless = tiny_model("llama")

    def without_prefix(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)

    change(headless, without_prefix)
    for folder in (neox, headless):
        found = models.examine(folder)
        assert found.faults == () and found.notes == (), found
        assert_read_alike(folder)


def test_tensors_without_a_place_are_named_and_ignored(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")

    def more(tensors: dict[str, Tensor]) -> None:
        for index in range(3):
            for part in "qkv":
                tensors[f"model.layers.{index}.self_attn.{part}_proj.bias"] = torch.ones(64)

    change(folder, more)
    configure(folder, num_hidden_layers=2)
    found = models.examine(folder)
    assert found.faults == ()
    (note,) = found.notes
    assert "model.layers.0-2.self_attn.q_proj.bias" in note
    assert "model.layers.2.mlp.down_proj.weight" in note
    assert_read_alike(folder)


def test_all_that_differs_is_listed_at_once(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.input_layernorm.weight"]
        tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(64, 64, dtype=torch.int8)

    change(folder, spoil)
    configure(folder, intermediate_size=128)
    text = " ".join(models.examine(folder).faults)
    for fact in (
        "model.layers.1.input_layernorm.weight",
        "model.layers.0-2.mlp.gate_proj.weight",
        "[96, 64]",
        "[128, 64]",
        "model.layers.0.self_attn.o_proj.weight",
        "I8",
        str(folder),
    ):
        assert fact in text
    with pytest.raises(ModelError, match="I8"):
        Blocks(folder, "float32", "cpu")
    with pytest.raises(ModelError, match="I8"):
        load(cell(folder, Method("none")), folder, None)


def test_experts_that_are_not_all_there_are_counted(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3_moe")
    change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight"))
    (fault,) = models.examine(folder).faults
    assert "model.layers.1.mlp.experts.gate_up_proj" in fault


def test_a_converter_other_than_a_stack_of_experts_is_applied(
    tiny_model: Callable[..., Path],
) -> None:
    """A fused tensor that is split in two parameters, by a rule as transformers has them."""
    from transformers.core_model_loading import Chunk, WeightConverter

    folder = tiny_model("llama")
    model = skeleton(folder)
    rule = WeightConverter(
        [r"mlp.gate_up_proj.weight"],
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        operations=[Chunk(dim=0)],
    )
    tensors = load_file(folder / SINGLE)
    fused = dict(tensors)
    for index in range(3):
        gate, up = (fused.pop(f"model.layers.{index}.mlp.{n}_proj.weight") for n in ("gate", "up"))
        fused[f"model.layers.{index}.mlp.gate_up_proj.weight"] = torch.cat([gate, up])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "harness.quantization.models.stored.get_model_conversion_mapping", lambda _: [rule]
        )
        names = StoredNames(model, fused)
        names.made_besides({n: torch.empty(t.shape, device="meta") for n, t in fused.items()})
    assert names.parts.keys() == tensors.keys() and not names.unexpected
    for name, tensor in tensors.items():
        assert torch.equal(names.read(name, fused.__getitem__), tensor)


# --- folders of odd shapes ----------------------------------------------------------------------------------------------------


@functools.cache
def base() -> Path:
    """A small model in a folder of this process, with files beside its weights."""
    folder = Path(tempfile.mkdtemp(prefix="odd-folders-"))
    build("llama", folder, num_hidden_layers=2, intermediate_size=64)
    return folder


@contextlib.contextmanager
def odd_folder(odd: dict[str, Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        shutil.copytree(base(), folder)
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        if odd["head"] == "same":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        elif odd["head"] == "absent":
            del tensors["lm_head.weight"]
        elif odd["head"] == "alone":
            del tensors["model.embed_tokens.weight"]
        edits: dict[str, Callable[[], Any]] = {
            "bias": lambda: tensors.update(
                {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
            ),
            "block": lambda: tensors.update(
                {
                    n.replace(".1.", ".2."): t.clone()
                    for n, t in list(tensors.items())
                    if ".layers.1." in n
                }
            ),
            "buffer": lambda: tensors.update(
                {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
            ),
            "missing": lambda: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "shape": lambda: tensors.update({"model.norm.weight": torch.ones(63)}),
            "codes": lambda: tensors.update(
                {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 64, dtype=torch.int8)}
            ),
            "float8": lambda: tensors.update(
                {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 64).to(torch.float8_e4m3fn)}
            ),
            "doubled": lambda: tensors.update({"norm.weight": torch.ones(64)}),
            "without prefix": lambda: [
                tensors.update({n.removeprefix("model."): tensors.pop(n)}) for n in list(tensors)
            ],
            "prefixed head": lambda: (
                tensors.update({"model.lm_head.weight": tensors.pop("lm_head.weight")})
                if "lm_head.weight" in tensors
                else None
            ),
        }
        for edit in odd["edits"]:
            with contextlib.suppress(KeyError):
                edits[edit]()
        for name, dtype in zip(sorted(tensors), odd["dtypes"] * len(tensors), strict=False):
            if tensors[name].dtype == torch.float32:
                tensors[name] = tensors[name].to(dtype)
        write_layout(folder, tensors, odd["layout"])
        if odd["stray"]:
            other = {n: torch.full_like(t.float(), 0.5) for n, t in tensors.items()}
            write(folder / odd["stray"], other)
        config = {"tie_word_embeddings": odd["tied"]} | odd["config"]
        configure(folder, **config)
        yield folder


def write_layout(folder: Path, tensors: dict[str, Tensor], layout: str) -> None:
    names = sorted(tensors)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    halves = {first: names[: len(names) // 2], second: names[len(names) // 2 :]}
    if layout in ("single", "both"):
        write(folder / SINGLE, tensors)
    if layout == "elsewhere":
        write(folder / "weights.safetensors", tensors)
    if layout in ("single", "elsewhere"):
        return
    for file, held in halves.items():
        spoilt = layout == "both"  # model.safetensors precedes these shards
        write(
            folder / file, {n: torch.zeros_like(tensors[n]) if spoilt else tensors[n] for n in held}
        )
    where = {name: file for file, held in halves.items() for name in held}
    if layout == "wrong index":
        where = {name: second if file == first else first for name, file in where.items()}
    index: dict[str, Any] = {"metadata": {}, "weight_map": where}
    if layout == "no metadata":
        del index["metadata"]
    if layout == "shard missing":
        (folder / second).unlink()
    if layout == "truncated":
        (folder / second).write_bytes((folder / second).read_bytes()[:-10])
    if layout == "pointer":
        (folder / second).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\n")
    if layout != "no index":
        (folder / INDEX).write_text(json.dumps([1] if layout == "list" else index))


LAYOUTS = [
    "single",
    "sharded",
    "both",
    "wrong index",
    "elsewhere",
    "no metadata",
    "shard missing",
    "truncated",
    "pointer",
    "no index",
    "list",
]
EDITS = [
    "bias",
    "block",
    "buffer",
    "missing",
    "shape",
    "codes",
    "float8",
    "doubled",
    "without prefix",
    "prefixed head",
]
STRAYS = ["", "a_copy.safetensors", "old.safetensors", "adapter_model.safetensors"]
CONFIGS = [
    {},
    {},
    {},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 3},
    {"intermediate_size": 128},
    {"attention_bias": True},
    {"vocab_size": 300},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"architectures": None},
    {"architectures": ["OPTForCausalLM"]},
    {"num_hidden_layers": "three"},
    {"hidden_size": 0},
    {"rms_norm_eps": float("nan")},
    {"model_type": ["llama"]},
    {"num_attention_heads": 3},
]
ODD = st.fixed_dictionaries(
    {
        "tied": st.booleans(),
        "head": st.sampled_from(["own", "same", "absent", "alone"]),
        "layout": st.one_of(st.sampled_from(LAYOUTS[:4]), st.sampled_from(LAYOUTS)),
        "edits": st.lists(st.sampled_from(EDITS), max_size=2, unique=True),
        "stray": st.sampled_from(STRAYS),
        "config": st.sampled_from(CONFIGS),
        "dtypes": st.lists(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
            min_size=1,
            max_size=3,
        ),
    }
)
PLAIN: dict[str, Any] = {
    "tied": False,
    "head": "own",
    "layout": "single",
    "edits": [],
    "stray": "",
    "config": {},
    "dtypes": [torch.float32],
}


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(ODD)
@example({**PLAIN, "stray": "old.safetensors"})
@example({**PLAIN, "layout": "both"})
@example({**PLAIN, "layout": "wrong index"})
@example({**PLAIN, "tied": True})
@example({**PLAIN, "tied": True, "head": "same", "dtypes": [torch.bfloat16]})
@example({**PLAIN, "tied": True, "head": "alone"})
@example({**PLAIN, "edits": ["prefixed head", "without prefix"]})
@example({**PLAIN, "edits": ["float8"]})
def test_an_odd_folder_is_read_as_transformers_reads_it_or_refused(odd: dict[str, Any]) -> None:
    with odd_folder(odd) as folder:
        try:
            ours, _ = load(cell(folder, Method("none")), folder, None)
            blocks = Blocks(folder, "float32", "cpu")
        except HarnessError as error:
            assert str(folder) in str(error), f"names no file: {error}"
            assert models.examine(folder).faults, f"the plan does not know: {error}"
            assert not is_sound(odd), f"refused without a reason: {error}"
            return
        assert models.examine(folder).faults == ()
        model, told = theirs(folder)
        assert not told["missing_keys"] and not told["mismatched_keys"]
        expected = model.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        for name, tensor in blocks.ends().items():
            assert torch.equal(tensor, expected[name]), name
        for index in range(len(blocks)):
            for name, tensor in blocks.tensors(index).items():
                assert torch.equal(tensor, expected[f"model.layers.{index}.{name}"]), name
        tokens = torch.arange(24)[None]
        with torch.no_grad():
            assert torch.equal(ours(tokens).logits, model(tokens).logits)


def is_sound(odd: dict[str, Any]) -> bool:
    """Nothing is wrong with such a folder: refusing it would be a false alarm."""
    head = odd["head"] in ("own", "same") or odd["tied"]
    return (
        head
        and odd["layout"] in ("single", "sharded", "both", "wrong index")
        and not set(odd["edits"]) - {"bias", "block", "buffer", "without prefix", "prefixed head"}
        and odd["config"] in ({}, {"num_hidden_layers": 1}, {"architectures": None})
    )
