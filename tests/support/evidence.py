"""Stand-ins for what streaming gives a method: evidence of one layer's input, and one small decoder block.

evidence = FakeEvidence(inputs)                 # inputs [sequences, length, in]; every statistic, computed when asked for
evidence = FakeEvidence(inputs, needs=("hessian",))   # as in a pass: any other statistic raises KeyError
block = FakeBlock()                             # a LLaMA-shaped block of width 32 with calibration inputs
layer_error(weight, quantized, inputs)          # ||(W - W') X||² / ||W X||²
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from harness.core.shapes import LinearShape, ScalePair, Shapes
from harness.quantization.methods.protocols import STATISTICS
from harness.quantization.numerics.inputs import hold


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated_inputs(
    width: int, *, sequences: int = 4, length: int = 64, seed: int = 0, outliers: int = 2
) -> Tensor:
    """Inputs [sequences, length, width] as a language model's are: correlated channels, a few of them twenty times larger."""
    rng = generator(seed)
    mix = torch.eye(width) + 0.5 * torch.randn(width, width, generator=rng) / width**0.5
    x = torch.randn(sequences, length, width, generator=rng) @ mix
    large = torch.randperm(width, generator=rng)[:outliers]
    x[..., large] *= 20
    return x


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A weight matrix [rows, columns] with the spread and the few outliers of a trained one."""
    rng = generator(seed)
    weight = 0.05 * torch.randn(rows, columns, generator=rng)
    weight[torch.rand(rows, columns, generator=rng) < 0.01] *= 5
    return weight


def layer_error(weight: Tensor, quantized: Tensor, inputs: Tensor) -> float:
    """Relative squared error of the layer's output on inputs [..., in]."""
    x = inputs.reshape(-1, inputs.shape[-1]).double()
    reference = x @ weight.double().T
    return float((x @ quantized.double().T - reference).square().sum() / reference.square().sum())


class FakeEvidence:
    """Evidence of inputs [sequences, length, in]. gradients: [sequences, out, in] of the loss, for "squared_gradient"; base: a
    matrix [out, in], for "base_weight"; original: the same tokens' inputs in the full-precision model, for "cross".

    computed counts how often each key of `once` was computed, so that tests can see what was shared.
    """

    def __init__(
        self,
        inputs: Tensor,
        *,
        basis: str = "full_precision",
        needs: Sequence[str] | None = None,
        gradients: Tensor | None = None,
        reference: Tensor | None = None,
        original: Tensor | None = None,
        base: Tensor | None = None,
    ) -> None:
        self.basis = basis
        self._original = original
        self.tokens = inputs.shape[0] * inputs.shape[1]
        self.computed: dict[Hashable, int] = {}
        self._inputs, self._gradients, self._reference = inputs, gradients, reference
        self._base = base
        self._needs = set(STATISTICS if needs is None else needs)
        self._memo: dict[Hashable, Any] = {}
        self._statistics: dict[str, Tensor] = {}

    def __getitem__(self, statistic: str) -> Tensor:
        if statistic not in self._needs:
            raise KeyError(statistic)
        if statistic not in self._statistics:
            self._statistics[statistic] = self._compute(statistic)
        return self._statistics[statistic]

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = compute()
            self.computed[key] = self.computed.get(key, 0) + 1
        return self._memo[key]

    def _compute(self, statistic: str) -> Tensor:
        x = self._inputs.float()
        tokens = x.reshape(-1, x.shape[-1])
        if statistic == "hessian":
            return tokens.T @ tokens / tokens.shape[0]
        if statistic == "cross":
            original = tokens if self._original is None else self._original.reshape(tokens.shape)
            return original.float().T @ tokens / tokens.shape[0]
        if statistic == "mean":
            return tokens.mean(0)
        if statistic == "square_mean":
            return tokens.square().mean(0)
        if statistic == "abs_mean":
            return tokens.abs().mean(0)
        if statistic == "abs_max":
            return tokens.abs().amax(0)
        if statistic == "abs_max_per_sequence":
            return x.abs().amax(1)
        if statistic == "inputs":
            return self._inputs
        if statistic == "reference" and self._reference is not None:
            return self._reference
        if statistic == "base_weight" and self._base is not None:
            return self._base
        if statistic == "squared_gradient" and self._gradients is not None:
            return self._gradients.square().sum(0)
        raise KeyError(statistic)


