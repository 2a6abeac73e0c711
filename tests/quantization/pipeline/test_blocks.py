"""What transforms and block-wise roundings are shown: regions, references, gradients, a residual stream in another basis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small import RTN, cell, content, failures, part, quantize, windows

from harness.core import plugins
from harness.core.cell import Cell, Method, Part, quantize_key
from harness.quantization.formats.native import Checkpoint
from harness.quantization.inference.load import load
from harness.quantization.pipeline.blocks import Blocks

PLUGIN = '''
"""A method for tests."""
import dataclasses, torch
from harness.quantization.numerics.weights import DenseWeight

@dataclasses.dataclass(frozen=True)
class Nothing:
    pass

{body}
'''

PROBE = """
class Rounding:
    version, sequential = 1, False
    needs = ("inputs", "reference", "squared_gradient", "hessian")
    Settings = Nothing
    def __init__(self, settings): pass
    def check(self, scheme, shapes): return []
    def round_block(self, block, scheme, rng):
        for k, (x, y) in enumerate(zip(block.inputs(), block.references(), strict=True)):
            if block.evidence["mlp.down_proj"].basis == "full_precision":
                assert torch.allclose(block.run(x), y, atol=1e-4), "on full-precision inputs the block gives its references"
            attention = block.run_region("self_attn", k)
            inner = x + attention
            mlp = block.run_region("mlp", k)
            assert torch.allclose(inner + mlp, block.run(x), atol=1e-4), "regions see what they saw in the block"
            mixed = block.evidence["self_attn.o_proj"]["inputs"][k]
            out = block.run_region("self_attn.o_proj", k)
            assert torch.allclose(out[0], mixed @ block.linear("self_attn.o_proj").weight.T, atol=1e-4)
        q, k_, down = (block.evidence[n] for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
        assert torch.equal(q["hessian"], k_["hessian"]) and q["squared_gradient"].shape != k_["squared_gradient"].shape
        tokens = down["inputs"].reshape(-1, down["inputs"].shape[-1])
        assert torch.allclose(down["hessian"], tokens.T @ tokens / len(tokens), rtol=1e-3, atol=1e-3)
        assert down["reference"].shape == (6, 40, 64) and q.tokens == 240
        try:
            q["abs_max"]
        except KeyError:
            pass
        else:
            raise AssertionError("abs_max was not asked for")
        weight = block.linear("mlp.down_proj").weight.detach().clone().requires_grad_()
        loss = (block.run(block.inputs()[0], {"mlp.down_proj.weight": weight}) - block.references()[0] - 1).square().mean()
        loss.backward()
        assert weight.grad.abs().sum() > 0
        block.module.input_layernorm.weight.mul_(1.25)
        return {s.name: DenseWeight(block.linear(s.name).weight.clone()) for s in block.shapes.linears}
"""

ROTATION = """
class Transform:
    version, needs, stochastic = 1, (), True
    Settings = Nothing
    def __init__(self, settings): pass
    def check(self, scheme, shapes): return []
    def rewrite_ends(self, ends, shapes, scheme, rng):
        self.q, _ = torch.linalg.qr(torch.randn(shapes.hidden_size, shapes.hidden_size, generator=rng))
        head = (ends["lm_head.weight"] * ends["model.norm.weight"]) @ self.q
        return {"model.embed_tokens.weight": ends["model.embed_tokens.weight"] @ self.q, "lm_head.weight": head,
                "model.norm.weight": torch.ones(shapes.hidden_size)}
    def rewrite_block(self, block, scheme, rng):
        for norm, names in (("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))):
            scale = block.module.get_submodule(norm).weight
            for name in names:
                weight = block.linear(name).weight
                weight.copy_((weight * scale) @ self.q)
            scale.fill_(1)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = block.linear(name).weight
            weight.copy_(self.q.T @ weight)
        return {}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    root = tmp_path / "plugins"
    (root / "methods").mkdir(parents=True)
    monkeypatch.setenv("HARNESS_PLUGINS", str(root))

    def install(name: str, body: str) -> None:
        (root / "methods" / f"{name}.py").write_text(PLUGIN.format(body=body))
        plugins.find.cache_clear()
        plugins._module.cache_clear()

    yield install
    plugins.find.cache_clear()


@pytest.mark.parametrize("inputs", ["quantized", "full_precision"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_a_block_wise_method_sees(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    plugin: Callable[[str, str], None],
    family: str,
    inputs: str,
) -> None:
    plugin("probe", PROBE)
    folder = tiny_model(family)
    needs = ("inputs", "reference", "squared_gradient", "hessian")
    c = cell(folder, Method("probe", rounding=Part("probe", needs=needs)), inputs=inputs)
    events = quantize([c], folder, tmp_path / "store")
    assert not failures(events), failures(events)[0].detail
    stored = Checkpoint.open(tmp_path / "store" / quantize_key(c))
    assert set(stored.block(1).dense) == {"input_layernorm.weight"}, (
        "what a rounding rewrites beside the matrices is kept"
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_residual_stream_in_another_basis(
    tiny_model: Callable[..., Path], tmp_path: Path, plugin: Callable[[str, str], None], family: str
) -> None:
    """A rotation of the residual stream leaves the logits; a tied head becomes a tensor of its own."""
    plugin("turn", ROTATION)
    folder = tiny_model(family)
    turn = Part("turn", stochastic=True)

    def made(rounding: Part | None, **fields: str) -> Cell:
        return cell(folder, Method("turned", transform=turn, rounding=rounding), **fields)

    only, rtn = made(None), made(part("rtn"))
    gptq, gptq_full = made(part("gptq")), made(part("gptq"), inputs="full_precision")
    plain = cell(folder, RTN)
    cells = [only, rtn, gptq, gptq_full, plain]
    events = quantize(cells, folder, tmp_path / "store")
    assert not failures(events), failures(events)[0].detail
    tokens = windows(2)

    def logits(c: Cell) -> torch.Tensor:
        model, _ = load(c, folder, tmp_path / "store" / quantize_key(c))
        with torch.no_grad():
            return model(tokens).logits

    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert float((logits(only) - full).norm() / full.norm()) < 1e-4
    distances = {
        name: float((logits(c) - full).norm())
        for name, c in (("rtn", rtn), ("gptq", gptq), ("gptq_full", gptq_full))
    }
    assert distances["gptq"] < distances["rtn"] and distances["gptq_full"] < distances["rtn"], (
        distances
    )
    for c in (gptq, gptq_full):
        quantize([c], folder, tmp_path / "killed", stop_after=1)
        assert not failures(quantize([c], folder, tmp_path / "killed"))
        assert content(tmp_path / "killed" / quantize_key(c)) == content(
            tmp_path / "store" / quantize_key(c)
        )


FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def reference_logits(
    folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return [model(window[None]).logits for window in tokens]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_forward_is_the_models_own(
    tiny_model: Callable[..., Path], family: str, dtype: str
) -> None:
    folder = tiny_model(family, dtype=dtype)
    tokens = windows(3)
    blocks = Blocks(folder, dtype, "cpu")
    with torch.no_grad():
        hidden = blocks.start(tokens)
        for index in range(len(blocks)):
            block = blocks.build(index, blocks.tensors(index))
            hidden = [blocks.run(block, index, sequence, h) for sequence, h in enumerate(hidden)]
        with blocks.head(tokens, hidden) as head:
            logits = [head.logits(sequence, h) for sequence, h in enumerate(hidden)]
    for ours, theirs in zip(
        logits, reference_logits(folder, tokens, getattr(torch, dtype)), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert all(p.is_meta for p in blocks.model.parameters()), (
        "weights of the ends must be given back"
    )


def test_sharded_weights_are_read_alike(tiny_model: Callable[..., Path]) -> None:
    one, many = (Blocks(tiny_model("llama", shards=n), "float32", "cpu") for n in (1, 4))
    for index in range(len(one)):
        for name, tensor in one.tensors(index).items():
            assert torch.equal(tensor, many.tensors(index)[name])
