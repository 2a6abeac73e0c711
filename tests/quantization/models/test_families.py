"""Every family on tiny random models: what it says of a model is what transformers' model does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small import GPTQ, RTN, cell, failures, part, quantize, windows
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.core.cell import Method, Scheme, WeightScheme, quantize_key
from harness.core.errors import ModelError
from harness.data.demo.tiny import TINY
from harness.quantization import models
from harness.quantization.formats.native import Checkpoint
from harness.quantization.inference.load import load
from harness.quantization.models.protocols import get_tensor, tied
from harness.quantization.pipeline.blocks import Blocks, StreamedBlock

FAMILIES = [
    name for name in TINY if name not in ("llama", "mistral", "qwen2", "qwen3")
]  # those are in test_llama.py
GENERIC = ["gpt2", "bloom", "starcoder2", "olmo2"]
AWQ = Method(
    "awq",
    transform=part("awq", "transform", exponents=4, scale_grouped_values=True),
    rounding=part("rtn"),
)


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' own model."""
    family = models.family_of(models.read_config(folder))
    return family.auto_class.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def streamed_logits(folder: Path, tokens: Tensor, dtype: str = "float32") -> list[Tensor]:
    blocks = Blocks(folder, dtype, "cpu")
    hidden = blocks.start(tokens)
    for index in range(len(blocks)):
        block = blocks.build(index, blocks.tensors(index))
        hidden = [blocks.run(block, index, sequence, h) for sequence, h in enumerate(hidden)]
    with blocks.head(tokens, hidden) as head:
        return [head.logits(sequence, h) for sequence, h in enumerate(hidden)]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_forward_is_the_models_own(tiny_model: Callable[..., Path], family: str) -> None:
    folder = tiny_model(family)
    tokens, model = windows(2), reference(folder)
    with torch.no_grad():
        expected = [model(window[None]).logits for window in tokens]
    for ours, theirs in zip(streamed_logits(folder, tokens), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_name_every_matrix_of_a_block_once(
    tiny_model: Callable[..., Path], family: str
) -> None:
    """Slots cover each linear and each fused expert of every block without overlap; routers alone are left."""
    folder = tiny_model(family)
    data = models.read_config(folder)
    ours = models.family_of(data)
    config, shapes = ours.config(data), models.shapes(folder)
    model = reference(folder)
    for index, block in enumerate(ours.blocks(model)):
        marks = {name: torch.zeros_like(parameter) for name, parameter in block.named_parameters()}
        for location in ours.locations(config, index):
            location.view(marks[location.parameter]).add_(1)
        for name, mark in marks.items():
            owner = block.get_submodule(name.rpartition(".")[0])
            left = mark.ndim < 2 or name in ("mlp.gate.weight", "mlp.shared_expert_gate.weight")
            assert bool((mark == (0 if left else 1)).all()), (index, name, type(owner).__name__)
        biases = {
            location.bias for location in ours.locations(config, index) if location.bias is not None
        }
        linears = {
            n
            for n, m in block.named_modules()
            if isinstance(m, nn.Linear | Conv1D) and m.bias is not None
        }
        assert biases == {f"{name}.bias" for name in linears}
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    assert shapes.tied_head == (
        model.get_output_embeddings().weight.data_ptr()
        == model.get_input_embeddings().weight.data_ptr()
    )
    assert (shapes.blocks, shapes.heads) == (3, 4) and shapes.kv_heads in (1, 2, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_knows_its_buffers(tiny_model: Callable[..., Path], family: str) -> None:
    folder = tiny_model(family)
    data = models.read_config(folder)
    ours = models.family_of(data)
    skeleton = ours.skeleton(ours.config(data), torch.float32)
    theirs = reference(folder)
    assert all(parameter.is_meta for parameter in skeleton.parameters()) and not skeleton.training
    buffers = dict(theirs.named_buffers())
    assert buffers.keys() == dict(skeleton.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in skeleton.named_buffers())
    assert tied(skeleton).keys() == tied(theirs).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_scale_leaves_the_block_as_it_was(
    tiny_model: Callable[..., Path], family: str
) -> None:
    """Each pair alone: the producer divided, its consumers multiplied, the block's output the same."""
    folder = tiny_model(family)
    tokens = windows(1)
    blocks = Blocks(folder, "float32", "cpu")
    hidden = blocks.start(tokens)[0]
    generator = torch.Generator().manual_seed(0)
    folded = set()
    for index in range(len(blocks)):
        original = blocks.tensors(index)
        pairs = StreamedBlock(
            blocks, index, blocks.build(index, original), original, {}, [hidden], None
        ).shapes.pairs
        with torch.no_grad():
            before = blocks.run(blocks.build(index, original), index, 0, hidden)
            for pair in pairs:
                module = blocks.build(
                    index, {name: tensor.clone() for name, tensor in original.items()}
                )
                view = StreamedBlock(blocks, index, module, original, {}, [hidden], None)
                producer = (
                    module.get_submodule(pair.producer)
                    if pair.kind == "norm"
                    else view.linear(pair.producer)
                )
                scale = 0.5 + torch.rand(producer.weight.shape[0], generator=generator)
                if pair.kind == "norm":
                    producer.weight.copy_((producer.weight + pair.offset) / scale - pair.offset)
                else:
                    producer.weight.copy_(producer.weight / scale[:, None])
                if getattr(producer, "bias", None) is not None:
                    producer.bias.copy_(producer.bias / scale)
                heads = scale.view(-1, view.shapes.head_dim) if pair.repeats > 1 else scale
                wide = (
                    heads.repeat_interleave(pair.repeats, 0).flatten()
                    if pair.repeats > 1
                    else scale
                )
                for name in pair.consumers:
                    view.linear(name).weight.mul_(wide)
                after = blocks.run(module, index, 0, hidden)
                assert torch.allclose(before, after, atol=2e-4 * float(before.abs().max())), (
                    index,
                    pair,
                )
                folded.add(pair)
            hidden = before
    assert folded == set(blocks.shapes.pairs), "every pair belongs to some block"
    assert bool(folded) == (family not in GENERIC)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_group_has_one_input_and_the_product_is_the_blocks(
    tiny_model: Callable[..., Path], family: str
) -> None:
    """What `watch` reports is what the matrices multiply: doubling it halves the matrix that gives the same block."""
    folder = tiny_model(family)
    blocks = Blocks(folder, "float32", "cpu")
    hidden = blocks.start(windows(1))[0]
    index = len(blocks) - 1
    original = blocks.tensors(index)
    block = blocks.build(index, original)
    locations = blocks.locations(index)
    seen: dict[str, Tensor] = {}
    with (
        torch.no_grad(),
        blocks.family.watch(block, locations, lambda group, x: seen.update({group: x})),
    ):
        before = blocks.run(block, index, 0, hidden)
    widths = {
        location.group: location.view(original[location.parameter]).shape[1]
        for location in locations
    }
    assert {group: x.shape[-1] for group, x in seen.items()} == widths
    routed = sum(
        x.shape[0] for group, x in seen.items() if group.endswith(".gate_up") and "experts" in group
    )
    assert routed in (0, 2 * hidden.shape[1]), "every token goes to two experts"

    module = blocks.build(index, {name: tensor.clone() for name, tensor in original.items()})
    view = StreamedBlock(blocks, index, module, original, {}, [hidden], None)
    asked: list[str] = []

    def double(name: str, inputs: Tensor) -> Tensor:
        asked.append(name)
        return inputs * 2

    halved = {
        f"{location.name}.weight": location.view(original[location.parameter]) / 2
        for location in locations
    }
    with torch.no_grad():
        after = view.run(hidden, halved, double)
    assert torch.allclose(before, after, atol=1e-4 * float(before.abs().max()))
    first = {location.group: location.name for location in reversed(locations)}
    assert set(asked) <= {location.name for location in locations} and {
        first[g] for g in first if "expert" in g
    } <= set(asked)
    with torch.no_grad():
        assert torch.equal(view.run(hidden), before), "the block is left as it was"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_quantizes_every_matrix_and_nothing_else(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = tiny_model(family)
    data = models.read_config(folder)
    ours = models.family_of(data)
    config = ours.config(data)
    methods = [RTN, GPTQ, *([AWQ] if models.shapes(folder).pairs else [])]
    cells = [cell(folder, method, group_size=16) for method in methods]
    events = quantize(cells, folder, tmp_path / "store")
    assert not failures(events), failures(events)
    source = reference(folder)
    for c in cells:
        checkpoint = tmp_path / "store" / quantize_key(c)
        locations = [ours.locations(config, index) for index in range(3)]
        manifest = Checkpoint.open(checkpoint).manifest
        covered = sum(
            location.view(get_tensor(b, location.parameter)).numel()
            for b, members in zip(ours.blocks(source), locations, strict=True)
            for location in members
        )
        assert manifest["coverage"]["linears"] == sum(map(len, locations))
        assert manifest["coverage"]["weights"] == covered
        model, _ = load(c, folder, checkpoint)
        with torch.no_grad():
            assert torch.isfinite(model(windows(1)).logits).all()
        if c.method is not AWQ:
            assert changed(source, model) == {
                f"{ours.block_prefix(i)}{location.parameter}"
                for i, members in enumerate(locations)
                for location in members
            }


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    """Parameters of `before` that have other values in `after`."""
    found = set()
    for name, tensor in before.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        if not torch.equal(tensor, getattr(after.get_submodule(parent), leaf)):
            found.add(name)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_leaves_the_function_unchanged(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """At 8 bits in small groups the transformed model's logits are as close to the original's as rounding alone leaves them.

    A random model may amplify rounding (OPT's post-norm blocks to 0.19), so rounding without the transform is the measure.
    """
    folder = tiny_model(family)
    if not models.shapes(folder).pairs:
        pytest.skip("nothing can be folded")
    pair = [
        cell(folder, method, bits=8, group_size=16)
        for method in (AWQ, dataclasses.replace(AWQ, transform=None))
    ]
    assert not failures(quantize(pair, folder, tmp_path / "store"))
    tokens = windows(1)
    errors = []
    with torch.no_grad():
        theirs = reference(folder)(tokens).logits
        for each in pair:
            model, _ = load(each, folder, tmp_path / "store" / quantize_key(each))
            errors.append(float((model(tokens).logits - theirs).norm() / theirs.norm()))
    assert errors[0] < 1.5 * errors[1] + 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_that_a_group_does_not_divide_are_refused_by_name(
    tiny_model: Callable[..., Path], family: str
) -> None:
    from harness.core import plugins

    shapes = models.shapes(tiny_model(family))
    rounding = plugins.build("rounding", "gptq", {})
    (reason,) = rounding.check(cell(Path("x"), GPTQ, group_size=40).scheme, shapes)
    assert all(linear.name in reason for linear in shapes.linears)


def test_files_of_the_hub_hold_one_matrix_per_expert(tiny_model: Callable[..., Path]) -> None:
    """What save_pretrained writes is the published layout: fused parameters are in no file."""
    for family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        folder = tiny_model(family)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert not any("gate_up_proj" in name for name in file.keys())
        reader = Blocks(folder, "float32", "cpu")
        model = reference(folder)
        for name, tensor in reader.tensors(2).items():
            assert torch.equal(tensor, get_tensor(reader.family.blocks(model)[2], name)), name


def test_a_sharded_mixture_reads_alike(tiny_model: Callable[..., Path]) -> None:
    one, many = (Blocks(tiny_model("qwen3_moe", shards=n), "float32", "cpu") for n in (1, 5))
    assert all(
        torch.equal(tensor, many.tensors(1)[name]) for name, tensor in one.tensors(1).items()
    )


def test_fields_of_locations_agree_with_shapes(tiny_model: Callable[..., Path]) -> None:
    shapes = models.shapes(tiny_model("qwen2_moe"))
    assert {linear.name for linear in shapes.linears if linear.expert} == {
        f"mlp.experts.{e}.{n}_proj" for e in range(4) for n in ("gate", "up", "down")
    }
    assert "mlp.gate_proj" in {linear.name for linear in shapes.linears}, (
        "the dense first block counts"
    )
    assert dataclasses.replace(shapes).experts == 4


# --- experts that calibration does not reach ----------------------------------------------------------------------------------


@pytest.fixture
def lopsided(tiny_model: Callable[..., Path]) -> Path:
    """A mixture whose routers never choose expert 3, in any block."""
    from safetensors.torch import load_file, save_file

    folder = tiny_model("mixtral", num_hidden_layers=2, num_experts_per_tok=1, intermediate_size=32)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            tensor[3] = tensor[:3].mean(0)  # between the others: never the first
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("sequential", [False, True])
def test_an_expert_without_tokens_is_rounded_to_nearest_and_recorded(
    lopsided: Path, tmp_path: Path, sequential: bool
) -> None:
    gptq = Method("gptq", rounding=part("gptq", sequential=sequential))
    awq = dataclasses.replace(AWQ, rounding=part("gptq"))
    cells = [cell(lopsided, method, group_size=16) for method in (RTN, gptq, awq)]
    tokens = windows(samples=32)
    assert not failures(quantize(cells, lopsided, tmp_path, tokens))
    nearest, ours, scaled = (Checkpoint.open(tmp_path / quantize_key(c)) for c in cells)
    unseen = [f"mlp.experts.3.{name}_proj" for name in ("gate", "up", "down")]
    for index in range(2):
        assert ours.manifest["notes"][str(index)]["rounded_to_nearest"] == dict.fromkeys(unseen, 0)
        for name in unseen:
            assert torch.equal(
                ours.block(index).weights[name].dequantize(),
                nearest.block(index).weights[name].dequantize(),
            )
        seen = "mlp.experts.0.gate_proj"
        assert not torch.equal(
            ours.block(index).weights[seen].dequantize(),
            nearest.block(index).weights[seen].dequantize(),
        )
        assert scaled.manifest["notes"][str(index)]["pairs_without_calibration"] == [
            "mlp.experts.3.up_proj → mlp.experts.3.down_proj"
        ]
    assert "rounded_to_nearest" not in nearest.manifest["notes"].get("0", {}), (
        "a data-free method lacks nothing"
    )
    counts = {
        (e["block"], e["linear"]): e["calibration_tokens"]
        for e in ours.manifest["layer_errors"]
        if "experts" in e["linear"]
    }
    assert all(counts[index, name] == 0 for index in range(2) for name in unseen)
    assert sum(counts[0, f"mlp.experts.{e}.gate_proj"] for e in range(4)) == tokens.numel()


def test_fewer_tokens_than_inputs_are_too_few_for_a_second_moment(
    lopsided: Path, tmp_path: Path
) -> None:
    c = cell(lopsided, GPTQ, group_size=16)
    assert not failures(quantize([c], lopsided, tmp_path, windows(samples=1, length=40)))
    notes = Checkpoint.open(tmp_path / quantize_key(c)).manifest["notes"]["0"]["rounded_to_nearest"]
    assert {name.split(".")[2] for name in notes} == {"0", "1", "2", "3"} and max(
        notes.values()
    ) < 64


@pytest.mark.parametrize(("name", "bits"), [("billm", 1.1), ("pb_llm", 1.7)])
def test_binary_methods_round_unseen_experts_without_calibration(
    lopsided: Path, tmp_path: Path, name: str, bits: float
) -> None:
    scheme = Scheme("w1", WeightScheme(bits=bits, group_size=16))
    blind = part(name, salience="magnitude", feedback=False)
    cells = [
        dataclasses.replace(cell(lopsided, Method(name, rounding=each)), scheme=scheme)
        for each in (part(name), blind)
    ]
    assert not failures(quantize(cells, lopsided, tmp_path, windows(samples=32)))
    ours, by_magnitude = (Checkpoint.open(tmp_path / quantize_key(c)) for c in cells)
    unseen, seen = ours.manifest["notes"]["0"]["rounded_to_nearest"], "mlp.experts.0.gate_proj"
    assert set(unseen) == {f"mlp.experts.3.{linear}_proj" for linear in ("gate", "up", "down")}
    for linear in (*unseen, seen):
        pair = (each.block(0).weights[linear].dequantize() for each in (ours, by_magnitude))
        assert torch.equal(*pair) is (linear != seen)


def test_a_scheme_without_a_nearest_grid_fails_by_name(
    lopsided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("harness.quantization.methods.billm.Rounding.round_unseen")
    scheme = Scheme("w1", WeightScheme(bits=1.1, group_size=16))
    c = dataclasses.replace(cell(lopsided, Method("billm", rounding=part("billm"))), scheme=scheme)
    (failure,) = failures(quantize([c], lopsided, tmp_path, windows(samples=32)))
    assert "mlp.experts.3" in failure.reason and "use more calibration samples" in failure.reason


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_activations_inside_experts_are_rounded_expert_by_expert(
    tiny_model: Callable[..., Path], family: str
) -> None:
    """Many bits change next to nothing, few bits much; each expert's two inputs have a quantizer of their own."""
    from harness.core.cell import ActivationScheme

    folder = tiny_model(family, num_hidden_layers=2)
    tokens, expected = windows(2), reference(folder)(windows(2)).logits
    errors = {}
    for bits in (16, 8, 3):
        scheme = Scheme(
            "a",
            WeightScheme(),
            activation=ActivationScheme(bits=bits, granularity="token", dynamic=True),
        )
        model, _ = load(
            dataclasses.replace(cell(folder, Method("none")), scheme=scheme), folder, None
        )
        with torch.no_grad():
            errors[bits] = float((model(tokens).logits - expected).norm() / expected.norm())
            alone = model(tokens[:1]).logits
        assert torch.allclose(alone, model(tokens).logits[:1], atol=1e-4), (
            "a text does not depend on its batch"
        )
    assert errors[16] < 1e-3 < errors[8] < errors[3]


def test_a_plan_refuses_scales_that_experts_cannot_have(tiny_model: Callable[..., Path]) -> None:
    from harness.core.cell import ActivationScheme
    from harness.quantization.inference import activations

    shapes = models.shapes(tiny_model("mixtral"))
    scheme = Scheme("w8a8", activation=ActivationScheme(granularity="tensor", dynamic=False))
    (reason,) = activations.check(scheme, shapes)
    assert "mlp.experts.0.gate_proj" in reason and "per token" in reason
    assert not activations.check(
        dataclasses.replace(scheme, activation=ActivationScheme(granularity="token")), shapes
    )


# --- architectures that transformers lacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}},
            "QWenLMHeadModel: this model brings code of its own",
        ),
        ({}, 'QWenLMHeadModel: transformers .* knows no model_type "qwen"'),
    ],
)
def test_models_that_transformers_lacks_are_told_in_a_line(
    more: dict[str, object], said: str
) -> None:
    config = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 64, **more}
    with pytest.raises(ModelError, match=said) as refused:
        models.family_of(config).config(config)
    assert len(str(refused.value)) < 300
