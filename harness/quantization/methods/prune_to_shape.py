"""A target shape by activation saliency, without training; ours, no paper. Shapes after Sheared LLaMA (arXiv 2310.06694).

It makes every shape cheaply: fewer blocks, narrower MLPs, fewer heads, a narrower residual stream. One survey of the unrounded
model on full-precision inputs says what is kept; E is the mean over calibration tokens:

    blocks        those with the largest 1 - E[cos(x_i, x_i+1)], as ShortGPT (2403.03853); protect_ends keeps first and last
    MLP channels  per block, the largest √E[h_f²] · ||W_down[:, f]||, h the input of down
    heads         per block, a key-value head with its query heads: largest √(Σ of its channels c, E[a_c²] · ||W_o[:, c]||²)
    hidden        one set: largest Σ over norms of √E[n_d²] · √(Σ over consumers of ||W[:, d]||²), n a norm's output

criterion: magnitude leaves out E. compensate: what the removed inputs R of o and down contributed is put on the kept ones K by
least squares, W_K += W_R H[R, K] (H[K, K] + λI)⁻¹, H the second moment of the input and λ = damping_fraction · mean diag H[K, K].
rescale_norms: where the stream becomes narrower, the weight of each norm times ρ, ρ² the mean over K of E[x_d² / mean of x²]: an
RMSNorm divides by the mean over what is left.
Memory: with compensate, besides what a survey takes, every compensated o and down of the model in float32 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Generator as Generating
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from harness.core.shapes import Shapes
from harness.quantization.methods.protocols import ModelReader, Survey, SurveyedBlock
from harness.quantization.methods.reducing import check_blocks, mean_cosine, text_of, without_blocks

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT, DOWN = "self_attn.o_proj", "mlp.down_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
NORMS = {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}
EMBEDDINGS, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Reduction:
    """Cuts blocks, MLP channels, heads and channels of the residual stream."""

    version = 1
    needs = ("square_mean", "hessian", "block_states")
    stochastic = False

    @dataclass(frozen=True)
    class Settings:
        """
        blocks, intermediate, kv_heads, hidden   numbers that are kept; 0: all. Query heads follow their key-value heads
        criterion         activation: saliency with the size of activations; magnitude: of weights alone
        compensate        put what removed inputs of o and down contributed on the kept ones
        damping_fraction  of the mean diagonal of the kept inputs' second moment, in the compensation; above 0
        rescale_norms     norms keep the size of their output on average where hidden is cut
        protect_ends      the first and the last block stay
        """

        blocks: int = 0
        intermediate: int = 0
        kv_heads: int = 0
        hidden: int = 0
        criterion: Literal["activation", "magnitude"] = "activation"
        compensate: bool = True
        damping_fraction: float = 0.01
        rescale_norms: bool = True
        protect_ends: bool = True

        def __post_init__(self) -> None:
            numbers = (self.blocks, self.intermediate, self.kv_heads, self.hidden)
            if any(number < 0 for number in numbers):
                raise ValueError(
                    f"blocks, intermediate, kv_heads and hidden are numbers, not {numbers}"
                )
            if self.criterion not in ("activation", "magnitude"):
                raise ValueError(
                    f'criterion is "{self.criterion}"; it must be activation or magnitude'
                )
            if not self.damping_fraction > 0:
                raise ValueError(f"damping_fraction is {self.damping_fraction}; it must be above 0")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # by block and linear, float32 on the CPU, until `tensors` takes it
        self._compensated: dict[tuple[int, str], Tensor] = {}

    def check(self, shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
        """Llama and models of its structure, with targets that are below what they have."""
        if shapes.family != "llama":
            return [
                f'shapes are cut of Llama and models of its structure, not of family "{shapes.family}"'
            ]
        settings, text = self.settings, text_of(config)
        have = {
            "blocks": shapes.blocks,
            "intermediate": text["intermediate_size"],
            "kv_heads": shapes.kv_heads,
            "hidden": shapes.hidden_size,
        }
        wanted = {name: getattr(settings, name) for name in have}
        reasons = check_blocks(config) if settings.blocks else []
        reasons += [
            f"{name} {wanted[name]}: this model has {have[name]}, and no more can be kept"
            for name in have
            if wanted[name] > have[name]
        ]
        if not any(0 < wanted[name] < have[name] for name in have):
            reasons.append(
                "nothing would be removed; set reduction.blocks, reduction.intermediate, reduction.kv_heads or reduction.hidden "
                "below what the model has"
            )
        if settings.protect_ends and settings.blocks == 1 < shapes.blocks:
            reasons.append("one block is kept, and protect_ends keeps two; set it to false")
        return reasons

    def config(
        self, config: Mapping[str, Any], choice: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The config with the target shape; head_dim is stated, since hidden_size no longer says it."""
        text = text_of(config)
        blocks = range(self.settings.blocks or text["num_hidden_layers"])
        new = without_blocks(config, choice["blocks"] if choice is not None else blocks)
        own = dict(text_of(new))
        heads = own["num_attention_heads"]
        kv_heads = own.get("num_key_value_heads") or heads
        own["head_dim"] = own.get("head_dim") or own["hidden_size"] // heads
        if self.settings.kv_heads:
            own["num_attention_heads"] = heads // kv_heads * self.settings.kv_heads
            own["num_key_value_heads"] = self.settings.kv_heads
        own["intermediate_size"] = self.settings.intermediate or own["intermediate_size"]
        own["hidden_size"] = self.settings.hidden or own["hidden_size"]
        return own if text_of(new) is new else {**new, "text_config": own}

    def choose(
        self, model: Survey, rng: Generator
    ) -> Generating[tuple[int, int], None, dict[str, Any]]:
        """What is kept: "blocks", "channels" and "kv_heads" by block, "hidden"; besides "influence", and factors of "norms"."""
        settings, shapes = self.settings, model.shapes
        influence: list[float] = []
        channels: dict[str, list[int]] = {}
        kv_heads: dict[str, list[int]] = {}
        stream = _Stream(shapes.hidden_size)
        ends = model.ends()
        for block in model.surveyed():
            influence.append(1 - mean_cosine(block.inputs, block.outputs))
            scores = self._saliency(block, DOWN)
            found = _largest(scores, settings.intermediate or scores.numel())
            channels[str(block.index)] = found
            kept_heads = self._kept_heads(block, shapes)
            kv_heads[str(block.index)] = kept_heads
            if settings.compensate:
                self._compensate(block, DOWN, found)
                self._compensate(block, OUTPUT, _head_channels(kept_heads, shapes, queries=True))
            norms = model.block(block.index)
            for norm, consumers in NORMS.items():
                square = block.evidence[consumers[0]]["square_mean"]
                matrices = [block.matrices[name] for name in consumers]
                weight = norms[f"{norm}.weight"]
                stream.add(f"{block.index}.{norm}", square, weight, matrices, settings.criterion)
            if block.index == shapes.blocks - 1:
                head = ends.get(HEAD, ends[EMBEDDINGS])
                eps = float(text_of(model.config).get("rms_norm_eps", 1e-6))
                square = _normalized(block.outputs, eps) * ends[FINAL_NORM].float().square()
                stream.add("final", square, ends[FINAL_NORM], [head], settings.criterion)
            yield block.index + 1, shapes.blocks
        kept = self._kept_blocks(influence)
        hidden = _largest(stream.score, settings.hidden or shapes.hidden_size)
        narrower = len(hidden) < shapes.hidden_size and settings.rescale_norms
        return {
            "blocks": kept,
            "influence": influence,
            "channels": channels,
            "kv_heads": kv_heads,
            "hidden": hidden,
            "norms": stream.factors(hidden) if narrower else {},
        }

    def tensors(
        self, choice: Mapping[str, Any], model: ModelReader
    ) -> Iterator[tuple[str, Tensor]]:
        """Every matrix with the rows and columns that are kept."""
        hidden, norms = choice["hidden"], choice["norms"]
        for name, tensor in model.ends().items():
            if name == FINAL_NORM:
                yield name, _scaled(tensor[hidden], norms.get("final", 1.0))
            else:
                yield name, tensor[:, hidden] if name in (EMBEDDINGS, HEAD) else tensor
        for number, index in enumerate(choice["blocks"]):
            channels, heads = choice["channels"][str(index)], choice["kv_heads"][str(index)]
            queries = _head_channels(heads, model.shapes, queries=True)
            keys = _head_channels(heads, model.shapes, queries=False)
            rows = {QKV[0]: queries, QKV[1]: keys, QKV[2]: keys, **dict.fromkeys(GATE_UP, channels)}
            columns = {OUTPUT: queries, DOWN: channels}
            for name, tensor in model.block(index).items():
                owner, _, leaf = name.rpartition(".")
                cut = tensor
                if owner in NORMS:
                    cut = _scaled(tensor[hidden], norms.get(f"{index}.{owner}", 1.0))
                elif owner in rows:
                    cut = tensor[rows[owner]]
                    cut = cut[:, hidden] if leaf == "weight" else cut
                elif owner in columns and leaf == "weight":
                    place = (index, owner)
                    cut = (
                        self._compensated.pop(place).to(tensor.dtype)
                        if place in self._compensated
                        else tensor[:, columns[owner]]
                    )[hidden]
                elif owner in columns:
                    cut = tensor[hidden]  # a bias
                yield model.name(number, name), cut

    def _saliency(self, block: SurveyedBlock, linear: str) -> Tensor:
        """√E[x_c²] · ||W[:, c]|| of each input c of a linear, or the norms alone."""
        norms = block.matrices[linear].norm(dim=0)
        if self.settings.criterion == "magnitude":
            return norms
        return block.evidence[linear]["square_mean"].sqrt() * norms

    def _kept_heads(self, block: SurveyedBlock, shapes: Shapes) -> list[int]:
        of_channels = self._saliency(block, OUTPUT).square()
        scores = of_channels.reshape(shapes.kv_heads, -1).sum(1).sqrt()
        return _largest(scores, self.settings.kv_heads or shapes.kv_heads)

    def _kept_blocks(self, influence: Sequence[float]) -> list[int]:
        count, keep = len(influence), self.settings.blocks or len(influence)
        always = {0, count - 1} if self.settings.protect_ends else set()
        ranked = sorted(range(count), key=lambda i: (i not in always, -influence[i], -i))
        return sorted(ranked[:keep])

    def _compensate(self, block: SurveyedBlock, linear: str, kept: Sequence[int]) -> None:
        weight, hessian = block.matrices[linear], block.evidence[linear]["hessian"]
        if len(kept) == weight.shape[1]:
            return
        mask = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        mask[list(kept)] = False
        removed, own = mask.nonzero()[:, 0], list(kept)
        moment = hessian[own][:, own]
        # kept inputs that are always 0 take over nothing
        damping = self.settings.damping_fraction * float(moment.diagonal().mean()) or 1.0
        moment = moment + damping * torch.eye(len(own), device=weight.device)
        # H[R, K] (H[K, K] + λI)⁻¹, the matrix being symmetric
        solved = torch.linalg.solve(moment.double(), hessian[own][:, removed].double()).float()
        self._compensated[block.index, linear] = (
            weight[:, own] + weight[:, removed] @ solved.T
        ).cpu()


