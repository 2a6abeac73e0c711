"""Loaded checkpoints compute what their dequantized weights say, and nothing is loaded unseen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import GPTQ, RTN, cell, part, quantize, windows
from transformers import AutoModelForCausalLM

from harness.core import plugins
from harness.core.cell import (
    ActivationScheme,
    Cell,
    KVScheme,
    Method,
    Override,
    Scheme,
    WeightScheme,
    freeze,
    quantize_key,
)
from harness.core.errors import MethodError, StoreError
from harness.quantization.formats.native import Checkpoint
from harness.quantization.inference.activations import ActivationQuantizer
from harness.quantization.inference.linear import QuantizedLinear
from harness.quantization.inference.load import load

AWQ = Method("awq", transform=part("awq", "transform"), rounding=part("rtn"))
BASELINE = Method("none")


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def quantized(folder: Path, store: Path, method: Method, **fields: object) -> tuple[Cell, Path]:
    c = cell(folder, method, **fields)  # type: ignore[arg-type]
    quantize([c], folder, store)
    return c, store / quantize_key(c)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", [RTN, AWQ], ids=["rtn", "awq"])
def test_logits_are_those_of_the_dequantized_weights(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, method: Method
) -> None:
    folder = tiny_model(family)
    c, checkpoint = quantized(folder, tmp_path / "store", method)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    stored = Checkpoint.open(checkpoint)
    for index, block in enumerate(expected.model.layers):
        content = stored.block(index)
        state = {
            f"{name}.weight": weight.dequantize() for name, weight in content.weights.items()
        } | content.dense
        block.load_state_dict(state, strict=False)
    tokens = windows(2)
    dense, _ = load(c, folder, checkpoint)
    packed, _ = load(c, folder, checkpoint, mode="packed")
    assert torch.equal(logits(dense, tokens), logits(expected, tokens))
    assert torch.equal(logits(packed, tokens), logits(expected, tokens))
    assert sum(isinstance(m, QuantizedLinear) for m in dense.modules()) == 21
    assert not torch.equal(
        logits(dense, tokens), logits(AutoModelForCausalLM.from_pretrained(folder), tokens)
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_baseline_is_the_model(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = tiny_model(family, dtype="bfloat16")
    c = dataclasses.replace(cell(folder, BASELINE, dtype="bfloat16"), scheme=Scheme("full"))
    ours, tokenizer = load(c, folder, None)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(ours, windows(2)), logits(theirs, windows(2)))
    assert tokenizer("héllo")["input_ids"] and not ours.training
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == (family == "qwen2")
    text = ours.generate(windows(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=258)
    assert torch.equal(
        text, theirs.generate(windows(1, 5), max_new_tokens=4, do_sample=False, pad_token_id=258)
    )


def test_weights_of_16_bits_with_rounded_activations(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    base = dataclasses.replace(cell(folder, BASELINE), scheme=Scheme("full"))
    full = logits(load(base, folder, None)[0], windows(2))
    distances = []
    for bits in (16, 8, 4):
        rounded = dataclasses.replace(
            base, scheme=Scheme(f"a{bits}", activation=ActivationScheme(bits=bits))
        )
        distances.append(
            float((logits(load(rounded, folder, None)[0], windows(2)) - full).norm() / full.norm())
        )
    assert 0 < distances[0] < 1e-3 < distances[1] < distances[2]


def test_static_scales_come_from_the_calibration(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    corpus = tmp_path / "text.txt"
    corpus.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    scheme = Scheme("a8", activation=ActivationScheme(granularity="tensor", dynamic=False))
    base = dataclasses.replace(cell(folder, BASELINE), scheme=scheme)
    calibrated = dataclasses.replace(
        base, calibration=dataclasses.replace(base.calibration, source=str(corpus))
    )  # type: ignore[type-var]
    model, _ = load(calibrated, folder, None)
    linear = model.model.layers[0].mlp.down_proj
    assert float(linear.activation.hi) > 0 and not linear.activation.observing
    with pytest.raises(MethodError, match="need calibration data"):
        load(dataclasses.replace(base, calibration=None), folder, None)


GROUPED = {
    "weight": freeze({"group_size": 16}),
    "activation": freeze({"granularity": "group", "group_size": 16}),
}
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def w8a8(*overrides: Override, group_size: int = -1) -> Scheme:
    granularity = "token" if group_size == -1 else "group"
    activation = ActivationScheme(granularity=granularity, group_size=group_size)
    return Scheme(
        "w8a8", WeightScheme(bits=8, group_size=group_size), activation, overrides=overrides
    )


def test_named_layers_are_rounded_as_their_overrides_say(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Mixed grouping: with no layer named it is plain W8A8, with all of them the grouped scheme, to the bit."""
    folder = tiny_model("llama")
    some = Override(("q_proj", "up_proj"), blocks=(0, 2), **GROUPED)
    found = {}
    for name, scheme in {
        "plain": w8a8(),
        "no block": w8a8(Override(EVERY, blocks=(), **GROUPED)),
        "some": w8a8(some),
        "all": w8a8(Override(EVERY, **GROUPED)),
        "grouped": w8a8(group_size=16),
    }.items():
        one, checkpoint = quantized(
            folder,
            tmp_path / name.replace(" ", "-"),
            Method("rtn", rounding=part("rtn")),
            scheme=scheme,
        )
        model, _ = load(one, folder, checkpoint)
        found[name] = logits(model, windows(2))
        if name == "some":
            sizes = {
                (index, short): module.activation.scheme.group_size
                for index, block in enumerate(model.model.layers)
                for path, module in block.named_modules()
                if isinstance(module, QuantizedLinear) and (short := path.rpartition(".")[2])
            }
            named = {(index, short) for index in (0, 2) for short in ("q_proj", "up_proj")}
            assert {key for key, size in sizes.items() if size == 16} == named and len(sizes) == 21
    assert torch.equal(found["plain"], found["no block"]) and torch.equal(
        found["all"], found["grouped"]
    )
    assert not torch.equal(found["plain"], found["some"]) and not torch.equal(
        found["some"], found["all"]
    )


