"""Falcon: attention and MLP side by side, queries, keys and values in one linear, layer norms with biases.

Three layouts of the fused linear:

    one key-value head (7B)              all queries, then the key, then the value: three matrices by rows
    groups of heads (40B, 180B, 11B)     per group its queries, a key and a value: rows of one kind are not neighbours
    as many heads of each kind (RW)      per head a query, a key and a value

Where rows of a kind are not neighbours the fused linear stays one matrix, as in the published quantizers: grids are per row, so
nothing is lost but a scale between values and output. Between the two linears of the MLP stands a GELU, where none can be folded.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from harness.core.shapes import ScalePair
from harness.quantization.models.parts import row_locations
from harness.quantization.models.protocols import DecoderFamily, WeightLocation

FUSED, DENSE = "self_attention.query_key_value", "self_attention.dense"
WIDE, NARROW = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
SPLIT = ("self_attention.query", "self_attention.key", "self_attention.value")


class Family(DecoderFamily):
    """Falcon of both decoder architectures, with one norm per block or two, parallel or in sequence."""

    architectures = ("FalconForCausalLM",)
    blocks_name = "transformer.h"
    before = ("transformer.word_embeddings",)
    after = ("transformer.ln_f", "lm_head")
    returns_tuple = True

    def locations(self, config: PretrainedConfig, index: int) -> tuple[WeightLocation, ...]:
        attention, mlp = self._inputs(config)
        return (
            *self._fused(config, attention),
            *self._linear(config, WIDE, mlp, early=attention == mlp),
            *self._linear(config, DENSE, "dense"),
            *self._linear(config, WIDE, mlp, early=attention != mlp),
            *self._linear(config, NARROW, "dense_4h_to_h"),
        )

    def pairs(self, config: PretrainedConfig) -> tuple[ScalePair, ...]:
        projections = tuple(location.name for location in self._fused(config, ""))
        attention, mlp = self._inputs(config)
        if attention == mlp:
            found = [ScalePair("input_layernorm", (*projections, WIDE), "norm")]
        else:
            first, second = (
                ("ln_attn", "ln_mlp")
                if self._norms(config) == 2
                else ("input_layernorm", "post_attention_layernorm")
            )
            found = [
                ScalePair(first, projections, "norm", region="self_attention"),
                ScalePair(second, (WIDE,), "norm", region="mlp"),
            ]
        if len(projections) == 3:
            found.append(
                ScalePair(SPLIT[2], (DENSE,), "linear", repeats=config.num_attention_heads)
            )
        return tuple(found)

    def query_key(self, config: PretrainedConfig) -> tuple[str, str] | None:
        return (SPLIT[0], SPLIT[1]) if self._one_value_head(config) and not config.alibi else None

    def kv_heads(self, config: PretrainedConfig) -> int:
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else config.num_attention_heads

    def _one_value_head(self, config: PretrainedConfig) -> bool:
        return bool(config.multi_query) and not config.new_decoder_architecture

    def _norms(self, config: PretrainedConfig) -> int:
        """Norms of a parallel block; 0 for a block in sequence."""
        if not config.parallel_attn:
            return 0
        return config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)

    def _inputs(self, config: PretrainedConfig) -> tuple[str, str]:
        """The groups of attention's and of the MLP's inputs: one where a single norm serves both."""
        return (
            ("input", "input") if self._norms(config) == 1 else ("query_key_value", "dense_h_to_4h")
        )

    def _fused(self, config: PretrainedConfig, group: str) -> tuple[WeightLocation, ...]:
        if not self._one_value_head(config):
            return self._linear(config, FUSED, group)
        head = config.hidden_size // config.num_attention_heads
        return row_locations(
            group,
            FUSED,
            dict(zip(SPLIT, (config.hidden_size, head, head), strict=True)),
            biased=config.bias,
        )

    def _linear(
        self, config: PretrainedConfig, name: str, group: str, early: bool = True
    ) -> tuple[WeightLocation, ...]:
        """The location of one linear; none where it comes at another place of the order."""
        return (
            (
                WeightLocation(
                    name, group, f"{name}.weight", bias=f"{name}.bias" if config.bias else None
                ),
            )
            if early
            else ()
        )