@dataclass
class _Stream:
    """Saliency of the channels of the residual stream, summed over the norms that read it."""

    width: int
    total: Tensor = field(init=False)
    shares: dict[str, Tensor] = field(default_factory=dict)  # by norm: E[x_d² / mean of x²]

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.width)

    @property
    def score(self) -> Tensor:
        return self.total

    def add(
        self, name: str, square: Tensor, weight: Tensor, matrices: Sequence[Tensor], criterion: str
    ) -> None:
        """square [hidden]: E[n_d²] of a norm's output; weight: the norm's; matrices [out, hidden]: its consumers."""
        norms = sum((m.float().square().sum(0) for m in matrices), torch.zeros(self.width)).sqrt()
        own = square.float().cpu()
        self.total = self.total + (norms if criterion == "magnitude" else own.sqrt() * norms)
        scale = weight.float().cpu().square()
        self.shares[name] = torch.where(scale > 0, own / scale, 0.0)

    def factors(self, kept: Sequence[int]) -> dict[str, float]:
        """What each norm's weight is multiplied by once the channels `kept` are left."""
        return {
            name: math.sqrt(max(float(share[list(kept)].mean()), torch.finfo(torch.float32).tiny))
            for name, share in self.shares.items()
        }


def _largest(scores: Tensor, count: int) -> list[int]:
    """The indices of the largest scores, in order; of equal ones the first."""
    order = (-scores).argsort(stable=True)[:count]
    found: list[int] = order.sort().values.tolist()
    return found


def _head_channels(kv_heads: Sequence[int], shapes: Shapes, *, queries: bool) -> list[int]:
    """The output channels of key-value heads, or those of their query heads."""
    width = shapes.head_dim * (shapes.heads // shapes.kv_heads if queries else 1)
    return [head * width + channel for head in kv_heads for channel in range(width)]


def _normalized(states: Sequence[Tensor], eps: float) -> Tensor:
    """E over tokens of x_d² / (mean over d of x_d² + eps), [hidden]."""
    total, tokens = torch.zeros(states[0].shape[-1], dtype=torch.float64), 0
    for state in states:
        square = state.reshape(-1, state.shape[-1]).float().square()
        total += (square / (square.mean(-1, keepdim=True) + eps)).double().sum(0).cpu()
        tokens += square.shape[0]
    return (total / tokens).float()


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)