class HessianEvidence(FakeEvidence):
    """Evidence that holds a given Hessian [in, in] and nothing else."""

    def __init__(self, hessian: Tensor, *, tokens: int = 256) -> None:
        super().__init__(torch.zeros(1, 1, hessian.shape[0]), needs=("hessian",))
        self.tokens = tokens
        self._statistics["hessian"] = hessian


def planted_change(rows: int, columns: int, seed: int = 0, *, decay: float = 0.75) -> Tensor:
    """The difference of a fine-tune [rows, columns]: 24 terms whose sizes fall by `decay`, and noise of 1 % of the first."""
    rng = generator(seed)
    terms = min(24, rows, columns)
    left = torch.linalg.qr(torch.randn(rows, terms, generator=rng)).Q
    right = torch.linalg.qr(torch.randn(columns, terms, generator=rng)).Q
    sizes = decay ** torch.arange(terms)
    noise = torch.randn(rows, columns, generator=rng) / (rows * columns) ** 0.5
    return (left * sizes) @ right.T + 0.01 * noise


class RMSNorm(nn.Module):
    def __init__(self, width: int, rng: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(width, generator=rng))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        q = self.q_proj(hidden).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(hidden).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(hidden).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DecoderBlock(nn.Module):
    """A LLaMA block without positions."""

    def __init__(
        self, width: int, inner: int, heads: int, kv_heads: int, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(width, rng)
        self.self_attn = Attention(width, heads, kv_heads)
        self.post_attention_layernorm = RMSNorm(width, rng)
        self.mlp = FeedForward(width, inner)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            linear.weight.data = (
                torch.randn(linear.weight.shape, generator=rng) / linear.in_features**0.5
            )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


PER_LINEAR = {
    "squared_gradient",
    "base_weight",
}  # statistics that differ between linears of a group
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def llama_shapes(
    width: int = 32,
    inner: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    *,
    blocks: int = 2,
    rotations: bool = True,
) -> Shapes:
    """The Shapes of a model of DecoderBlocks, as a family would give them."""
    kv_width = kv_heads * width // heads
    linears = (
        LinearShape("self_attn.q_proj", width, width, "qkv"),
        LinearShape("self_attn.k_proj", kv_width, width, "qkv"),
        LinearShape("self_attn.v_proj", kv_width, width, "qkv"),
        LinearShape("self_attn.o_proj", width, width, "o"),
        LinearShape("mlp.gate_proj", inner, width, "gate_up"),
        LinearShape("mlp.up_proj", inner, width, "gate_up"),
        LinearShape("mlp.down_proj", width, inner, "down"),
    )
    pairs = (
        ScalePair("input_layernorm", QKV, "norm", region="self_attn"),
        ScalePair("self_attn.v_proj", ("self_attn.o_proj",), "linear", repeats=heads // kv_heads),
        ScalePair("post_attention_layernorm", GATE_UP, "norm", region="mlp"),
        ScalePair("mlp.up_proj", ("mlp.down_proj",), "linear"),
    )
    parameters = (
        blocks * (sum(s.out_features * s.in_features for s in linears) + 2 * width)
        + 2 * 256 * width
        + width
    )
    return Shapes(
        family="llama",
        blocks=blocks,
        linears=linears,
        pairs=pairs,
        hidden_size=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        parameters=parameters,
        rotations=rotations,
        ends=("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        if rotations
        else None,
        query_key=("self_attn.q_proj", "self_attn.k_proj"),
    )


class FakeBlock:
    """A BlockView over one DecoderBlock with random weights and correlated calibration inputs.

    As in a pass, evidence and region inputs are those of the block before it is rewritten; `observe()` collects them again.
    needs limits the statistics; gradients of the mean squared output serve as "squared_gradient"; its base has other numbers in
    every matrix, by a difference of falling singular values.
    """

    index: int

    def __init__(
        self,
        width: int = 32,
        inner: int = 64,
        heads: int = 4,
        kv_heads: int = 4,
        *,
        seed: int = 0,
        sequences: int = 4,
        length: int = 48,
        index: int = 0,
        needs: Sequence[str] | None = None,
        basis: str = "full_precision",
    ) -> None:
        self.index = index
        self.shapes = llama_shapes(width, inner, heads, kv_heads)
        self.module: nn.Module = DecoderBlock(width, inner, heads, kv_heads, generator(seed))
        self.calibration = correlated_inputs(
            width, sequences=sequences, length=length, seed=seed + 1
        )
        self._needs, self._basis = needs, basis
        self._bases = {
            shape.name: self.linear(shape.name).weight.detach()
            - planted_change(shape.out_features, shape.in_features, seed + 2)
            for shape in self.shapes.linears
        }
        self.notes: dict[str, Any] = {}
        self.change(lambda block: None)

    @torch.no_grad()
    def change(self, how: Callable[[FakeBlock], None]) -> None:
        """Another full-precision block: how(block) changes its parameters or its calibration inputs [sequences, length, width]."""
        how(self)
        self._references = [self.module(x[None]) for x in self.calibration]
        self.observe()

    def observe(self) -> None:
        """Run the block as it is now and collect the inputs of every linear and region anew."""
        captured: dict[str, list[Tensor]] = {}
        names = [shape.name for shape in self.shapes.linears]
        regions = [name for name in ("self_attn", "mlp")]
        gradients: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, name=name: captured.setdefault(name, []).append(
                    args[0].detach()
                )
            )
            for name in (*names, *regions)
        ]
        for x in self.calibration:
            with torch.enable_grad():
                self.module.zero_grad()
                self.module(x[None]).square().mean().backward()
            for name in names:
                gradient = self.linear(name).weight.grad
                assert gradient is not None
                gradients[name].append(gradient.clone())
        self.module.zero_grad()
        for hook in hooks:
            hook.remove()
        self._regions = {name: captured[name] for name in regions}
        by_group: dict[str, FakeEvidence] = {}
        self.evidence: Mapping[str, FakeEvidence] = {
            shape.name: by_group.setdefault(
                # gradients differ within a group, so a linear shares its evidence only when they are not asked for
                shape.group
                if self._needs is not None and not set(self._needs) & PER_LINEAR
                else shape.name,
                FakeEvidence(
                    torch.cat(captured[shape.name]),
                    basis=self._basis,
                    needs=self._needs,
                    gradients=torch.stack(gradients[shape.name]),
                    reference=torch.cat(self._references),
                    base=self._bases[shape.name],
                ),
            )
            for shape in self.shapes.linears
        }

    def linear(self, name: str) -> nn.Linear:
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def set_input(self, name: str, kind: str, value: Tensor) -> None:
        hold(self.linear(name), kind, value)

    def inputs(self) -> Sequence[Tensor]:
        return [x[None] for x in self.calibration]

    def references(self) -> Sequence[Tensor]:
        return self._references

    def run(
        self,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        receive: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Tensor:
        handles = (
            []
            if receive is None
            else [
                self.linear(shape.name).register_forward_pre_hook(
                    lambda _module, args, name=shape.name: (receive(name, args[0]), *args[1:])
                )
                for shape in self.shapes.linears
            ]
        )
        try:
            return functional_call(self.module, dict(weights or {}), (hidden,))
        finally:
            for handle in handles:
                handle.remove()

    def run_region(
        self, region: str, index: int, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        inner = {name.removeprefix(f"{region}."): value for name, value in (weights or {}).items()}
        return functional_call(
            self.module.get_submodule(region), inner, (self._regions[region][index],)
        )