def test_groups_do_not_see_what_a_power_of_two_does_to_one_of_them() -> None:
    """Per-group W8A8 is invariant, to the bit, to scaling a whole aligned group up in the weights and down in the inputs."""
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 64, generator=rng) * 0.05, torch.randn(2, 9, 64, generator=rng)
    planted, shrunk = weight.clone(), x.clone()
    planted[:, 16:32] *= 256
    shrunk[..., 16:32] /= 256
    outputs = {}
    for group_size in (16, -1):
        scheme = WeightScheme(bits=8, group_size=group_size, symmetric=True, scale_dtype="float32")
        activation = ActivationScheme(
            granularity="token" if group_size == -1 else "group", group_size=group_size
        )
        rounding = plugins.build("rounding", "rtn", {"grid": "awq"})
        for name, w, inputs in (("as it is", weight, x), ("planted", planted, shrunk)):
            quantizer = ActivationQuantizer(activation)
            made = rounding.round_layer("q", w, None, scheme, rng)
            linear = QuantizedLinear(made, None, torch.float32, torch.device("cpu"), quantizer)
            outputs[group_size, name] = linear(inputs)
    assert torch.equal(outputs[16, "as it is"], outputs[16, "planted"])
    exact = x @ weight.T
    errors = {
        name: float((outputs[-1, name] - exact).norm() / exact.norm())
        for name in ("as it is", "planted")
    }
    assert errors["planted"] > 10 * errors["as it is"], errors


