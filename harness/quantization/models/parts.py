"""Parts that several families are made of: attention and gated MLPs with separate projections, and fused experts.

No family is in this file; family files import it, and never each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from harness.core.errors import ModelError
from harness.core.shapes import ScalePair
from harness.quantization.models.protocols import (
    DecoderFamily,
    Receive,
    ReceiveExpert,
    Replace,
    WeightLocation,
)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
ATTENTION = {"qkv": QKV, "o": (OUTPUT,)}
GATED_MLP = {"gate_up": GATE_UP, "down": (DOWN,)}


def whole_locations(
    groups: Mapping[str, tuple[str, ...]], biased: Collection[str] = ()
) -> tuple[WeightLocation, ...]:
    """Slots that are the weights of linears of their own; groups: {group: names}; biased: names of those with a bias."""
    return tuple(
        WeightLocation(
            name, group, f"{name}.weight", bias=f"{name}.bias" if name in biased else None
        )
        for group, names in groups.items()
        for name in names
    )


def row_locations(
    group: str, linear: str, parts: dict[str, int], biased: bool = False
) -> tuple[WeightLocation, ...]:
    """Slots that are runs of rows of one fused linear, in order; parts: {name: rows}."""
    locations, start = [], 0
    for name, rows in parts.items():
        span = (start, start + rows)
        locations.append(
            WeightLocation(
                name,
                group,
                f"{linear}.weight",
                rows=span,
                bias=f"{linear}.bias" if biased else None,
            )
        )
        start += rows
    return tuple(locations)


def attention_pairs(
    config: PretrainedConfig, norm: str = "input_layernorm", offset: float = 0.0
) -> tuple[ScalePair, ...]:
    """Norm → queries, keys, values; values → output."""
    repeats = config.num_attention_heads // config.num_key_value_heads
    return (
        ScalePair(norm, QKV, "norm", region="self_attn", offset=offset),
        ScalePair("self_attn.v_proj", (OUTPUT,), "linear", repeats=repeats),
    )


def gated_mlp_pairs(
    norm: str = "post_attention_layernorm", offset: float = 0.0
) -> tuple[ScalePair, ...]:
    """Norm → gate and up; up → down."""
    return (
        ScalePair(norm, GATE_UP, "norm", region="mlp", offset=offset),
        ScalePair(GATE_UP[1], (DOWN,), "linear"),
    )


class MixtureFamily(DecoderFamily):
    """A gated mixture of experts in two parameters: gate_up_proj [experts, 2 inner, hidden], down_proj [experts, hidden, inner].

    Every expert has three matrices, quantized on their own; the inputs of an expert are the tokens that the router sent to it.
    The router, and what else decides about tokens, stays as it is.

    No scale is folded between a norm and the experts: the router, which is no quantizable matrix, reads the same input.
    """

    fused_experts = True
    experts_name: ClassVar[str] = "mlp.experts"
    by_expert: ClassVar[tuple[str, ...]] = ("mlp.experts", "mlp.gate")

    def experts(self, config: PretrainedConfig) -> tuple[int, int]:
        """How many experts, and their inner width."""
        raise ModelError(f"{type(self).__module__} does not say how many experts there are")

    def expert_locations(self, config: PretrainedConfig) -> tuple[WeightLocation, ...]:
        """The matrices of all experts, in the order of experts."""
        count, inner = self.experts(config)
        locations: list[WeightLocation] = []
        for expert in range(count):
            name, both = f"{self.experts_name}.{expert}", f"{self.experts_name}.gate_up_proj"
            first, second = f"{name}.gate_up", f"{name}.down"
            locations += [
                WeightLocation(
                    f"{name}.gate_proj",
                    first,
                    both,
                    rows=(0, inner),
                    expert=expert,
                    stage="gate_up",
                ),
                WeightLocation(
                    f"{name}.up_proj",
                    first,
                    both,
                    rows=(inner, 2 * inner),
                    expert=expert,
                    stage="gate_up",
                ),
                WeightLocation(
                    f"{name}.down_proj",
                    second,
                    f"{self.experts_name}.down_proj",
                    expert=expert,
                    stage="down",
                ),
            ]
        # all first halves run before the second
        return tuple(sorted(locations, key=lambda location: location.stage != "gate_up"))

    def expert_pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        """Up → down inside each expert."""
        names = [f"{self.experts_name}.{expert}" for expert in range(self.experts(config)[0])]
        return tuple(
            ScalePair(f"{name}.up_proj", (f"{name}.down_proj",), "linear") for name in names
        )

    def notes(self, config: PretrainedConfig) -> tuple[str, ...]:
        return (
            "scales on the inputs of experts are not folded into the norm: the router reads the same input",
        )

    # --- running --------------------------------------------------------------------------------------------------------------

    @contextmanager
    def watch(
        self, block: nn.Module, locations: Sequence[WeightLocation], receive: Receive
    ) -> Iterator[None]:
        """As for any family; an expert's inputs are those of the tokens sent to it, none for an expert that was not chosen."""
        chosen = sorted({location.expert for location in locations if location.expert is not None})
        with super().watch(
            block, [location for location in locations if location.expert is None], receive
        ):
            if not chosen:
                yield
                return
            module = block.get_submodule(self.experts_name)

            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                def see(expert: int, half: str, inputs: Tensor) -> Tensor:
                    receive(f"{self.experts_name}.{expert}.{half}", inputs)
                    return inputs

                _run(module, *_routed(args, kwargs), chosen, see)

            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    @contextmanager
    def watch_experts(self, block: nn.Module, receive: ReceiveExpert) -> Iterator[None]:
        """As for any family: each expert runs once more on the tokens that the router sent to it."""
        module: Any = dict(block.named_modules()).get(self.experts_name)
        if module is None:
            yield
            return

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, weights = _routed(args, kwargs)
            for expert in range(module.down_proj.shape[0]):
                tokens, choice = torch.where(index.eq(expert))
                if tokens.numel():
                    outputs = _expert(module, hidden[tokens], expert, lambda _e, _h, x: x)
                    receive(expert, weights[tokens, choice], outputs)

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def replace_inputs(
        self, block: nn.Module, owner: str, members: Sequence[WeightLocation], replace: Replace
    ) -> Callable[[], None]:
        """As for any family; inside the experts each expert's two inputs are replaced, by the names of gate_proj and down_proj."""
        if owner != self.experts_name:
            return super().replace_inputs(block, owner, members, replace)
        module = block.get_submodule(owner)
        experts = sorted({location.expert for location in members if location.expert is not None})
        first = {"gate_up": "gate_proj", "down": "down_proj"}

        def see(expert: int, half: str, inputs: Tensor) -> Tensor:
            return replace(f"{owner}.{expert}.{first[half]}", inputs)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return _run(module, *_routed(args, kwargs), experts, see)

        module.forward = forward  # hides the class's forward until it is deleted from the instance
        return functools.partial(module.__dict__.pop, "forward", None)


def _routed(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [tokens, hidden], expert of each choice [tokens, k], its weight [tokens, k]."""
    named = (
        dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    )
    return named["hidden_states"], named["top_k_index"], named["top_k_weights"]


def _expert(module: Any, hidden: Tensor, expert: int, see: Any) -> Tensor:
    """What one expert makes of hidden [tokens, hidden], before its gates; see as in `_run`."""
    inputs = see(expert, "gate_up", hidden)
    gate, up = nn.functional.linear(inputs, module.gate_up_proj[expert]).chunk(2, dim=-1)
    inner = see(expert, "down", module.act_fn(gate) * up)
    return nn.functional.linear(inner, module.down_proj[expert])


def _run(
    module: Any, hidden: Tensor, index: Tensor, weights: Tensor, experts: Iterable[int], see: Any
) -> Tensor:
    """The mixture's output, expert by expert; see(expert, "gate_up" or "down", inputs) returns what the matrices multiply."""
    output = torch.zeros_like(hidden)
    for expert in experts:
        tokens, choice = torch.where(index.eq(expert))
        if tokens.numel() == 0:
            continue
        result = _expert(module, hidden[tokens], expert, see) * weights[tokens, choice, None]
        output.index_add_(0, tokens, result.to(output.dtype))
    return output
