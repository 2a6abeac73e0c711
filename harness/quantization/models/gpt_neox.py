"""GPT-NeoX and Pythia: layer norms and linears with biases, queries, keys and values of each head interleaved in one linear.

The fused linear stays one matrix: rows of a kind are not neighbours, and grids are per row. Attention and MLP have norms of their
own, side by side or in sequence. Between the two linears of the MLP stands a GELU, where no scale can be folded.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

from harness.core.shapes import ScalePair
from harness.quantization.models.parts import whole_locations
from harness.quantization.models.protocols import DecoderFamily, WeightLocation

ATTENTION = {"query_key_value": ("attention.query_key_value",), "dense": ("attention.dense",)}
MLP = {"dense_h_to_4h": ("mlp.dense_h_to_4h",), "dense_4h_to_h": ("mlp.dense_4h_to_h",)}


class Family(DecoderFamily):
    """GPT-NeoX 20B, Pythia, and models of their class."""

    architectures = ("GPTNeoXForCausalLM",)
    blocks_name = "gpt_neox.layers"
    before = ("gpt_neox.embed_in",)
    after = ("gpt_neox.final_layer_norm", "lm_head")

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        biased = {name for members in MLP.values() for name in members}
        if config.attention_bias:
            biased |= {name for members in ATTENTION.values() for name in members}
        return whole_locations(ATTENTION | MLP, biased)

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        return (
            ScalePair("input_layernorm", ATTENTION["query_key_value"], "norm", region="attention"),
            ScalePair("post_attention_layernorm", MLP["dense_h_to_4h"], "norm", region="mlp"),
        )

    def kv_heads(self, config: PretrainedConfig) -> int:
        return config.num_attention_heads

    def file_names(self, name: str) -> Iterator[str]:
        yield from super().file_names(name)
        if name == "lm_head.weight":
            yield "embed_out.weight"  # what the head was called when the published files were written