def test_a_rounded_cache(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    base = dataclasses.replace(cell(folder, BASELINE), scheme=Scheme("full"))
    full = logits(load(base, folder, None)[0], windows(2))
    distances = []
    for bits, residual in ((4, 64), (16, 16), (8, 16), (4, 16), (2, 16)):
        kv = KVScheme(bits=bits, group_size=16, residual=residual)
        model, _ = load(dataclasses.replace(base, scheme=Scheme("kv", kv=kv)), folder, None)
        distances.append(float((logits(model, windows(2)) - full).norm() / full.norm()))
    assert distances[0] < 1e-5, "a residual longer than the text rounds nothing"
    assert distances[1] < 1e-3 and distances[1] < distances[2] < distances[3] < distances[4]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_rounded_cache_decodes_as_it_scores(tiny_model: Callable[..., Path], family: str) -> None:
    """Logits of one forward equal those of token-by-token decoding: no token sees a group rounded with later tokens."""
    folder = tiny_model(family)
    kv = KVScheme(bits=2, group_size=8, residual=8)
    model, _ = load(
        dataclasses.replace(cell(folder, BASELINE), scheme=Scheme("kv", kv=kv)), folder, None
    )
    tokens = windows(1, 40)
    whole = logits(model, tokens)
    cache, steps = None, []
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            result = model(
                tokens[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            cache = result.past_key_values
            steps.append(result.logits)
    assert float((torch.cat(steps, 1) - whole).norm() / whole.norm()) < 1e-4


def test_all_problems_of_a_scheme_at_once(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    activation = ActivationScheme(granularity="group", group_size=28, grid="smothquant")
    scheme = Scheme("bad", activation=activation, kv=KVScheme(group_size=24))
    with pytest.raises(MethodError, match='did you mean "smoothquant"') as failure:
        load(dataclasses.replace(cell(folder, BASELINE), scheme=scheme), folder, None)
    assert "28 does not divide" in str(failure.value) and "24 does not divide head_dim 16" in str(
        failure.value
    )


def test_damage_is_noticed(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    c, checkpoint = quantized(folder, tmp_path / "store", RTN)
    path = checkpoint / "block-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"block-00001.*is damaged"):
        load(c, folder, checkpoint)
    path.write_bytes(bytes(data[:-100]))
    with pytest.raises(StoreError, match="is damaged"):
        load(c, folder, checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(StoreError, match="not complete"):
        load(c, folder, checkpoint)
    with pytest.raises(StoreError, match="needs a checkpoint"):
        load(c, folder, None)


def test_manifests_speak_of_the_stored_bytes(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("qwen2", dtype="bfloat16")
    _, checkpoint = quantized(folder, tmp_path / "store", RTN, dtype="bfloat16")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    weights = sum(entry["shape"][0] * entry["shape"][1] for entry in manifest["linears"])
    packed = 8 * sum(entry["bytes"] for entry in manifest["linears"])
    # 4 bits, a 16-bit scale and a 4-bit zero point for each group of 32
    assert packed / weights == manifest["bits_per_weight"] == 4 + 20 / 32
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = sum(p.numel() for p in model.parameters())
    assert manifest["parameters"] == total
    assert manifest["bits_per_weight_total"] == pytest.approx(
        (packed + 16 * (total - weights)) / total
    )
    assert manifest["stored_bytes"] == -(-(packed + 16 * (total - weights)) // 8)


def test_a_better_method_is_closer_to_a_trained_model(shared: Path, tmp_path: Path) -> None:
    """Perplexity of babyllama-105 on its own greedy text at 3 bits: full < GPTQ < RTN."""
    folder = shared / "models" / "babyllama-105"
    if not folder.is_dir():
        pytest.skip("../shared/models/babyllama-105 is not here")
    base = dataclasses.replace(cell(folder, BASELINE), scheme=Scheme("full"))
    model, _ = load(base, folder, None)
    torch.manual_seed(0)
    start = torch.full((24, 1), 1)
    text = model.generate(start, max_new_tokens=95, do_sample=True, top_k=0, pad_token_id=0)
    tokens, held_out = text[:16], text[16:]

    def loss(m: torch.nn.Module) -> float:
        return float(
            torch.nn.functional.cross_entropy(
                logits(m, held_out)[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()
            )
        )

    losses = [loss(model)]
    for method in (GPTQ, RTN):
        c = dataclasses.replace(cell(folder, method), scheme=Scheme("w3", WeightScheme(bits=3)))
        quantize([c], folder, tmp_path, tokens)
        losses.append(loss(load(c, folder, tmp_path / quantize_key(c))[0]))
    assert losses[0] < losses[1] < losses[2], losses
